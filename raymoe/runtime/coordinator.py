"""The coordinator: runs a plan to a finished checkpoint.

    check the output -> begin the journal -> actors: gate rows, shards -> router shard -> small files -> index -> record

No file that marks a finished checkpoint exists before the index, which is written after all weights. The record
(`raymoe.json`) is written last. If a merge ends early, the journal stays, and the same command resumes from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from raymoe.compute import peak_rss_bytes
from raymoe.config.model_refs import short_name
from raymoe.console import say
from raymoe.errors import MergeFailed, Problem, ProblemReport, RaymoeError
from raymoe.formatting import short_list
from raymoe.gate_modes import MODES, better_mode
from raymoe.object_store.errors import StorageError
from raymoe.planning.owner import Owner, OwnerKind
from raymoe.planning.plan import GatePlan, MergePlan, Shard
from raymoe.results import MergeResult
from raymoe.routers.fit_memory import max_computed_at_once
from raymoe.routers.heldout_report import RouterSummary, router_warnings, summary_lines
from raymoe.routers.kept_rows import kept_row_problems
from raymoe.routers.router_matrices import RouterRows, router_bytes
from raymoe.routers.row_checks import conditioning_warning, zero_row_warnings
from raymoe.routers.tokenize import prompt_problems
from raymoe.runtime.actor_plan import Workload, locate_sources, plan_actors
from raymoe.runtime.actor_status import ActorInfo
from raymoe.runtime.connect import ray_connection
from raymoe.runtime.placement import owner_names
from raymoe.runtime.progress import Progress, merge_line
from raymoe.runtime.remote_folders import RayFolderResolver
from raymoe.runtime.run_on_actors import run_on_actors
from raymoe.runtime.run_report import RunReport
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_jobs import ShardMethod, task_name, tensors_read_for_shards
from raymoe.runtime.shard_transfer import SendToWriter
from raymoe.runtime.source_files import SourceFiles, SourcesChanged
from raymoe.safe_text import json_text
from raymoe.signals import sigterm_as_ctrl_c
from raymoe.sources.facts import SourceFile
from raymoe.sources.kept_reads import KeptReads
from raymoe.storage.file_names import CARD_NAME, FileRecord, FinishedMerge
from raymoe.storage.outputs.base import write_shard
from raymoe.storage.outputs.open_output import open_output, writable_location
from raymoe.storage.outputs.output_checks import (
    find_complete_merge,
    plan_output_problems,
    rewritten_sources,
    write_problems,
)
from raymoe.storage.outputs.protocol import Output, ShardJob
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transfer_summary import bytes_by_method


class Description(Protocol):
    """Texts about a merge, made by the caller of `run_merge`. `summary` holds the routers' scores on held-out
    prompts."""

    def card(self, summary: RouterSummary | None) -> str | None:
        """The model card; None if none is written."""

    def backbone_lines(self) -> Sequence[str]:
        """A description of the merge's backbone, printed at the end of a run."""

    def record(self, files: Sequence[FileRecord], summary: RouterSummary | None) -> Mapping[str, Any]:
        """The record of the merge; it lists all other files of the output."""


def run_merge(
    plan: MergePlan,
    description: Description,
    output: str | Path,
    settings: RuntimeSettings,
    report: RunReport | None = None,
    kept: KeptReads | None = None,
) -> MergeResult:
    """Merge into `output`, a folder or a URL. Raises ProblemReport before anything is written, else MergeFailed.

    If the output already holds this merge, finished, only the rest of its journal is removed. `description` gives the
    card and the record at the end. `report` collects times and results. `kept` is what planning has read, for the run
    that resumes this one if it is interrupted.
    """
    report = report or RunReport()
    target = open_target(output, settings)
    report.output, report.plan_digest = target.location, plan.digest
    report.planned_bytes_by_method = bytes_by_method(plan, target)
    with target.one_look():
        problems = output_problems(plan, target, settings)
        finished = None if problems else _finished_before(plan, target, settings)
    if finished is not None:
        return _already_complete(plan, target, finished, settings, report)
    problems = problems or write_problems(target, settings.storage)
    for prompts in plan.prompt_plans:
        problems += prompt_problems(
            prompts, trust_remote_code=settings.trust_remote_code, hub=settings.hub, storage=settings.storage
        )
    problems += kept_row_problems(plan.gates)
    if problems:
        raise ProblemReport(list(dict.fromkeys(problems)))
    if settings.verbosity >= 0:
        say(merge_line(plan, target.location.text))
        for warning in plan.engine_warnings:
            say(f"warning: {warning}")
    settings = replace(settings, strict=plan.options.strict)
    report.begin("start of Ray")
    with ray_connection(settings), sigterm_as_ctrl_c():  # again: Ray has set a handler of its own
        placement = locate_sources(plan)
        work = WriteShards(target, owner_names(plan), strict=plan.options.strict)
        actor_plan = plan_actors(settings, _workload(plan, target, work), placement)
        sources = SourceFiles(plan, placement)
        try:
            if (finished := _begin(plan, target, settings, sources)) is not None:
                return _already_complete(plan, target, finished, settings, report)
            if kept is not None:
                target.keep_reads(kept.content())
            with (
                _problems_as_failure(),
                _invalidate_on_source_change(target),
                Progress(plan, settings.verbosity, report=report) as progress,
            ):
                with sources.explain_failures():
                    outcome = run_on_actors(
                        plan, work, actor_plan, progress, settings, output=target.location, run=target.run
                    )
                sources.check_unchanged()
                names = _expert_names(plan)
                said_before = settings.verbosity >= 0  # a merge for another engine would not have been started
                warnings = [*plan.warnings, *(() if said_before else plan.engine_warnings)]
                warnings += _gate_warnings(plan.gates, outcome.rows, outcome.summary, names)
                records = [*outcome.shard_results, *_write_router(plan, outcome.rows, target, settings)]
                files = _write_small_files(plan, description, target, settings, records, outcome.summary)
                lines = summary_lines(outcome.summary, names) if outcome.summary else ()
                result = progress.result(target.location.text, files, warnings)
                return replace(result, backbone_lines=tuple(description.backbone_lines()), router_lines=tuple(lines))
        finally:
            target.release(keep_uploads=settings.keep_uploads)


