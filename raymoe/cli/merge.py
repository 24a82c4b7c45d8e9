"""`raymoe merge`: mergekit-moe's arguments as they are, and ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.ignored_flags import ignored_flag_notes, noop
from raymoe.cli.shared_options import (
    Actors,
    Address,
    AllowCrimes,
    AllSame,
    ConfigPath,
    CopyTokenizer,
    Device,
    GpusPerExpert,
    In4Bit,
    In8Bit,
    KeepUploads,
    OutShardSize,
    Quiet,
    RandomSeed,
    StallTimeout,
    Strict,
    TransformersCache,
    TrustRemoteCode,
    Verbose,
    WriteModelCard,
    merge_options,
    parse_actor_device,
    set_log_level,
)

if TYPE_CHECKING:
    from raymoe.results import MergeResult


@app.command()
@stoppable("a merge that had begun goes on from here when its command is run again")
def merge(
    context: typer.Context,
    config: ConfigPath,
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3://bucket/prefix for the merged model.")],
    copy_tokenizer: CopyTokenizer = True,
    allow_crimes: AllowCrimes = False,
    out_shard_size: OutShardSize = "5B",
    random_seed: RandomSeed = 0,
    all_same: AllSame = False,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    strict: Strict = False,
    trust_remote_code: TrustRemoteCode = False,
    transformers_cache: TransformersCache = None,
    write_model_card: WriteModelCard = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the merge that is in OUT.")] = False,
    address: Address = None,
    gpus_per_expert: GpusPerExpert = None,
    actors: Actors = None,
    device: Device = None,
    stall_timeout: StallTimeout = 20,
    keep_uploads: KeepUploads = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    result: Annotated[
        str | None,
        typer.Option(
            "--result",
            metavar="FILE",
            help="Where to write phases, bytes, retries, memory; also if the merge fails. Default: OUT/result.json.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="ORG/NAME", help="Publish the merge on the Hugging Face Hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="With --push-to-hub: its branch. Default: main.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="With --push-to-hub: first line of the commit.")
    ] = None,
    lazy_unpickle: noop("lazy_unpickle", "--lazy-unpickle/--no-lazy-unpickle") = False,  # type: ignore[valid-type]
    low_cpu_memory: noop("low_cpu_memory", "--low-cpu-memory/--no-low-cpu-memory") = False,  # type: ignore[valid-type]
    read_to_gpu: noop("read_to_gpu", "--read-to-gpu/--no-read-to-gpu") = False,  # type: ignore[valid-type]
    multi_gpu: noop("multi_gpu", "--multi-gpu/--no-multi-gpu") = False,  # type: ignore[valid-type]
    gpu_rich: noop("gpu_rich", "--gpu-rich") = False,  # type: ignore[valid-type]
    cuda: noop("cuda", "--cuda/--no-cuda") = False,  # type: ignore[valid-type]
    async_write: noop("async_write", "--async-write/--no-async-write") = False,  # type: ignore[valid-type]
    write_threads: noop("write_threads", "--write-threads", kind=int) = 1,  # type: ignore[valid-type]
    num_threads: noop("num_threads", "-j", "--num-threads", kind=int | None) = None,  # type: ignore[valid-type]
    clone_tensors: noop("clone_tensors", "--clone-tensors/--no-clone-tensors") = False,  # type: ignore[valid-type]
    safe_serialization: noop(  # type: ignore[valid-type]
        "safe_serialization", "--safe-serialization/--no-safe-serialization"
    ) = True,
    lora_merge_cache: noop("lora_merge_cache", "--lora-merge-cache", kind=str | None) = None,  # type: ignore[valid-type]
    lora_merge_dtype: noop("lora_merge_dtype", "--lora-merge-dtype", kind=str | None) = None,  # type: ignore[valid-type]
    unsafe_truncate_embeddings: noop(  # type: ignore[valid-type]
        "unsafe_truncate_embeddings", "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings"
    ) = False,
) -> None:
    """Merge dense models into a Mixture-of-Experts checkpoint in OUT.

    A merge that was interrupted goes on when the same command is run again, and so does its push.
    """
    from raymoe import api
    from raymoe.config import config_warnings, load_config, storage_note
    from raymoe.console import say
    from raymoe.publish.repository import push_target
    from raymoe.report.plan_report import print_result
    from raymoe.runtime.run_report import record_run
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.hub import HubOptions
    from raymoe.storage.locations import Inputs

    set_log_level(verbose)
    options = merge_options(
        out_shard_size,
        random_seed,
        allow_crimes,
        copy_tokenizer,
        write_model_card,
        load_in_8bit,
        load_in_4bit,
        strict,
    )
    settings = RuntimeSettings(
        address=address,
        gpus_per_expert=gpus_per_expert,
        actors=actors,
        device=parse_actor_device(device),
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        verbosity=-1 if quiet else verbose,
        stall_timeout_s=60 * stall_timeout,
        keep_uploads=keep_uploads,
        hub=HubOptions(cache_dir=transformers_cache),
        inputs=Inputs(files=(("the config", os.path.abspath(config)),)),
    )
    target = push_target(push_to_hub, private=private, revision=branch, message=message)

    def tell(merged: MergeResult) -> None:
        for warning in merged.warnings:
            say(f"warning: {warning}")
        if not quiet:
            print_result(merged)

    if not quiet:
        for note in ignored_flag_notes(context):
            say(note)
    with record_run(result, output) as report:
        merge_config = load_config(config, allow_all_same=all_same)
        for warning in config_warnings(merge_config):
            say(f"warning: {warning}")
        if not quiet and (where := storage_note(merge_config.storage)):
            say(f"note: {where}")
        if target is None:
            tell(api.merge(merge_config, output, options, settings=settings, allow_all_same=True, report=report))
            return
        pushed = api.merge_and_push(
            merge_config, output, target, options, settings=settings, allow_all_same=True, report=report, on_merged=tell
        )
    if not quiet:
        say(pushed.summary)
