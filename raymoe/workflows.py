"""`merge_and_push`: a merge and its push as one operation that can be resumed.

A merge that is to be pushed is checked against the Hub before it starts. Run again, it resumes where it stopped: in the
merge, or in the push if the output holds the finished merge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raymoe.config.model_refs import paths_in_label
from raymoe.console import say
from raymoe.errors import ProblemReport
from raymoe.planning.plan import MergePlan
from raymoe.publish.errors import PushFailed
from raymoe.publish.manifest import open_manifest
from raymoe.publish.push import push_published
from raymoe.publish.repository import PushTarget, open_repository, source_problem, target_problems
from raymoe.report.merge_description import MergeDescription
from raymoe.results import MergeResult, PushResult
from raymoe.runtime.coordinator import open_target, output_problems, run_merge
from raymoe.runtime.run_report import RunReport
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.kept_reads import KeptReads
from raymoe.storage.outputs.output_checks import find_complete_merge


def merge_and_push(
    plan: MergePlan,
    description: MergeDescription,
    output: str | Path,
    target: PushTarget,
    settings: RuntimeSettings,
    report: RunReport,
    on_merged: Callable[[MergeResult], None],
    kept: KeptReads | None = None,
) -> PushResult:
    """Merge, call `on_merged` (unless the output already held the finished merge), and publish. `kept` as in
    `run_merge`.

    Raises ProblemReport before the merge starts, with all problems that prevent the merge or the push.
    """
    out = open_target(output, settings)
    models = [name for source in plan.sources for name in paths_in_label(source.label)]
    of_source = source_problem(target, models)
    of_output = output_problems(plan, out, settings)
    if problems := [*target_problems(target), *((of_source,) if of_source else ()), *of_output]:
        raise ProblemReport(problems)
    quiet = settings.verbosity < 0
    if not settings.overwrite and find_complete_merge(plan, out) is not None:
        out.clean_up()
        manifest = open_manifest(output, target.repo, settings.storage)
        repository = open_repository(target, settings.hub, card=manifest.card)
        report.output, report.plan_digest, report.bytes_kept = out.location, plan.digest, manifest.nbytes
        report.was_complete = True
        if not quiet:
            say(f"{out.location} holds this merge, finished: going on with the push")
    else:
        repository = open_repository(target, settings.hub, card=description.card_head())
        on_merged(run_merge(plan, description, output, settings, report, kept))
        manifest = open_manifest(output, target.repo, settings.storage)
    if manifest.plan_digest != plan.digest:
        what = "another merge has replaced this one, and was not pushed"
        raise PushFailed(f"push to {target.repo}: {out.location}: {what}; the repository is unchanged")
    with report.phase("push"):
        return push_published(manifest, repository, quiet=quiet)
