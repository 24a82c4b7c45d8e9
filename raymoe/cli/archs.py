"""`raymoe archs`."""

from __future__ import annotations

from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable


@app.command(short_help="List which dense models become which MoE architectures.")
@stoppable()
def archs(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List which dense models become which MoE architectures, and why others do not."""
    from raymoe.report.support_table import print_support_matrix

    print_support_matrix(as_json=as_json)
