"""`raymoe verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import (
    Actors,
    Address,
    Device,
    Quiet,
    StallTimeout,
    TransformersCache,
    TrustRecord,
    TrustRemoteCode,
    Verbose,
    parse_actor_device,
    set_log_level,
)


@app.command(short_help="Make a merge again and compare every tensor.")
@stoppable()
def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a merge made by raymoe.")],
    address: Address = None,
    actors: Actors = None,
    device: Device = None,
    stall_timeout: StallTimeout = 20,
    trust_remote_code: TrustRemoteCode = False,
    trust_record: TrustRecord = False,
    transformers_cache: TransformersCache = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Recompute a merge from its sources, in memory, and compare every tensor byte for byte."""
    from raymoe.report.plan_report import print_verification
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.runtime.verify import verify_merge
    from raymoe.sources.hub import HubOptions

    set_log_level(verbose)
    settings = RuntimeSettings(
        address=address,
        actors=actors,
        device=parse_actor_device(device),
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        verbosity=-1 if quiet else verbose,
        stall_timeout_s=60 * stall_timeout,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    verification = verify_merge(checkpoint, settings)
    print_verification(verification, quiet=quiet)
    if not verification.ok:
        raise typer.Exit(1)
