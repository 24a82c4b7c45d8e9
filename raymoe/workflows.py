"""Operations that join several packages: a merge with its push, and taking an expert out of a mixture.

A merge that is to be pushed is checked against the Hub before it starts. Run again, it resumes where it stopped: in the
merge, or in the push if the output holds the finished merge. An extraction is planned here and run as a merge is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from raymoe.config.model_refs import SHARED_EXPERT, ModelRef, paths_in_label
from raymoe.console import say
from raymoe.errors import Problem, ProblemReport
from raymoe.planning.compatibility import load_spec
from raymoe.planning.extract import plan_extraction
from raymoe.planning.plan import MergeOptions, MergePlan
from raymoe.planning.plan_merge import with_side_files
from raymoe.publish.errors import PushFailed
from raymoe.publish.manifest import open_manifest
from raymoe.publish.push import push_published
from raymoe.publish.repository import PushTarget, open_repository, source_problem, target_problems
from raymoe.report.extraction_description import ExtractionDescription
from raymoe.report.merge_description import MergeDescription
from raymoe.results import MergeResult, PushResult
from raymoe.runtime.coordinator import open_target, output_problems, run_merge
from raymoe.runtime.remote_folders import RayFolderResolver
from raymoe.runtime.run_report import RunReport
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.facts import ModelFacts, TensorEntry
from raymoe.sources.kept_reads import KeptReads
from raymoe.sources.resolve import resolve_models
from raymoe.storage.outputs.output_checks import find_complete_merge
from raymoe.storage.same_values import has_value
from raymoe.storage.source_reader import SourceReader


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


def extract_expert(
    ref: ModelRef,
    output: str | Path,
    options: MergeOptions,
    settings: RuntimeSettings,
    report: RunReport,
    *,
    without_shared: bool = False,
) -> MergeResult:
    """Write one expert of a mixture as a dense model. `ref` names the expert.

    A shared expert of zeros, which merges have, is left out. Another one is added to the expert's FFN, unless
    `without_shared`. Raises ProblemReport before anything is written, else MergeFailed.
    """
    with report.phase("plan"):
        plan = _plan_extraction(ref, options, settings, without_shared=without_shared)
    description = ExtractionDescription(plan=plan, hub=settings.hub, storage=settings.storage)
    return run_merge(plan, description, output, settings, report)


def _plan_extraction(
    ref: ModelRef, options: MergeOptions, settings: RuntimeSettings, *, without_shared: bool
) -> MergePlan:
    remote = RayFolderResolver(settings)
    facts = resolve_models([ref], settings.hub, settings.storage, remote)[ref]
    shared = None
    if facts.mixture is not None and facts.mixture.has_shared and ref.expert != SHARED_EXPERT and not without_shared:
        of_shared = replace(ref, expert=SHARED_EXPERT)
        shared = resolve_models([of_shared], settings.hub, settings.storage, remote)[of_shared]
    with SourceReader(settings.hub, settings.storage) as reader:
        _check_fixed_tensors(facts, reader)
        if shared is not None and all(has_value(reader, entry, 0.0) for entry in _down_matrices(shared)):
            shared = None
    with remote.connection(side.file for side in facts.side_files):
        facts = with_side_files(facts, cache(remote.read))
    return plan_extraction(facts, shared, options)


def _down_matrices(facts: ModelFacts) -> list[TensorEntry]:
    spec, _ = load_spec(facts, "mixture")
    rows = spec.tensors() if spec is not None else ()
    return [facts.index.tensors[name] for row, _, name in rows if row.role == "ffn.down"]


def _check_fixed_tensors(facts: ModelFacts, reader: SourceReader) -> None:
    """Raises ProblemReport if the mixture has more between its experts and the residual stream than a merge has."""
    mixture = facts.mixture
    for entry, value in mixture.fixed if mixture is not None else ():
        if not has_value(reader, entry, value):
            what = (
                f"{entry.name} is not {value:g} everywhere, as in mixtures that raymoe writes: with it, no dense model "
                "computes what the mixture does if every token goes to one expert"
            )
            remedy = "use the expert's FFNs in a merge instead (expert: N beside source_model)"
            raise ProblemReport([Problem(where=facts.label, what=what, remedy=remedy)])
