"""How a run of a merge went: `result.json` at the output of a merge that came to its end, and what `raymoe merge
--result FILE` writes in its place, also of a run that failed.

Filled in by the coordinator as it goes, so that at any time it says how far the run came. Times and memory are kept out
of the output's own record, which is the same for every run of a merge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import raymoe
from raymoe.errors import Problem, ProblemReport, RaymoeError
from raymoe.objects.options import StorageOptions
from raymoe.objects.store import StoreCounters, open_store, process_counters
from raymoe.objects.urls import is_url, normalise
from raymoe.outgoing import json_text
from raymoe.report.display import say
from raymoe.runtime.memory import peak_rss_bytes
from raymoe.runtime.worker import Status
from raymoe.signals import before_the_end
from raymoe.storage.records import RESULT_NAME, json_object

__all__ = ["RunReport", "recorded"]

_FORMAT = 1


class RunReport:
    """Phases by name (seconds from the start; those of gates and shards overlap), what actors have done, how it ended.

    `actors_lost` counts deaths of actors that were up. `storage` is how a result that is an object is written.
    """

    def __init__(self) -> None:
        self._began = datetime.now(timezone.utc)
        self._started = time.monotonic()
        self._phases: dict[str, dict[str, float | None]] = {}
        self.storage = StorageOptions()
        self.output: str | None = None
        self.plan_digest: str | None = None
        self.planned_bytes_by_way: Mapping[str, int] = {}
        self.actors: Sequence[Status] = ()
        self.actors_lost = 0
        self.bytes_kept = 0
        self.was_complete = False  # an earlier run had finished the merge

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that is left unfinished where an exception ends it."""
        self.begin(name)
        yield
        self.end(name)

    def begin(self, *names: str) -> None:
        for name in names:
            self._phases[name] = {"start_s": self._seconds(), "end_s": None}

    def end(self, *names: str) -> None:
        """The end of phases; of those that have not begun, or have ended already, nothing changes."""
        for name in names:
            if name in self._phases and self._phases[name]["end_s"] is None:
                self._phases[name]["end_s"] = self._seconds()

    def plain(self, reason: str, error: BaseException | None) -> dict[str, Any]:
        """The file's content. `reason`: done, refused, failed or stopped."""
        counters = process_counters()
        return {
            "format": _FORMAT,
            "raymoe_version": raymoe.__version__,
            "output": self.output,
            "plan_digest": self.plan_digest,
            "exit_reason": reason,
            "was_complete": self.was_complete,
            "error": str(error) or None if error else None,
            "started_at": self._began.isoformat(timespec="seconds"),
            "seconds": self._seconds(),
            "phases": self._phases,
            "bytes": {
                "planned_by_way": dict(self.planned_bytes_by_way),
                "written_by_actors": sum(status.bytes_written for status in self.actors),
                "copied_by_store": sum(status.bytes_copied_by_store for status in self.actors),
                "kept_from_earlier_run": self.bytes_kept + sum(status.bytes_kept for status in self.actors),
            },
            "gate_tokens": sum(status.gate_tokens for status in self.actors),
            "retries": {"actors_lost": self.actors_lost, "store_requests": self._store_retries(counters)},
            "peak_memory_bytes": {
                "driver": peak_rss_bytes(),
                "actors": [status.peak_rss_bytes for status in self.actors],
                "gpus": [status.peak_gpu_bytes for status in self.actors if status.peak_gpu_bytes],
            },
        }

    def has_begun(self, phase: str) -> bool:
        return phase in self._phases

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._seconds()

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _store_retries(self, driver: StoreCounters) -> int:
        return driver.retries + sum(status.store_retries for status in self.actors)


@contextmanager
def recorded(place: str | None) -> Iterator[RunReport]:
    """A report that is written to a file or URL when the block ends, however it ends.

    `None`: to the output, if the merge is done; whose output it is otherwise is not known. What is there of the run
    that finished the merge is kept by a run that found nothing to do.
    """
    if place is not None:
        _check(place)
    report = RunReport()
    try:
        with before_the_end(lambda: _write(report, place, "stopped", KeyboardInterrupt())):
            yield report
    except BaseException as error:
        reason = "refused" if isinstance(error, ProblemReport) else "failed"
        is_stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        _write(report, place, "stopped" if is_stopped else reason, error)
        raise
    if place is None and report.output is not None:
        place = f"{report.output.rstrip('/')}/{RESULT_NAME}"
        if report.was_complete and not report.has_begun("push") and _is_there(report, place):
            return
    _write(report, place, "done", None)


def _check(place: str) -> None:
    """Raises ProblemReport where nothing could be written at the end."""
    if is_url(place):
        try:
            normalise(place)
        except ValueError as error:
            raise ProblemReport([Problem(where="--result", what=str(error))]) from None
        return
    path = Path(place)
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "this is a folder" if path.is_dir() else "there is no such folder"
        raise ProblemReport([Problem(where=f"--result {place}", what=what, remedy="name a file in a folder")])


def _is_there(report: RunReport, place: str) -> bool:
    """Whether the result of the run that finished this merge is at a place."""
    try:
        content = open_store(place, report.storage).read_all(place) if is_url(place) else Path(place).read_bytes()
    except (OSError, RaymoeError):
        return False
    there = json_object(content)
    return there.get("plan_digest") == report.plan_digest and there.get("exit_reason") == "done"


def _write(report: RunReport, place: str | None, reason: str, error: BaseException | None) -> None:
    """Without raising: how the merge itself ended matters more."""
    if place is None:
        return
    content = json_text(report.plain(reason, error), scrubbed=True) + "\n"
    try:
        if is_url(place):
            url = normalise(place)
            open_store(url, report.storage).put(url, content.encode())
        else:
            Path(place).write_text(content, encoding="utf-8")
    except (OSError, RaymoeError) as failure:
        say(f"warning: {place} could not be written: {failure}")
