"""The command line: arguments in, calls to the package, messages out. No logic of its own.

`raymoe merge` takes mergekit-moe's arguments as they are. A flag of it that has nothing left to do here is accepted and
says so. Imports are inside the commands, so that `--help` does not wait for them.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from raymoe.errors import Problem, ProblemReport, RaymoeError
from raymoe.text import parse_size

if TYPE_CHECKING:
    from raymoe.planning import MergeOptions

__all__ = ["app", "main"]

app = typer.Typer(
    name="raymoe",
    help="Make Mixture-of-Experts checkpoints out of dense language models, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Merge config (mergekit-moe's YAML schema).")]
ShardSize = Annotated[str, typer.Option("--out-shard-size", help="Largest shard: bytes, or 5B, 500M, 2GiB.")]
Seed = Annotated[int, typer.Option("--random-seed", help="Seed of random gates and of noise.")]
AllSame = Annotated[
    bool,
    typer.Option(
        "--i-understand-this-is-not-useful-without-training",
        help="Allow all experts to be the same model.",
    ),
]
Crimes = Annotated[
    bool,
    typer.Option("--allow-crimes/--no-allow-crimes", help="Allow experts of another model type of equal shape."),
]
CopyTokenizer = Annotated[
    bool,
    typer.Option("--copy-tokenizer/--no-copy-tokenizer", help="Copy the base model's tokenizer to the output."),
]
Card = Annotated[bool, typer.Option("--write-model-card/--no-write-model-card", help="Write a README.md.")]
In8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Read prompts with 8-bit weights (bitsandbytes, GPU).")]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Read prompts with 4-bit weights (bitsandbytes, GPU).")]
Cache = Annotated[str | None, typer.Option("--transformers-cache", help="Folder for models downloaded from the Hub.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more; repeat for Ray's own logs.")]
Quiet = Annotated[bool, typer.Option("--quiet/--no-quiet", help="Say nothing but warnings and errors.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster. Default: RAY_ADDRESS, else one is started here.")
]
GpusPerExpert = Annotated[
    float | None, typer.Option("--gpus-per-expert", min=0.0, help="GPUs an expert actor gets, fractions too.")
]
Actors = Annotated[int | None, typer.Option("--actors", min=1, help="Most expert actors at once.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="'cpu' computes gates on CPUs; anything else leaves the choice to Ray."),
]
Remote = Annotated[
    bool,
    typer.Option("--trust-remote-code/--no-trust-remote-code", help="Allow a tokenizer's own code to run."),
]
# Flags of mergekit-moe that have nothing left to do: name -> why.
_IDLE: dict[str, str] = {
    "lazy_unpickle": "pickled checkpoints are always read by byte range",
    "low_cpu_memory": "memory does not grow with the model",
    "read_to_gpu": "weights that are only copied never visit a GPU",
    "multi_gpu": "every expert gets a GPU of the Ray cluster",
    "gpu_rich": "every expert gets a GPU of the Ray cluster",
    "cuda": "GPUs that the Ray cluster has are used",
    "async_write": "shards are always written in parallel",
    "write_threads": "shards are always written in parallel",
    "num_threads": "work is spread over Ray actors (--actors)",
    "clone_tensors": "tensors are copied as bytes",
    "safe_serialization": "the output is always safetensors",
    "lora_merge_cache": "LoRA deltas are applied while writing; no merged copy is kept",
    "lora_merge_dtype": "LoRA deltas are applied in float32",
    "unsafe_truncate_embeddings": "the base model's embeddings are used whole",
}


def _idle(name: str, *declarations: str, kind: Any = bool) -> Any:
    return Annotated[kind, typer.Option(*declarations, help=f"Accepted, nothing to do: {_IDLE[name]}.", hidden=True)]


class _Stopped(RaymoeError):
    """Ctrl-C, or a stopped job."""


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """Turn Ctrl-C into a message and exit status 1; typer's own answer to it differs between versions."""

    @functools.wraps(command)
    def stoppable(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
            raise _Stopped("stopped; a merge that had begun goes on from here when its command is run again") from None

    return stoppable


@app.command()
@_stoppable
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
    trust_remote_code: Remote = False,
    transformers_cache: Cache = None,
    write_model_card: Card = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the merge that is in OUT.")] = False,
    address: Address = None,
    gpus_per_expert: GpusPerExpert = None,
    actors: Actors = None,
    device: Device = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    result: Annotated[
        str | None,
        typer.Option("--result", metavar="FILE", help="Write phases, bytes, retries, memory; also if the merge fails."),
    ] = None,
    lazy_unpickle: _idle("lazy_unpickle", "--lazy-unpickle/--no-lazy-unpickle") = False,  # type: ignore[valid-type]
    low_cpu_memory: _idle("low_cpu_memory", "--low-cpu-memory/--no-low-cpu-memory") = False,  # type: ignore[valid-type]
    read_to_gpu: _idle("read_to_gpu", "--read-to-gpu/--no-read-to-gpu") = False,  # type: ignore[valid-type]
    multi_gpu: _idle("multi_gpu", "--multi-gpu/--no-multi-gpu") = False,  # type: ignore[valid-type]
    gpu_rich: _idle("gpu_rich", "--gpu-rich") = False,  # type: ignore[valid-type]
    cuda: _idle("cuda", "--cuda/--no-cuda") = False,  # type: ignore[valid-type]
    async_write: _idle("async_write", "--async-write/--no-async-write") = False,  # type: ignore[valid-type]
    write_threads: _idle("write_threads", "--write-threads", kind=int) = 1,  # type: ignore[valid-type]
    num_threads: _idle("num_threads", "-j", "--num-threads", kind=int | None) = None,  # type: ignore[valid-type]
    clone_tensors: _idle("clone_tensors", "--clone-tensors/--no-clone-tensors") = False,  # type: ignore[valid-type]
    safe_serialization: _idle(  # type: ignore[valid-type]
        "safe_serialization", "--safe-serialization/--no-safe-serialization"
    ) = True,
    lora_merge_cache: _idle("lora_merge_cache", "--lora-merge-cache", kind=str | None) = None,  # type: ignore[valid-type]
    lora_merge_dtype: _idle("lora_merge_dtype", "--lora-merge-dtype", kind=str | None) = None,  # type: ignore[valid-type]
    unsafe_truncate_embeddings: _idle(  # type: ignore[valid-type]
        "unsafe_truncate_embeddings", "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings"
    ) = False,
) -> None:
    """Merge dense models into a Mixture-of-Experts checkpoint in OUT.

    A merge that was interrupted goes on when the same command is run again.
    """
    from raymoe import api
    from raymoe.config import config_warnings, load_config
    from raymoe.report.display import print_result, say
    from raymoe.runtime.run_report import recorded
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.resolve import HubOptions

    _log_level(verbose)
    options = _options(
        out_shard_size,
        random_seed,
        allow_crimes,
        copy_tokenizer,
        write_model_card,
        load_in_8bit,
        load_in_4bit,
    )
    settings = RuntimeSettings(
        address=address,
        gpus_per_expert=gpus_per_expert,
        actors=actors,
        device=_device(device),
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        verbosity=-1 if quiet else verbose,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    if not quiet:
        for note in _idle_notes(context):
            say(note)
    with recorded(result) as report:
        merge_config = load_config(config, allow_all_same=all_same)
        for warning in config_warnings(merge_config):
            say(f"warning: {warning}")
        merged = api.merge(merge_config, output, options, settings=settings, allow_all_same=True, report=report)
    for warning in merged.warnings:
        say(f"warning: {warning}")
    if not quiet:
        print_result(merged)


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG OUT [OPTIONS OF merge]", help="What `raymoe merge` is given."),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Job server: http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine.",
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="The cluster's token. Better: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log, and end as the merge ends.")] = True,
    install: Annotated[
        bool,
        typer.Option("--install/--no-install", help="Send this raymoe's code; else the cluster's own raymoe is run."),
    ] = True,
) -> None:
    """Run a merge as a job of a Ray cluster, follow its log, and exit with its status.

    Models are not sent: they are Hub ids, URLs or folders that the cluster's nodes have.
    """
    from raymoe.config import load_config
    from raymoe.report.display import say
    from raymoe.submit.job import make_job
    from raymoe.submit.run import follow_job, send_job
    from raymoe.submit.server import job_server

    params, options = _merge_arguments(context, arguments)
    job = make_job(
        load_config(params["config"], allow_all_same=params["all_same"]),
        params["output"],
        options,
        result=params["result"],
    )
    client = job_server(address, token)
    name = send_job(client, job, install=install)
    say(f"job {name}: {job.entrypoint}")
    for model in job.models:
        say(f"note: {model} is not sent; the nodes of the cluster need that folder")
    if not wait:
        say(f"follow it with: ray job logs --follow {name}")
        return
    raise typer.Exit(follow_job(client, name, job))


