"""`raymoe push`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import Quiet


@app.command()
@stoppable("what the Hub has is not sent again when the command is run again")
def push(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a merge made by raymoe.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", "--branch", help="Branch; created if it does not exist. Default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="First line of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be created and sent, and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Publish a finished merge as a model on the Hugging Face Hub.

    Run the same command again to resume an interrupted push. Files that the Hub has are not sent again.
    """
    from raymoe import api
    from raymoe.console import say

    if dry_run:
        for line in api.push_dry_run(checkpoint, repo, private=private, revision=revision, message=message):
            say(line)
        return
    pushed = api.push(checkpoint, repo, private=private, revision=revision, message=message, quiet=quiet)
    if not quiet:
        say(pushed.summary)
