"""`raymoe merge`: mergekit-moe's arguments as they are, and ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.ignored_flags import idle, idle_notes
from raymoe.cli.shared_options import (
    Actors,
    Address,
    AllSame,
    Cache,
    Card,
    ConfigPath,
    CopyTokenizer,
    Crimes,
    Device,
    GpusPerExpert,
    In4Bit,
    In8Bit,
    Quiet,
    Remote,
    Seed,
    ShardSize,
    StallTimeout,
    Strict,
    Verbose,
    log_level,
    merge_options,
    on_nodes,
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
    allow_crimes: Crimes = False,
    out_shard_size: ShardSize = "5B",
    random_seed: Seed = 0,
    all_same: AllSame = False,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    strict: Strict = False,
    trust_remote_code: Remote = False,
    transformers_cache: Cache = None,
    write_model_card: Card = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the merge that is in OUT.")] = False,
    address: Address = None,
    gpus_per_expert: GpusPerExpert = None,
    actors: Actors = None,
    device: Device = None,
    stall_timeout: StallTimeout = 20,
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
    lazy_unpickle: idle("lazy_unpickle", "--lazy-unpickle/--no-lazy-unpickle") = False,  # type: ignore[valid-type]
    low_cpu_memory: idle("low_cpu_memory", "--low-cpu-memory/--no-low-cpu-memory") = False,  # type: ignore[valid-type]
    read_to_gpu: idle("read_to_gpu", "--read-to-gpu/--no-read-to-gpu") = False,  # type: ignore[valid-type]
    multi_gpu: idle("multi_gpu", "--multi-gpu/--no-multi-gpu") = False,  # type: ignore[valid-type]
    gpu_rich: idle("gpu_rich", "--gpu-rich") = False,  # type: ignore[valid-type]
    cuda: idle("cuda", "--cuda/--no-cuda") = False,  # type: ignore[valid-type]
    async_write: idle("async_write", "--async-write/--no-async-write") = False,  # type: ignore[valid-type]
    write_threads: idle("write_threads", "--write-threads", kind=int) = 1,  # type: ignore[valid-type]
    num_threads: idle("num_threads", "-j", "--num-threads", kind=int | None) = None,  # type: ignore[valid-type]
    clone_tensors: idle("clone_tensors", "--clone-tensors/--no-clone-tensors") = False,  # type: ignore[valid-type]
    safe_serialization: idle(  # type: ignore[valid-type]
        "safe_serialization", "--safe-serialization/--no-safe-serialization"
    ) = True,
    lora_merge_cache: idle("lora_merge_cache", "--lora-merge-cache", kind=str | None) = None,  # type: ignore[valid-type]
    lora_merge_dtype: idle("lora_merge_dtype", "--lora-merge-dtype", kind=str | None) = None,  # type: ignore[valid-type]
    unsafe_truncate_embeddings: idle(  # type: ignore[valid-type]
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
    from raymoe.runtime.run_report import recorded
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.resolve import HubOptions
    from raymoe.storage.locations import Inputs

    log_level(verbose)
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
        device=on_nodes(device),
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        verbosity=-1 if quiet else verbose,
        stall_timeout_s=60 * stall_timeout,
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
        for note in idle_notes(context):
            say(note)
    with recorded(result, output) as report:
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
