"""The progress display of a merge: a live line on a terminal, a plain line every few seconds elsewhere.

With -v each finished step is printed too; `scripts/bench.py` takes a merge's phases from these lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from raymoe.compute import peak_rss_bytes
from raymoe.formatting import human_bytes, human_rate, plural
from raymoe.gate_modes import MODES
from raymoe.planning.plan import MergePlan
from raymoe.progress_line import LiveDisplay, Pace
from raymoe.results import MergeResult
from raymoe.runtime.actor_status import Status
from raymoe.runtime.ray_metrics import MergeMetrics
from raymoe.runtime.run_report import RunReport
from raymoe.runtime.scheduler import Outcome
from raymoe.runtime.timeouts import FINAL_STATUS_TIMEOUT_S
from raymoe.storage.file_names import FileRecord

_MAX_WARNINGS = 20


def merge_line(plan: MergePlan, output: str) -> str:
    """The first line of a merge: what it makes, and where."""
    size, shards = human_bytes(plan.totals.output_bytes), len(plan.shards)
    return (
        f"{plan.title}, {len(plan.gates.experts)} experts: {size} in {shards} shards to {output}"
        if plan.gates.experts
        else f"{plan.title}: {size} in {shards} {plural('shard', shards)} to {output}"
    )


class Progress:
    """Shows the actors' progress. A context manager."""

    def __init__(
        self,
        plan: MergePlan,
        verbosity: int,
        done_to_bytes: str = "written",
        report: RunReport | None = None,
        *,
        last_work: str = "writing routers, small files and the index",
    ) -> None:
        """`last_work` is what the driver does after the actors are done."""
        self._report = report or RunReport()
        self._metrics: MergeMetrics | None = None
        self._up: set[Any] = set()
        self._plan, self._verb = plan, done_to_bytes
        self._last_work = last_work
        self._display = LiveDisplay(quiet=verbosity < 0)
        self._steps_wanted, self._steps = verbosity > 0, set[str]()
        shards = plan.worker_shards
        self._shards, self._total = len(shards), sum(shard.nbytes for shard in shards)
        self._gates = plan.gates.prompted
        self._latest: dict[int, Status] = {}
        self._warnings: dict[str, None] = {}  # findings in weights, also those of actors that died since
        self._warnings_left_out: dict[int, int] = {}  # per actor: the largest number of tensors that it did not name
        self._shard_pace, self._reading_pace, self._router_pace = Pace(), Pace(), Pace()
        self._kept = 0
        self._actors = 0

    def __enter__(self) -> Progress:
        self._display.__enter__()
        self._display.show(lambda: f"{self._display.seconds:5.0f} s | starting actors")
        self._report.end("start of Ray")
        self._report.begin("start of actors")
        self._report_step("Ray is up")
        if self._report.output is not None:
            self._metrics = MergeMetrics(self._plan, self._report.output.text)
        return self

    def __exit__(self, *raised: object) -> None:
        self._report.actors, self._report.bytes_kept = self._statuses(), self._kept
        self._display.__exit__(*raised)

    def watch(self, actors: Sequence[Any]) -> Callable[[Outcome], None]:
        """A function that shows the actors' current work. It is cheap enough to call often."""
        self._actors = len(actors)
        self._report.end("start of actors")
        backbone = ["backbone"] if self._plan.moments is not None else []
        self._report.begin(*backbone, *(["gates"] if self._gates else []), "shards")
        self._report_step("actors are up")

        def tick(outcome: Outcome) -> None:
            self._latest = outcome.statuses
            self._account(actors, outcome)
            self._report_steps(outcome)
            self._display.show(lambda: self._line(outcome), self._actor_lines)

        return tick

    def _account(self, actors: Sequence[Any], outcome: Outcome) -> None:
        """Update the report and the metrics: what was done, and which actors were lost."""
        self._kept = outcome.bytes_kept
        up = {actor for actor in actors if actor not in outcome.unavailable}
        self._report.actors_lost += len(self._up - up)
        self._up = up
        for number, status in self._latest.items():
            self._warnings.update(dict.fromkeys(status.warnings))
            left_out = max(status.warnings_left_out, self._warnings_left_out.get(number, 0))
            self._warnings_left_out[number] = left_out
        if self._metrics is not None:
            self._metrics.record(self._latest.values(), outcome)

    def final_update(self, actors: Sequence[Any], outcome: Outcome) -> None:
        """Collect the actors' last statuses before they are ended."""
        import ray

        pending = {actor.status.remote(): number for number, actor in _up(actors, outcome)}
        for ref in (
            ray.wait(list(pending), num_returns=len(pending), timeout=FINAL_STATUS_TIMEOUT_S)[0] if pending else ()
        ):
            try:
                self._latest[pending[ref]] = ray.get(ref)
            except ray.exceptions.RayError:
                continue
        self._account(actors, outcome)
        self._report.begin("end")
        self._display.show(lambda: f"{self._display.seconds:5.0f} s | {self._last_work}")

    def _statuses(self) -> list[Status]:
        return [self._latest[number] for number in sorted(self._latest)]

    def result(self, output: str, files: tuple[FileRecord, ...], warnings: Sequence[str]) -> MergeResult:
        self._report_step("checkpoint is complete")
        self._report.end("end")
        last = self._statuses()
        return MergeResult(
            output=output,
            model_type=self._plan.config["model_type"],
            files=files,
            warnings=(*warnings, *self._weight_warnings()),
            bytes_written=sum(status.bytes_written for status in last),
            bytes_copied_by_store=sum(status.bytes_copied_by_store for status in last),
            bytes_kept=sum(status.bytes_kept for status in last) + self._kept,
            peak_driver_bytes=peak_rss_bytes(),
            peak_actor_bytes=tuple(status.peak_rss_bytes for status in last),
            peak_gpu_bytes=tuple(status.peak_gpu_bytes for status in last),
            seconds=self._display.seconds,
            run_seconds=self._report.seconds,
        )

    def _weight_warnings(self) -> list[str]:
        found = sorted(self._warnings)
        left_out = sum(self._warnings_left_out.values())
        count = max(0, len(found) - _MAX_WARNINGS) + left_out
        # A tensor without a name here may be counted twice, if two actors worked on it.
        about = "about " if left_out else ""
        more = [f"and {about}{count} more tensors like these"] if count else []
        return [*found[:_MAX_WARNINGS], *more]

    def _report_steps(self, outcome: Outcome) -> None:
        if self._plan.moments is not None and outcome.backbone_done:
            self._report.end("backbone")
            self._report_step("backbone is merged")
        if self._gates and outcome.gates_done:
            self._report.end("gates")
            self._report_step("gates are computed")
        if len(outcome.shard_results) == self._shards:
            self._report.end("shards")
            self._report_step(f"shards are {self._verb}")

    def _report_step(self, reached: str) -> None:
        if not self._steps_wanted or reached in self._steps:
            return
        self._steps.add(reached)
        self._display.say(f"{self._display.seconds:5.1f} s | {reached}")

    def _line(self, outcome: Outcome) -> str:
        elapsed = self._display.seconds
        moved = sum(status.bytes_written + status.bytes_copied_by_store for status in self._latest.values())
        kept = sum(status.bytes_kept for status in self._latest.values()) + outcome.bytes_kept
        left = max(0, self._total - moved - kept)
        shards = f"{self._verb} {human_bytes(moved + kept)}"
        # Headers are not compared, so bytes are left where all shards are done.
        if left and len(outcome.shard_results) < self._shards:
            pace = self._shard_pace.text(moved, left, elapsed, human_bytes)
            shards += f" of {human_bytes(self._total)} ({(moved + kept) / self._total:.0%}{pace})"
        parts = [f"{elapsed:5.0f} s", shards]
        if not outcome.backbone_done:
            parts.append(self._backbone_progress(outcome))
        elif self._plan.gates.needs_prompts:
            parts.append(self._router_progress(outcome))
        if outcome.unavailable:
            parts.append(f"waiting for {len(outcome.unavailable)} of {self._actors} actors")
        return " | ".join(parts)

    def _backbone_progress(self, outcome: Outcome) -> str:
        assert self._plan.moments is not None
        count = len(self._plan.moments.experts)
        if outcome.backbone_members_done < count:
            return f"backbone: prompts of {outcome.backbone_members_done} of {count} experts read"
        layers = sum(map(bool, self._plan.moments.matrices))
        return f"backbone: {outcome.backbone_layers_done} of {layers} layers merged"

    def _router_progress(self, outcome: Outcome) -> str:
        gates, count = self._plan.gates, len(self._gates)
        if not MODES[gates.mode].needs_forward_pass:
            return f"gates {outcome.members_done} of {count} experts"
        if outcome.members_done == count:
            return self._fitting_progress(outcome, time.monotonic())
        return self._reading_progress(outcome, time.monotonic())

    def _fitting_progress(self, outcome: Outcome, now: float) -> str:
        done, layers = outcome.layers_done, len(self._plan.gates.layers_with_router)
        pace = self._router_pace.text(done, layers - done, now, human_rate) if done < layers else ""
        return f"routers: {done / layers:.0%} computed ({done} of {layers} layers{pace})"

    def _reading_progress(self, outcome: Outcome, now: float) -> str:
        """How much of the prompts has been read, how fast, and how long the rest will take.

        The total is an estimate until all prompts have been started: only then are all tokens counted.
        """
        statuses = self._latest.values()
        passed = sum(status.gate_tokens for status in statuses)
        counted = sum(status.readings_counted for status in statuses)
        planned = sum(status.gate_tokens_planned for status in statuses)
        if not counted or not planned:
            return f"prompts of {len(self._gates)} experts: 0% read"
        total = max(passed, planned * max(outcome.readings, counted) // counted)
        text = f"prompts: {passed / total:.0%} read ({passed:,} of {'' if counted >= outcome.readings else 'about '}"
        text += f"{total:,} tokens x layers"
        # If an actor dies, its part is read again, so the count falls.
        return f"{text}{self._reading_pace.text(passed, total - passed, now)})"

    def _actor_lines(self) -> list[str]:
        lines = []
        for number, status in sorted(self._latest.items()):
            at = ", ".join(working.label for working in status.busy_with) or "waiting"
            planned = f", {status.gate_tokens:,} of {status.gate_tokens_planned:,} tokens x layers read"
            tokens = planned if status.gate_tokens_planned else ""
            lines.append(f"  actor {number}: {at} ({human_bytes(status.bytes_written)} {self._verb}{tokens})")
        return lines


def _up(actors: Sequence[Any], outcome: Outcome) -> list[tuple[int, Any]]:
    """Actors and helpers that are up, by number."""
    up = [(number, actor) for number, actor in enumerate(actors) if actor not in outcome.unavailable]
    return [*up, *outcome.helpers.items()]
