"""`raymoe prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import (
    Actors,
    Address,
    Quiet,
    TransformersCache,
    TrustRecord,
    TrustRemoteCode,
    parse_device,
)


@app.command(short_help="Drop the experts that get the fewest tokens.")
@stoppable("an edit that had begun goes on from here when the command is run again")
def prune(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="Folder or URL of a merge made by raymoe.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix for the pruned mixture.")],
    data: Annotated[Path, typer.Option("--data", help="Labeled texts: one JSON object per line.")],
    keep: Annotated[int | None, typer.Option("--keep", help="How many experts stay.")] = None,
    drop: Annotated[int | None, typer.Option("--drop", help="How many experts are dropped.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="LABEL=EXPERT", help="For a label that is not an expert's name; can be repeated."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Use only the first texts of each label; 0: all.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Texts are cut to this many tokens.")] = 512,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. Default: a GPU, if there is one.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    trust_record: TrustRecord = False,
    transformers_cache: TransformersCache = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the merge that is in OUT.")] = False,
    address: Address = None,
    actors: Actors = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Drop the experts of MIXTURE that get the fewest tokens on labeled texts, and show the loss before and after.

    The experts that stay keep their router rows. Run the same command again to resume.
    """
    from raymoe import api
    from raymoe.report.prune_text import print_pruned

    pruned = api.prune(
        mixture,
        output,
        data,
        keep=keep,
        drop=drop,
        labels=label or (),
        limit=limit,
        max_tokens=max_tokens,
        device=parse_device(device),
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        transformers_cache=transformers_cache,
        overwrite=overwrite,
        address=address,
        actors=actors,
        quiet=quiet,
    )
    if as_json or not quiet:
        print_pruned(pruned, as_json=as_json)