def _workload(plan: MergePlan, target: Output, work: WriteShards) -> Workload:
    # With --strict, actors also read what the store copies.
    copies = [0 if plan.options.strict else target.copied_parts(shard) for shard in plan.worker_shards]
    return Workload(
        jobs=max(copies.count(0), *(len(prompts.prompted) for prompts in plan.prompt_plans)),
        copies=sum(copies),
        runs_model=plan.runs_model,
        quantize=plan.gates.quantize,
        experts=len(plan.gates.experts),
        reads_folders=any(file.kind.is_local for source in plan.sources for file in source.files),
        prefer_driver_node=target.location.kind.is_local,
        shares_reads=plan.runs_model and bool(tensors_read_for_shards(plan, work.reads)),
        max_layers_at_once=max_computed_at_once(plan),
    )


def _finished_before(plan: MergePlan, target: Output, settings: RuntimeSettings) -> FinishedMerge | None:
    """The finished merge, if an earlier run has completed the one that is requested."""
    return None if settings.overwrite else find_complete_merge(plan, target)


def _already_complete(
    plan: MergePlan, target: Output, finished: FinishedMerge, settings: RuntimeSettings, report: RunReport
) -> MergeResult:
    target.clean_up()
    report.was_complete, report.bytes_kept = True, finished.nbytes
    if settings.verbosity >= 0:
        say(f"{target.location} is already complete: an earlier run has finished this merge")
    warnings = [*plan.warnings, *plan.engine_warnings, *_rewritten_warnings(plan, target, finished)]
    return MergeResult(
        output=target.location.text,
        model_type=plan.config["model_type"],
        files=finished.files,
        warnings=tuple(warnings),
        bytes_written=0,
        bytes_copied_by_store=0,
        bytes_kept=finished.nbytes,
        peak_driver_bytes=peak_rss_bytes(),
        peak_actor_bytes=(),
        peak_gpu_bytes=(),
        seconds=0.0,
        run_seconds=report.seconds,
        was_complete=True,
    )


def _rewritten_warnings(plan: MergePlan, target: Output, finished: FinishedMerge) -> Iterator[str]:
    if names := rewritten_sources(plan, target.location, finished):
        yield (
            f"sources were written after the merge was finished: {short_list(names, most=3)}. Their sizes and samples "
            "are "
            "the same, but a small change would not show in them: `raymoe verify` compares every byte"
        )


@contextmanager
def _problems_as_failure() -> Iterator[None]:
    """Turn a ProblemReport about prompts into MergeFailed: prompts are read late, when shards may have been written."""
    try:
        yield
    except ProblemReport as report:
        raise MergeFailed(str(report)) from report


@contextmanager
def _invalidate_on_source_change(target: Output) -> Iterator[None]:
    """If sources changed, make the next run start again (with --overwrite), even if the old files are restored."""
    try:
        yield
    except SourcesChanged:
        with suppress(RaymoeError, OSError):  # another run owns the output, or it can't be reached
            target.invalidate()
        raise


def open_target(output: str | Path, settings: RuntimeSettings) -> Output:
    """The output that a user names. Raises ProblemReport if no output can be there."""
    return open_output(writable_location(output, "output"), settings.storage)


class _WriteDirectly(ShardMethod):
    """An actor writes to the output itself."""

    def __init__(self, names: Mapping[Owner, str], *, must_see_output: bool, strict: bool) -> None:
        """`must_see_output`: the output is a folder that some nodes do not have. `strict`: as for `WriteShards`."""
        self._names, self._must_see_output, self._strict = names, must_see_output, strict

    def can_use(self, actor: ActorInfo) -> bool:
        return actor["output_visible"] or not self._must_see_output

    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        return actor.write_shard.options(name=task_name("write", job, self._names)).remote(
            job.slim(scans_copies=self._strict)
        )


