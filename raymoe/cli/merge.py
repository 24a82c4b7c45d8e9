"""`raymoe merge`: mergekit-moe's arguments unchanged, and raymoe's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.ignored_flags import accept_ignored_flags
from raymoe.cli.option_groups import expand_groups
from raymoe.cli.shared_options import (
    Actors,
    Address,
    ConfigPath,
    Device,
    KeepUploads,
    PlanArgs,
    Quiet,
    StallTimeout,
    TransformersCache,
    TrustRemoteCode,
    Verbose,
    parse_actor_device,
    set_log_level,
)

if TYPE_CHECKING:
    from raymoe.publish.repository import PushTarget
    from raymoe.results import MergeResult
    from raymoe.runtime.settings import RuntimeSettings


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """Options of how a merge runs, and of what it writes beside the weights."""

    trust_remote_code: TrustRemoteCode = False
    transformers_cache: TransformersCache = None
    write_model_card: Annotated[
        bool, typer.Option("--write-model-card/--no-write-model-card", help="Write a README.md.")
    ] = True
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the merge that is in OUT.")] = False
    address: Address = None
    gpus_per_expert: Annotated[
        float | None, typer.Option("--gpus-per-expert", min=0.0, help="GPUs per expert actor; may be a fraction.")
    ] = None
    actors: Actors = None
    device: Device = None
    stall_timeout: StallTimeout = 20
    keep_uploads: KeepUploads = False
    verbose: Verbose = 0
    quiet: Quiet = False
    result: Annotated[
        str | None,
        typer.Option(
            "--result",
            metavar="FILE",
            help="Where to write phases, bytes, retries, memory; also if the merge fails. Default: OUT/result.json.",
        ),
    ] = None

    def settings(self, config: Path | None = None) -> RuntimeSettings:
        """How the merge of this config file, or of a config without a file, runs. Raises ProblemReport."""
        from raymoe.runtime.settings import RuntimeSettings
        from raymoe.sources.hub import HubOptions
        from raymoe.storage.locations import Inputs

        return RuntimeSettings(
            address=self.address,
            gpus_per_expert=self.gpus_per_expert,
            actors=self.actors,
            device=parse_actor_device(self.device),
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
            verbosity=-1 if self.quiet else self.verbose,
            stall_timeout_s=60 * self.stall_timeout,
            keep_uploads=self.keep_uploads,
            hub=HubOptions(cache_dir=self.transformers_cache),
            inputs=Inputs(files=(("the config", os.path.abspath(config)),) if config is not None else ()),
        )


@dataclass(frozen=True, kw_only=True)
class MergeArgs(RunArgs, PlanArgs):
    """All options of `raymoe merge`, which are also those of the job of `raymoe submit`."""

    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="ORG/NAME", help="Publish the merge on the Hugging Face Hub."),
    ] = None
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="With --push-to-hub: its branch. Default: main.")
    ] = None
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="With --push-to-hub: first line of the commit.")
    ] = None

    def push_target(self) -> PushTarget | None:
        """Where the merge is published; None if it is not. Raises ProblemReport."""
        from raymoe.publish.repository import push_target

        return push_target(self.push_to_hub, private=self.private, revision=self.branch, message=self.message)


@app.command()
@stoppable("a merge that had begun goes on from here when its command is run again")
@accept_ignored_flags
@expand_groups
def merge(
    config: ConfigPath,
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix for the merged model.")],
    *,
    args: MergeArgs,
    ignored_notes: list[str],
) -> None:
    """Merge dense models into a Mixture-of-Experts checkpoint in OUT.

    Run the same command again to resume an interrupted merge or push.
    """
    from raymoe import api
    from raymoe.config import config_warnings, load_config, storage_note
    from raymoe.console import say
    from raymoe.report.plan_report import print_result
    from raymoe.runtime.run_report import record_run

    set_log_level(args.verbose)
    options = args.merge_options(model_card=args.write_model_card)
    settings = args.settings(config)
    target = args.push_target()

    def tell(merged: MergeResult) -> None:
        from raymoe.export.gguf.llama_cpp_archs import MIXTURES

        for warning in merged.warnings:
            say(f"warning: {warning}")
        if not args.quiet:
            print_result(merged, has_gguf=merged.model_type in MIXTURES, is_pushed=target is not None)

    if not args.quiet:
        for note in ignored_notes:
            say(note)
    with record_run(args.result, output) as report:
        merge_config = load_config(config, allow_all_same=args.all_same)
        for warning in config_warnings(merge_config):
            say(f"warning: {warning}")
        if not args.quiet and (where := storage_note(merge_config.storage)):
            say(f"note: {where}")
        if target is None:
            tell(
                api.merge(merge_config, output, options, settings=settings, allow_all_same=args.all_same, report=report)
            )
            return
        pushed = api.merge_and_push(
            merge_config,
            output,
            target,
            options,
            settings=settings,
            allow_all_same=args.all_same,
            report=report,
            on_merged=tell,
        )
    if not args.quiet:
        say(pushed.summary)
