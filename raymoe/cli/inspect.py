"""`raymoe inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable


@app.command(short_help="Say what is in a checkpoint.")
@stoppable()
def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Summarize a checkpoint: architecture, parameters, experts, shards, routers, how it was made."""
    from raymoe.report.inspect import inspect_checkpoint, print_summary

    print_summary(inspect_checkpoint(checkpoint), as_json=as_json)
