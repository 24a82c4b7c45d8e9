"""The coordinator: runs a plan to a finished checkpoint.

    check the output -> begin the journal -> actors: gate rows, shards -> router shard -> small files -> index -> record

Nothing that a reader takes for a finished checkpoint exists before the index, which comes after all weights; the record
(`raymoe.json`) comes last. Whatever ends a merge early leaves the journal, and the same command goes on from there.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.config import MODES, MergeConfig
from raymoe.errors import Problem, ProblemReport
from raymoe.gates.router import conditioning_warning, random_rows
from raymoe.planning.types import GatePlan, MergePlan, Part, Router, Shard
from raymoe.report.card import model_card
from raymoe.report.record import merge_record
from raymoe.runtime.cluster import connected, expert_actors, slots_for
from raymoe.runtime.progress import Progress
from raymoe.runtime.schedule import run_jobs
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.resolve import fetch_file
from raymoe.sources.types import SourceFile
from raymoe.storage.journal import INDEX_NAME, RECORD_NAME, FileRecord, source_stamps
from raymoe.storage.local import LocalOutput, check_output, remove_checkpoint
from raymoe.storage.reader import SourceReader
from raymoe.storage.stream import RouterBytes, shard_chunks
from raymoe.storage.transform import NUMPY_DTYPES

__all__ = [
    "MergeResult",
    "output_problems",
    "random_gate_rows",
    "router_bytes",
    "run_merge",
    "side_file_name",
]

Rows = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What a finished merge was: files by name, warnings, and memory as the processes saw it (bytes)."""

    output: Path
    files: tuple[FileRecord, ...]
    warnings: tuple[str, ...]
    bytes_written: int
    bytes_kept: int
    peak_driver_bytes: int
    peak_actor_bytes: tuple[int, ...]
    peak_gpu_bytes: tuple[int, ...]
    seconds: float


def run_merge(plan: MergePlan, config: MergeConfig, output: Path, settings: RuntimeSettings) -> MergeResult:
    """Merge into `output`. Raises ProblemReport before anything is written, MergeFailed afterwards."""
    problems = output_problems(plan, output, settings)
    if problems:
        raise ProblemReport(problems)
    with connected(settings), _stop_on_sigterm():
        jobs = max(1, sum(1 for shard in plan.shards if shard.owner != "router"))
        reads_layers = MODES[plan.gates.mode].reads_layers
        slots = slots_for(settings, jobs=jobs, compute=reads_layers, quantise=plan.gates.quantise)
        target = LocalOutput(output)
        _begin(plan, target, settings)
        try:
            with Progress(plan, settings.verbosity) as progress:
                with expert_actors(slots, str(output.absolute()), settings) as actors:
                    outcome = run_jobs(plan, actors, _write, progress.watch(actors))
                    progress.final_look(actors)
                rows = outcome.rows | random_gate_rows(plan.gates)
                warnings = [*plan.warnings, *_gate_warnings(plan.gates, rows)]
                records = [*outcome.shard_results, *_write_router(plan, rows, target, settings)]
                files = _finish(plan, config, target, settings, records)
                result = progress.result(output, files, warnings)
        except BaseException:
            target.journal.clear_parts()
            target.journal.release()
            raise
        return result


def _write(actor: Any, shard: Shard) -> Any:
    return actor.write_shard.options(name=f"write {shard.file_name}").remote(shard)


def output_problems(plan: MergePlan, output: Path, settings: RuntimeSettings) -> list[Problem]:
    """Everything that keeps this plan from being written to `output`, found without writing."""
    bytes_needed = plan.totals.output_bytes
    problems = check_output(output, overwrite=settings.overwrite, digest=plan.digest, output_bytes=bytes_needed)
    problems += _source_overlap(plan, output)
    journal = LocalOutput(output).journal
    if not settings.overwrite and journal.digest() == plan.digest:
        changed = journal.changed_sources(source_stamps(_all_files(plan)))
        if changed:
            what = f"source files changed since the merge in this folder was interrupted: {', '.join(changed[:3])}"
            remedy = "use --overwrite to start again from the new files"
            problems.append(Problem(where=str(output), what=what, remedy=remedy))
    return problems


