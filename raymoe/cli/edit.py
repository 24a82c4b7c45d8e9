"""`raymoe edit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.merge import RunArgs
from raymoe.cli.option_groups import expand_groups
from raymoe.cli.shared_options import TrustRecord, set_log_level

if TYPE_CHECKING:
    from raymoe.editing import Translation


@app.command(short_help="Add, remove or replace experts of a mixture.")
@stoppable("an edit that had begun goes on from here when its command is run again")
@expand_groups
def edit(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The mixture: a folder, a URL or a Hub id.")],
    output: Annotated[str, typer.Argument(metavar="NEW", help="Folder or s3://bucket/prefix for the edited mixture.")],
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="MODEL", help="A model to add as an expert; can be repeated.")
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="NUMBERS", help="Experts to drop, from 0: 3 or 1,3; can be repeated."),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option("--replace", metavar="NUMBER=MODEL", help="A model in place of an expert; can be repeated."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts of the added models, in their order. NUMBER=FILE: of an expert of OLD. Can be repeated.",
        ),
    ] = None,
    keep_routers: Annotated[
        bool,
        typer.Option("--keep-routers", help="Experts that stay keep their router rows. Default: all are computed."),
    ] = False,
    keep_backbone: Annotated[
        bool, typer.Option("--keep-backbone", help="Keep OLD's backbone, also if it was merged from its experts.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The dense base model. Default: that of OLD's record.")
    ] = None,
    gate_mode: Annotated[str | None, typer.Option("--gate-mode", help="Default: that of OLD's record.")] = None,
    experts_per_token: Annotated[
        int | None, typer.Option("--experts-per-token", help="Experts for a token. Default: as in OLD.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what the edit would do, as raymoe plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
    trust_record: TrustRecord = False,
    *,
    args: RunArgs,
) -> None:
    """Make another mixture of OLD in NEW: with experts added, removed or replaced. OLD is not changed.

    NEW is, byte for byte, the merge that would have made it of the sources. Experts that stay are copied from OLD. Run
    the same command again to resume an interrupted edit.
    """
    from raymoe import api
    from raymoe.console import say
    from raymoe.errors import Problem, ProblemReport
    from raymoe.report.plan_report import print_result
    from raymoe.runtime.run_report import record_run

    if as_json and not dry_run:
        what = "it shows a plan, and without --dry-run the edit is done"
        raise ProblemReport([Problem(where="--json", what=what, remedy="give --dry-run too, or leave out --json")])
    set_log_level(args.verbose)
    settings = args.settings()
    changes: dict[str, Any] = {
        "add": add or (),
        "remove": remove or (),
        "replace": replace or (),
        "prompts": prompts or (),
        "keep_routers": keep_routers,
        "keep_backbone": keep_backbone,
        "base_model": base_model,
        "gate_mode": gate_mode,
        "experts_per_token": experts_per_token,
    }

    def tell(translation: Translation) -> None:
        for note in translation.notes:
            say(f"note: {note}")
        if not args.quiet and not as_json:
            say(f"edit of {translation.edit.mixture}: {'; '.join(translation.edit.lines())}")

    if dry_run:
        from raymoe.cli.plan import show_plan
        from raymoe.editing import make_request, plan_translation, translate_edit

        translation = translate_edit(old, make_request(**changes), settings.hub, trust_record=trust_record)
        tell(translation)
        plan = plan_translation(translation, settings.hub)
        show_plan(plan, translation.config, None, output, settings.hub, as_json=as_json)
        return
    with record_run(args.result, output) as report:
        merged = api.edit(
            old,
            output,
            **changes,
            trust_record=trust_record,
            write_model_card=args.write_model_card,
            settings=settings,
            report=report,
            on_translated=tell,
        )
    for warning in merged.warnings:
        say(f"warning: {warning}")
    if not args.quiet:
        from raymoe.export.gguf.llama_cpp_archs import MIXTURES

        print_result(merged, has_gguf=merged.model_type in MIXTURES, is_pushed=False)