class WriteShards:
    """The shard work of a merge, for `run_on_actors`: jobs of the output, done by actors, completed here."""

    def __init__(self, target: Output, names: Mapping[Owner, str], *, strict: bool) -> None:
        """`names` are the shard owners' names in Ray's dashboard. `strict`: actors also read what a store copies."""
        self._target = target
        if not target.location.kind.is_local:  # every node sees it
            self.methods: tuple[ShardMethod, ...] = (_WriteDirectly(names, must_see_output=False, strict=strict),)
        else:
            self.methods = (
                _WriteDirectly(names, must_see_output=True, strict=strict),
                SendToWriter(target, names),
            )

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return self._target.jobs(shard)

    def reads(self, file: SourceFile) -> bool:
        return not self._target.same_store(file)

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord | ShardJob:
        return self._target.complete(shard, results)


def output_problems(
    plan: MergePlan, target: Output, settings: RuntimeSettings, sources: SourceFiles | None = None
) -> list[Problem]:
    """Everything that keeps this plan from being written to `target`, found without writing.

    `sources` as all nodes see them, if they were queried.
    """
    sources = sources or SourceFiles(plan, None)
    problems = plan_output_problems(plan, target, overwrite=settings.overwrite, inputs=settings.inputs)
    if changed := sources.changed():
        what = f"files were written after the merge was planned with them: {short_list(changed, most=3)}"
        remedy = "run the same command again when they no longer change"
        problems.append(Problem(where="sources", what=what, remedy=remedy))
    if not problems and not settings.overwrite and target.digest() == plan.digest:
        changed = target.changed_sources(sources.fingerprints())
        if changed:
            what = f"source files changed since the merge in this folder was interrupted: {', '.join(changed[:3])}"
            remedy = "use --overwrite to start again from the new files"
            problems.append(Problem(where=target.location.text, what=what, remedy=remedy))
    return problems


def _begin(plan: MergePlan, target: Output, settings: RuntimeSettings, sources: SourceFiles) -> FinishedMerge | None:
    """Begin the run. Returns the finished merge if another run has finished it since the first check."""
    target.lock()
    with target.one_look():
        # Another merge may have started and ended since the first check; from here on no other run is active.
        if problems := output_problems(plan, target, settings, sources):
            raise ProblemReport(problems)
        if (finished := _finished_before(plan, target, settings)) is not None:
            return finished
        without = replace(settings, overwrite=False)
        is_unfinished = target.digest() == plan.digest and target.finished_merge() is None
        # --overwrite resumes in the same cases as the command without it; in all others it replaces what is there.
        goes_on = is_unfinished and not (settings.overwrite and output_problems(plan, target, without, sources))
    try:
        target.begin(plan.digest, sources.fingerprints(), fresh=settings.overwrite and not goes_on)
    except StorageError:
        raise
    except ProblemReport:
        # Another run of this merge may have ended since the check.
        finished = (
            None if output_problems(plan, target, settings, sources) else _finished_before(plan, target, settings)
        )
        if finished is None:
            raise
        return finished
    return None


def _expert_names(plan: MergePlan) -> list[str]:
    experts = [source for source in plan.sources if source.owner.kind is OwnerKind.EXPERT]
    return [f"{source.owner} ({short_name(source.label, source.adapter)})" for source in experts]


def _gate_warnings(
    gates: GatePlan, rows: RouterRows, summary: RouterSummary | None, names: Sequence[str]
) -> Iterator[str]:
    mode = MODES[gates.mode]
    judged = [rows[member.owner] for member in gates.experts] if mode.has_directions and gates.kept is None else []
    if judged:
        if warning := conditioning_warning(judged, names):
            yield warning
        yield from zero_row_warnings(judged, names)
    if summary is not None:
        yield from router_warnings(summary, names, better=better_mode(mode))


def _write_router(plan: MergePlan, rows: RouterRows, target: Output, settings: RuntimeSettings) -> Iterator[FileRecord]:
    """Write the router's shards in the driver: router rows are here already, and they are small."""
    with SourceReader(settings.hub, settings.storage) as reader:
        router = router_bytes(plan.gates, rows, reader)
        for shard in plan.router_shards:
            yield write_shard(target, shard, lambda job: target.do(job, reader, lambda sent, copied: None, router))


def _write_small_files(
    plan: MergePlan,
    description: Description,
    target: Output,
    settings: RuntimeSettings,
    records: Sequence[FileRecord],
    summary: RouterSummary | None,
) -> tuple[FileRecord, ...]:
    """Write the small files, the index and the record; then remove the journal."""
    records = list(records)
    for side in plan.side_files:
        records.append(target.write_small(side.name, RayFolderResolver(settings).read(side.file)))
    records.append(target.write_small("config.json", _to_json(plan.config)))
    if (card := description.card(summary)) is not None:
        records.append(target.write_small(CARD_NAME, card.encode()))
    records.append(target.write_index(_to_json(plan.index)))
    files = tuple(sorted(records, key=lambda record: record.name))
    target.end(_to_json(description.record(files, summary)))
    return files


def _to_json(content: Any) -> bytes:
    return f"{json_text(content)}\n".encode()
