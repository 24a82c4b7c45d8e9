"""Reports how a run of a merge went: `result.json` in the output of a completed merge. `raymoe merge --result FILE`
writes it to FILE instead, also for a run that failed.

The coordinator fills it in step by step, so it always says how far the run came. Times and memory are not in the
output's own record, which is the same for every run of a merge.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from raymoe._version import __version__
from raymoe.compute import peak_rss_bytes
from raymoe.console import say
from raymoe.errors import Problem, ProblemReport, RaymoeError
from raymoe.object_store.errors import StorageError
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import StoreCounters
from raymoe.object_store.registry import open_store, process_counters
from raymoe.runtime.actor_status import Status
from raymoe.safe_text import json_text
from raymoe.signals import run_before_end
from raymoe.storage.atomic_file import is_special, write_atomic
from raymoe.storage.file_names import (
    JOURNAL,
    MAX_RESULT_BYTES,
    RESULT_NAME,
    is_result,
    is_written_by_a_merge,
    json_object,
)
from raymoe.storage.locations import is_in, is_same_place
from raymoe.storage.outputs.open_output import writable_location

_FORMAT = 1
_EXAMPLE = "name a file, or a URL such as s3://bucket/run.json"


class RunReport:
    """Phases by name (seconds from the start; those of gates and shards overlap), what actors have done, how it ended.

    `actors_lost` counts deaths of actors that were up. `result_location` is where the report is written, if not to the
    output; `storage` holds the options for writing it to an object store.
    """

    def __init__(self) -> None:
        self._began = datetime.now(timezone.utc)
        self._started = time.monotonic()
        self._phases: dict[str, dict[str, float | None]] = {}
        self.storage = StorageOptions()
        self.result_location: Location | None = None
        self.output: Location | None = None
        self.plan_digest: str | None = None
        self.planned_bytes_by_method: Mapping[str, int] = {}
        self.actors: Sequence[Status] = ()
        self.actors_lost = 0
        self.bytes_kept = 0
        self.was_complete = False  # an earlier run had finished the merge

    def check_result_location(self) -> None:
        """Raises ProblemReport if the report would replace something other than a result in an object store."""
        if (
            self.result_location is not None
            and self.result_location.kind.is_object
            and not _may_replace(self.result_location, self.storage)
        ):
            problem, self.result_location = _foreign_file_problem(self.result_location), None
            raise ProblemReport([problem])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase. It stays unfinished if an exception ends it."""
        self.begin(name)
        yield
        self.end(name)

    def begin(self, *names: str) -> None:
        for name in names:
            self._phases[name] = {"start_s": self._seconds(), "end_s": None}

    def end(self, *names: str) -> None:
        """End phases. Phases that have not begun, or have ended already, stay as they are."""
        for name in names:
            if name in self._phases and self._phases[name]["end_s"] is None:
                self._phases[name]["end_s"] = self._seconds()

    def plain(self, reason: str, error: BaseException | None) -> dict[str, Any]:
        """The file's content. `reason`: done, refused, failed or stopped."""
        counters = process_counters()
        return {
            "format": _FORMAT,
            "raymoe_version": __version__,
            "output": self.output.text if self.output else None,
            "plan_digest": self.plan_digest,
            "exit_reason": reason,
            "was_complete": self.was_complete,
            "error": str(error) or None if error else None,
            "started_at": self._began.isoformat(timespec="seconds"),
            "seconds": self._seconds(),
            "phases": self._phases,
            "bytes": {
                "planned_by_way": dict(self.planned_bytes_by_method),
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
        """Seconds since the run began."""
        return self._seconds()

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _store_retries(self, driver: StoreCounters) -> int:
        return driver.retries + sum(status.store_retries for status in self.actors)


@contextmanager
def record_run(place: str | None, output: str | Path | None = None) -> Iterator[RunReport]:
    """A report that is written to a file or URL when the block ends, whether or not it fails.

    `None`: write to the output if the merge is complete; otherwise the output may belong to another merge. A run that
    finds the merge already complete keeps the report of the run that completed it. `output` is the merge's output as
    the user names it. Raises ProblemReport if the report could not be written at the end, or would replace something
    else.
    """
    report = RunReport()
    if place is not None:
        report.result_location = writable_location(place, "--result", example=_EXAMPLE)
        _check(report.result_location, output)
    try:
        with run_before_end(lambda: _write(report, report.result_location, "stopped", KeyboardInterrupt())):
            yield report
    except BaseException as error:
        reason = "refused" if isinstance(error, ProblemReport) else "failed"
        is_stopped = isinstance(error, (KeyboardInterrupt, SystemExit))  # SystemExit: raised by Ray while it connects
        _write(report, report.result_location, "stopped" if is_stopped else reason, error)
        raise
    if place is not None or report.output is None:
        _write(report, report.result_location, "done", None)
        return
    own = report.output.join(RESULT_NAME)
    if not (report.was_complete and not report.has_begun("push") and _is_there(report, own)):
        _write(report, own, "done", None, is_own=True)


def _check(place: Location, output: str | Path | None) -> None:
    """Raises ProblemReport for problems that can be found without a request to an object store."""
    where = f"--result {place}"
    with suppress(ValueError):  # a bad output is refused later
        if output is not None and _is_of_merge(place, Location.parse(output)):
            what = "the merge writes a file of its own there"
            raise ProblemReport([Problem(where=where, what=what, remedy="name another file")])
    if place.kind.is_object:
        return
    path = Path(place.text)
    if path.is_dir() or not path.parent.is_dir():
        what = "this is a folder" if path.is_dir() else "there is no such folder"
        raise ProblemReport([Problem(where=where, what=what, remedy="name a file in a folder")])
    if not _may_replace(place, StorageOptions()):
        raise ProblemReport([_foreign_file_problem(place)])


def _is_there(report: RunReport, place: Location) -> bool:
    """Whether the result of the run that completed this merge is at a place."""
    if place.kind.is_local and is_special(Path(place.text)):  # reading a pipe could block forever
        return False
    try:
        content = _read(place, report.storage)
    except (OSError, RaymoeError):
        return False
    there = json_object(content)
    return there.get("plan_digest") == report.plan_digest and there.get("exit_reason") == "done"


def _read(place: Location, storage: StorageOptions) -> bytes:
    if place.kind.is_object:
        return open_store(place.text, storage).read_all(place.text)
    return Path(place.text).read_bytes()


def _is_of_merge(place: Location, output: Location) -> bool:
    folder, _, name = place.text.rpartition("/")
    is_inside = is_same_place(folder or "/", output.text) and name != RESULT_NAME
    return (is_inside and is_written_by_a_merge(name)) or is_in(place.text, output.join(JOURNAL).text)


def _may_replace(place: Location, storage: StorageOptions, *, is_own: bool = False) -> bool:
    """Whether nothing is lost if the file is replaced: it is missing, is empty, or is the result of a run.

    A write-only place in an object store may be written to; so may a pipe or a device. For the output's own report
    (`is_own`), which the user did not name and which a merge can read, StorageError is raised instead.
    """
    if place.kind.is_object:
        try:
            info = open_store(place.text, storage).stat(place.text)
            size = info.size if info else 0
            content = _read(place, storage) if 0 < size <= MAX_RESULT_BYTES else b""
        except StorageError:
            if is_own:
                raise
            return True
    elif is_special(Path(place.text)):
        return not is_own
    elif not os.path.exists(place.text):
        return True
    else:
        size = os.stat(place.text).st_size
        content = _read(place, storage) if size <= MAX_RESULT_BYTES else b""
    return not size or is_result(content)


def _foreign_file_problem(place: Location) -> Problem:
    what = "a file that is not the result of a run is there already"
    return Problem(where=f"--result {place}", what=what, remedy="name another file, or remove this one")


def _kept_message(place: Location) -> str:
    return (
        f"{place} is not a result of raymoe, so it is kept; to write the result of this run, name a file with --result"
    )


def _write(
    report: RunReport, place: Location | None, reason: str, error: BaseException | None, *, is_own: bool = False
) -> None:
    """Write the report without raising, so that the merge's own outcome is what the user sees. `is_own`: the place is
    the output's own."""
    if place is None:
        return
    content = json_text(report.plain(reason, error), scrubbed=True) + "\n"
    try:
        if not _may_replace(place, report.storage, is_own=is_own):
            say(f"warning: {_kept_message(place) if is_own else _foreign_file_problem(place)}")
        elif place.kind.is_object:
            open_store(place.text, report.storage).put(place.text, content.encode())
        else:
            write_atomic(Path(place.text), content, follow=not is_own)
    except (OSError, RaymoeError) as failure:
        say(f"warning: {place} could not be written: {failure}")
