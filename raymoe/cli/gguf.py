"""`raymoe gguf`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import (
    AllowCrimes,
    AllSame,
    Quiet,
    TransformersCache,
    TrustRemoteCode,
    parse_device,
    set_log_level,
)


@app.command(short_help="Write a checkpoint or a merge as one GGUF file.")
@stoppable("no file was left")
def gguf(
    source: Annotated[
        str, typer.Argument(metavar="OUT|CONFIG", help="Folder or URL of a checkpoint, or the config of a merge.")
    ],
    output: Annotated[str, typer.Argument(metavar="FILE.gguf", help="The file to write.")],
    kind: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16, bf16, q8_0 or q4_0. Default: what the checkpoint's weights are."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of this name.")] = False,
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if raymoe can't tell."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name. Default: the file's.")] = None,
    random_seed: Annotated[int | None, typer.Option(help="For a config: seed of random gates and of noise.")] = None,
    allow_crimes: AllowCrimes = False,
    all_same: AllSame = False,
    device: Annotated[
        str | None, typer.Option("--device", help="For a config: compute gates on cpu or cuda. Default: a GPU, if any.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    transformers_cache: TransformersCache = None,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Print more.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint, or the merge of a config, as one GGUF file for llama.cpp. Needs no Ray and little memory."""
    from raymoe.console import say
    from raymoe.export.gguf import GgufOptions, write_gguf
    from raymoe.formatting import human_bytes, human_count
    from raymoe.planning import MergeOptions
    from raymoe.sources.hub import HubOptions

    set_log_level(verbose)
    of_config = {
        "--random-seed": random_seed is not None,
        "--allow-crimes": allow_crimes,
        "--i-understand-this-is-not-useful-without-training": all_same,
        "--device": device,
    }
    options = GgufOptions(
        type=kind,
        pre=pre,
        name=name,
        overwrite=overwrite,
        merge=MergeOptions(seed=random_seed or 0, allow_crimes=allow_crimes, model_card=False),
        config_options=tuple(option for option, value in of_config.items() if value),
        allow_all_same=all_same,
        device=parse_device(device),
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    written = write_gguf(source, output, options)
    for warning in written.warnings:
        say(f"warning: {warning}")
    if not quiet:
        typer.echo(
            f"{output}: {human_bytes(written.size)}, {human_count(written.parameters)} parameters in "
            f"{written.tensors} tensors, {written.type}, architecture {written.architecture}"
        )
