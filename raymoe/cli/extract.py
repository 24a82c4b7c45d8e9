"""`raymoe extract`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import (
    Actors,
    Address,
    KeepUploads,
    Quiet,
    StallTimeout,
    TransformersCache,
    Verbose,
    parse_extracted_expert,
    parse_shard_size,
    set_log_level,
)


@app.command(short_help="Take an expert out of a mixture, as a dense model.")
@stoppable("an extraction that had begun goes on from here when its command is run again")
def extract(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="Folder, Hub id or URL of a mixture.")],
    expert: Annotated[str, typer.Argument(metavar="N", help="Number of the expert, from 0 on, or: shared.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix for the dense model.")],
    without_shared: Annotated[
        bool,
        typer.Option("--without-shared", help="Leave out a shared expert, which otherwise is added to the expert."),
    ] = False,
    copy_tokenizer: Annotated[
        bool, typer.Option("--copy-tokenizer/--no-copy-tokenizer", help="Copy the mixture's tokenizer to the output.")
    ] = True,
    out_shard_size: Annotated[
        str, typer.Option("--out-shard-size", help="Largest shard: bytes, or 5B, 500M, 2GiB.")
    ] = "5B",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse NaN and infinity in weights; this reads every number.")
    ] = False,
    write_model_card: Annotated[
        bool, typer.Option("--write-model-card/--no-write-model-card", help="Write a README.md.")
    ] = True,
    transformers_cache: TransformersCache = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in OUT.")] = False,
    address: Address = None,
    actors: Actors = None,
    stall_timeout: StallTimeout = 20,
    keep_uploads: KeepUploads = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write one expert of a mixture to OUT as a dense model, with the mixture's tokenizer.

    It computes what the mixture computes if every token goes to this expert. Run the same command again to resume.
    """
    from raymoe import api
    from raymoe.console import say
    from raymoe.planning import MergeOptions
    from raymoe.report.plan_report import print_extraction
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.hub import HubOptions

    set_log_level(verbose)
    extracted = api.extract(
        mixture,
        parse_extracted_expert(expert),
        output,
        MergeOptions(
            max_shard_bytes=parse_shard_size(out_shard_size),
            copy_tokenizer=copy_tokenizer,
            model_card=write_model_card,
            strict=strict,
        ),
        without_shared=without_shared,
        settings=RuntimeSettings(
            address=address,
            actors=actors,
            overwrite=overwrite,
            verbosity=-1 if quiet else verbose,
            stall_timeout_s=60 * stall_timeout,
            keep_uploads=keep_uploads,
            hub=HubOptions(cache_dir=transformers_cache),
        ),
    )
    for warning in extracted.warnings:
        say(f"warning: {warning}")
    if not quiet:
        print_extraction(extracted)
