"""`raymoe archs`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable


@app.command(short_help="List which dense models become which MoE architectures.")
@stoppable()
def archs(
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="What an engine computes of each architecture: vllm, mlx, sglang, llama.cpp, mistralrs, exllamav3, "
            "tensorrt-llm or transformers.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List which dense models become which MoE architectures, and why others do not."""
    if engine is not None:
        from raymoe.report.engine_table import print_engine_table

        print_engine_table(engine, as_json=as_json)
        return
    from raymoe.report.support_table import print_support_matrix

    print_support_matrix(as_json=as_json)
