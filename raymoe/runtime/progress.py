"""What a person sees of a running merge: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raymoe.config import MODES
from raymoe.planning.types import MergePlan
from raymoe.runtime.schedule import Outcome
from raymoe.runtime.worker import Status
from raymoe.storage.records import FileRecord
from raymoe.text import human_bytes

if TYPE_CHECKING:
    from raymoe.runtime.merge import MergeResult

__all__ = ["Progress"]

_LINE_EVERY_S = 5.0
_LOOK_EVERY_S = 0.5


class Progress:
    """Asks the actors how far they are, now and then, and shows it. A context manager."""

    def __init__(self, plan: MergePlan, verbosity: int, done_to_bytes: str = "written") -> None:
        self._plan, self._quiet, self._verb = plan, verbosity < 0, done_to_bytes
        self._started = self._last_line = self._last_look = time.monotonic()
        self._total = sum(shard.nbytes for shard in plan.shards if shard.owner != "router")
        self._gates = [p for p in (*plan.gates.experts, *plan.gates.shared) if p.positive]
        self._latest: dict[int, Status] = {}
        self._kept = 0
        self._asked: dict[Any, int] = {}
        self._actors = 0
        self._live: Any = None
        # A dumb terminal or a log gets lines; a person gets one line that moves.
        self._on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Progress:
        if self._on_terminal and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, actors: Sequence[Any]) -> Callable[[Outcome], None]:
        """A function that looks at the actors and shows what they are at; cheap enough to call often."""
        self._actors = len(actors)

        def tick(outcome: Outcome) -> None:
            import ray

            now = time.monotonic()
            if now - self._last_look >= _LOOK_EVERY_S and not self._asked:
                self._last_look = now
                up = [(number, actor) for number, actor in enumerate(actors) if actor not in outcome.away]
                self._asked = {actor.status.remote(): number for number, actor in up}
            for ref in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else ():
                number = self._asked.pop(ref)
                try:
                    self._latest[number] = ray.get(ref)
                except ray.exceptions.RayError:
                    continue  # the actor is being restarted; its work is what is waited for, not its words
            self._show(outcome)

        return tick

    def final_look(self, actors: Sequence[Any], outcome: Outcome) -> None:
        """The actors' last words, before they are let go."""
        import ray

        self._kept = outcome.bytes_kept

        for number, actor in enumerate(actors):
            if actor in outcome.away:
                continue
            try:
                self._latest[number] = ray.get(actor.status.remote(), timeout=10)
            except ray.exceptions.RayError:
                continue

    def result(self, output: str, files: tuple[FileRecord, ...], warnings: Sequence[str]) -> MergeResult:
        from raymoe.runtime.merge import MergeResult

        last = [self._latest[number] for number in sorted(self._latest)]
        return MergeResult(
            output=output,
            files=files,
            warnings=tuple(warnings),
            bytes_written=sum(status.bytes_written for status in last),
            bytes_copied_by_store=sum(status.bytes_copied_by_store for status in last),
            bytes_kept=sum(status.bytes_kept for status in last) + self._kept,
            peak_driver_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            peak_actor_bytes=tuple(status.peak_rss_bytes for status in last),
            peak_gpu_bytes=tuple(status.peak_gpu_bytes for status in last),
            seconds=time.monotonic() - self._started,
        )

    def _show(self, outcome: Outcome) -> None:
        if self._quiet:
            return
        if self._live is not None:
            self._live.update(self._table(outcome))
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            print(self._line(outcome), file=sys.stderr, flush=True)

    def _line(self, outcome: Outcome) -> str:
        elapsed = time.monotonic() - self._started
        moved = sum(status.bytes_written + status.bytes_copied_by_store for status in self._latest.values())
        kept = sum(status.bytes_kept for status in self._latest.values()) + outcome.bytes_kept
        done = (moved + kept) / max(1, self._total)
        parts = [
            f"{elapsed:5.0f} s",
            f"{self._verb} {human_bytes(moved + kept)} of {human_bytes(self._total)} ({done:.0%})",
        ]
        if moved + kept < self._total:
            parts.append(f"{human_bytes(moved / max(elapsed, 1e-9))}/s")
        if MODES[self._plan.gates.mode].needs_prompts:
            parts.append(f"gates {len(outcome.rows)} of {len(self._gates)} experts")
        if outcome.away:
            parts.append(f"waiting for {len(outcome.away)} of {self._actors} actors")
        return " | ".join(parts)

    def _table(self, outcome: Outcome) -> Any:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(self._line(outcome), style="bold")]
        for number, status in sorted(self._latest.items()):
            at = ", ".join(status.busy_with) or "waiting"
            tokens = f", {status.gate_tokens:,} token-layers" if status.gate_tokens else ""
            lines.append(Text(f"  actor {number}: {at} ({human_bytes(status.bytes_written)} {self._verb}{tokens})"))
        return Group(*lines)