@app.command()
@_stoppable
def plan(
    config: ConfigPath,
    output: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="Where it would go: shows by which way each byte gets there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    copy_tokenizer: CopyTokenizer = True,
    allow_crimes: Crimes = False,
    out_shard_size: ShardSize = "5B",
    random_seed: Seed = 0,
    all_same: AllSame = False,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    transformers_cache: Cache = None,
) -> None:
    """Show what a merge would do: reads configs and file headers only, writes nothing."""
    from raymoe import api
    from raymoe.config import config_warnings, load_config
    from raymoe.report.display import print_plan, say
    from raymoe.sources.resolve import HubOptions

    options = _options(out_shard_size, random_seed, allow_crimes, copy_tokenizer, True, load_in_8bit, load_in_4bit)
    merge_config = load_config(config, allow_all_same=all_same)
    for warning in config_warnings(merge_config):
        say(f"warning: {warning}")
    hub = HubOptions(cache_dir=transformers_cache)
    merge_plan = api.plan(merge_config, options, hub=hub, allow_all_same=True)
    ways = None
    if output is not None:
        from raymoe.storage.output import open_output, output_location
        from raymoe.storage.ways import bytes_by_way

        try:
            ways = bytes_by_way(merge_plan, open_output(output_location(output), merge_config.storage))
        except ValueError as error:
            raise ProblemReport([Problem(where="OUT", what=str(error))]) from None
    print_plan(merge_plan, ways, as_json=as_json)