def _source_overlap(plan: MergePlan, output: Path) -> list[Problem]:
    target = output.resolve()
    for source in plan.sources:
        for file in source.files:
            if "://" not in file.location and Path(file.location).resolve().parent == target:
                what = f"the output is the folder of {source.owner}, which would be overwritten"
                return [Problem(where=str(output), what=what, remedy="choose another output")]
    return []


def _all_files(plan: MergePlan) -> list[SourceFile]:
    return [file for source in plan.sources for file in source.files]


def _begin(plan: MergePlan, target: LocalOutput, settings: RuntimeSettings) -> None:
    try:
        target.root.mkdir(parents=True, exist_ok=True)
        if settings.overwrite and target.journal.digest() != plan.digest:
            remove_checkpoint(target.root)
        target.journal.begin(plan.digest, source_stamps(_all_files(plan)))
    except OSError as error:
        what = f"can't be written to: {error.strerror or error}"
        raise ProblemReport([Problem(where=str(target.root), what=what, remedy="choose another output")]) from error


def random_gate_rows(gates: GatePlan) -> Rows:
    """Rows of the experts that have no prompts to read, in the modes that draw them."""
    if MODES[gates.mode].needs_prompts:
        return {}
    members = (*gates.experts, *gates.shared)
    return {p.owner: random_rows(gates.mode, gates.seed, p.owner, gates.layers, gates.hidden) for p in members}


def router_rows(gates: GatePlan, rows: Rows, what: Router) -> npt.NDArray[np.float32]:
    """One layer's router, (experts, hidden), or the gate of its shared expert, (shared, hidden)."""
    members = gates.shared if what.shared else gates.experts
    return np.stack([rows[member.owner][what.layer] for member in members])


def _gate_warnings(gates: GatePlan, rows: Rows) -> Iterator[str]:
    if MODES[gates.mode].needs_prompts and (
        warning := conditioning_warning([rows[member.owner] for member in gates.experts])
    ):
        yield warning


def router_bytes(gates: GatePlan, rows: Rows) -> RouterBytes:
    """A function that gives the bytes of any router part of the plan."""

    def part_bytes(part: Part, what: Router) -> bytes:
        values: Any = router_rows(gates, rows, what).astype(NUMPY_DTYPES[part.dtype])
        assert values.shape == part.shape
        return bytes(values.tobytes())

    return part_bytes


def _write_router(plan: MergePlan, rows: Rows, target: LocalOutput, settings: RuntimeSettings) -> Iterator[FileRecord]:
    with SourceReader(settings.hub) as reader:
        for shard in plan.shards:
            if shard.owner == "router":
                yield target.write(shard.file_name, shard_chunks(shard, reader, router_bytes(plan.gates, rows)))


def side_file_name(file: SourceFile) -> str:
    """Name of a side file in the output; `chat_templates/` is the one subfolder that side files can be in."""
    folder = file.location.rsplit("/", 2)[-2]
    return f"{folder}/{file.name}" if folder == "chat_templates" else file.name


def _finish(
    plan: MergePlan,
    config: MergeConfig,
    target: LocalOutput,
    settings: RuntimeSettings,
    records: Sequence[FileRecord],
) -> tuple[FileRecord, ...]:
    """Small files, the index, the record; then the journal goes."""
    records = list(records)
    for file in plan.side_files:
        name = side_file_name(file)
        records.append(target.write(name, [fetch_file(file, settings.hub).read_bytes()]))
    records.append(target.write("config.json", [_json(plan.config)]))
    records.append(target.write("README.md", [model_card(plan, config).encode()]))
    records.append(target.write(INDEX_NAME, [_json(plan.index)]))
    files = tuple(sorted(records, key=lambda record: record.name))
    target.write(RECORD_NAME, [_json(merge_record(plan, config, files))])
    target.journal.end()
    return files


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM (a stopped job) ends a merge as Ctrl-C does. Ray sets its own handler at init, before this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
