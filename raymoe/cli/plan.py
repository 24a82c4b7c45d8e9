"""`raymoe plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.option_groups import expand_groups
from raymoe.cli.shared_options import ConfigPath, PlanArgs, TransformersCache

if TYPE_CHECKING:
    from pathlib import Path

    from raymoe.config import MergeConfig
    from raymoe.errors import Problem
    from raymoe.planning.plan import MergePlan
    from raymoe.report.plan_report import PlannedOutput
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.hub import HubOptions


@app.command()
@stoppable()
@expand_groups
def plan(
    config: ConfigPath,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="Output location: also shows the transfer method of each byte."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    *,
    args: PlanArgs,
    transformers_cache: TransformersCache = None,
) -> None:
    """Show what a merge would do: reads configs and file headers only.

    With OUT, also checks that OUT can be written, and fails as `merge` would. In a bucket, the check writes a small
    object below OUT and deletes it.
    """
    from raymoe.config import config_warnings, load_config, storage_note
    from raymoe.console import say
    from raymoe.planning.plan_merge import plan_merge
    from raymoe.sources.hub import HubOptions

    options = args.merge_options()
    merge_config = load_config(config, allow_all_same=args.all_same)
    for warning in config_warnings(merge_config):
        say(f"warning: {warning}")
    if note := storage_note(merge_config.storage):
        say(f"note: {note}")
    hub = HubOptions(cache_dir=transformers_cache)
    merge_plan = plan_merge(merge_config, options, hub=hub, allow_all_same=args.all_same)
    show_plan(merge_plan, merge_config, config, output, hub, as_json=as_json)


def show_plan(
    plan: MergePlan, config: MergeConfig, file: Path | None, output: str | None, hub: HubOptions, *, as_json: bool
) -> None:
    """Print a plan, and what a merge would find in its output location. Ends the command if it can't be written.

    `file` is the config's file; None if it has none.
    """
    from raymoe.errors import ProblemReport
    from raymoe.report.plan_report import print_plan
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.storage.locations import input_paths

    settings = RuntimeSettings(hub=hub, storage=config.storage, inputs=input_paths(config, file))
    planned = _planned_output(plan, output, settings)
    print_plan(plan, planned, hub, as_json=as_json)
    if planned is not None and planned.problems:
        raise typer.Exit(ProblemReport.exit_code)


def _planned_output(plan: MergePlan, output: str | None, settings: RuntimeSettings) -> PlannedOutput | None:
    if output is None:
        return None
    from raymoe.report.plan_report import PlannedOutput
    from raymoe.runtime.coordinator import output_problems
    from raymoe.storage.outputs.open_output import open_output, writable_location
    from raymoe.storage.outputs.output_checks import find_complete_merge, write_problems
    from raymoe.storage.transfer_summary import bytes_by_method

    target = open_output(writable_location(output, "OUT"), settings.storage)
    problems: Sequence[Problem] = output_problems(plan, target, settings)
    is_complete = not problems and find_complete_merge(plan, target) is not None
    if not is_complete:
        problems = problems or write_problems(target, settings.storage)
    return PlannedOutput(
        location=target.location,
        bytes_by_method=bytes_by_method(plan, target),
        problems=tuple(map(str, problems)),
        is_resumable=not problems and not is_complete and target.digest() == plan.digest,
        is_complete=is_complete,
    )