@app.command()
@_stoppable
def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Summarise a checkpoint: architecture, parameters, experts, shards, routers, how it was made."""
    from raymoe.report.inspect import inspect_checkpoint, print_summary

    print_summary(inspect_checkpoint(checkpoint), as_json=as_json)


@app.command()
@_stoppable
def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a merge made by raymoe.")],
    address: Address = None,
    actors: Actors = None,
    device: Device = None,
    trust_remote_code: Remote = False,
    transformers_cache: Cache = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Make a merge again from its sources, in memory, and compare every tensor byte for byte."""
    from raymoe.report.display import print_verification
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.runtime.verify import verify_merge
    from raymoe.sources.resolve import HubOptions

    _log_level(verbose)
    settings = RuntimeSettings(
        address=address,
        actors=actors,
        device=_device(device),
        trust_remote_code=trust_remote_code,
        verbosity=-1 if quiet else verbose,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    verification = verify_merge(checkpoint, settings)
    print_verification(verification, quiet=quiet)
    if not verification.ok:
        raise typer.Exit(1)


@app.command(name="eval")
@_stoppable
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a merge made by raymoe.")],
    data: Annotated[Path, typer.Option("--data", help="Labelled texts: one JSON object a line.")],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Of base,experts,oracle,hidden: what to compare with, or none. Default: all."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="LABEL=EXPERT for a label that is no expert's name; repeat.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Texts of a label, the first of the file; 0 is all.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest text; what is beyond is left out.")] = 512,
    text_field: Annotated[str, typer.Option("--text-field", help="The text's key.")] = "text",
    label_field: Annotated[str, typer.Option("--label-field", help="The label's key.")] = "label",
    html: Annotated[Path | None, typer.Option("--html", help="Write a page of pictures to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="'cpu' computes on the CPU; default: a GPU, if there is one.")
    ] = None,
    trust_remote_code: Remote = False,
    transformers_cache: Cache = None,
    quiet: Quiet = False,
) -> None:
    """Measure how well a merge predicts labelled texts, and where its routers send them; no Ray, little memory."""
    from raymoe import api
    from raymoe.evaluation.options import EvaluationOptions, parse_against
    from raymoe.evaluation.written import check_writable, write_evaluation
    from raymoe.report.display import say
    from raymoe.report.eval_table import print_evaluation
    from raymoe.sources.resolve import HubOptions

    options = EvaluationOptions(
        against=parse_against(against),
        labels=tuple(label or ()),
        limit=limit,
        max_tokens=max_tokens,
        text_field=text_field,
        label_field=label_field,
        device=_device(device),
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    check_writable({"--json": json_file, "--html": html})
    result = api.evaluate(checkpoint, data, options)
    try:
        write_evaluation(result, json_file, html)
    finally:  # a full disk must not take the numbers from the screen too
        if not quiet:
            print_evaluation(result)
        else:
            for warning in result["warnings"]:
                say(f"warning: {warning}")


def _version(wanted: bool) -> None:
    if wanted:
        from raymoe import __version__

        typer.echo(f"raymoe {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Entry point of the console script: 0 done, 1 failed, 2 wrong usage or config."""
    try:
        app()
    except _Stopped as stopped:
        typer.echo(str(stopped), err=True)
        sys.exit(stopped.exit_code)
    except RaymoeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


def _options(
    shard_size: str,
    seed: int,
    allow_crimes: bool,
    copy_tokenizer: bool,
    model_card: bool,
    load_in_8bit: bool,
    load_in_4bit: bool,
) -> MergeOptions:
    from raymoe.planning import MergeOptions

    problems = []
    try:
        max_shard_bytes = parse_size(shard_size)
    except ValueError as error:
        problems.append(Problem(where="--out-shard-size", what=str(error)))
    if load_in_8bit and load_in_4bit:
        problems.append(Problem(where="--load-in-8bit", what="can't go with --load-in-4bit", remedy="choose one"))
    if problems:
        raise ProblemReport(problems)
    return MergeOptions(
        max_shard_bytes=max_shard_bytes,
        seed=seed,
        allow_crimes=allow_crimes,
        copy_tokenizer=copy_tokenizer,
        model_card=model_card,
        quantise_gates="8bit" if load_in_8bit else "4bit" if load_in_4bit else None,
    )


def _merge_arguments(context: typer.Context, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `raymoe merge`, as it takes them: its parameters by name, and the options among them anew.

    What it refuses ends this command as it would end that one.
    """
    assert context.parent is not None
    command: Any = context.parent.command
    merging = command.commands["merge"].make_context("merge", list(arguments), parent=context.parent)
    options: list[str] = []
    for param in merging.command.params:
        source = merging.get_parameter_source(param.name)
        if not param.name or param.param_type_name != "option" or source is None or source.name != "COMMANDLINE":
            continue
        value, flag = merging.params[param.name], max(param.opts, key=len)
        if param.is_flag:
            options.append(flag if value else param.secondary_opts[0])
        elif param.count:
            options += [flag] * value
        else:
            options.append(f"{flag}={value}")
    return merging.params, options


def _device(device: str | None) -> str | None:
    return "cpu" if device is not None and device.lower() == "cpu" else None


def _idle_notes(context: typer.Context) -> list[str]:
    """One line for each given flag that has nothing to do."""
    # By name: newer versions of typer bring their own copy of click's enumeration.
    sources = {name: context.get_parameter_source(name) for name in _IDLE}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return [f"note: --{name.replace('_', '-')} is accepted and changes nothing here: {_IDLE[name]}" for name in given]


def _log_level(verbose: int) -> None:
    logging.basicConfig(level=[logging.WARNING, logging.INFO][min(verbose, 1)], format="%(message)s")
