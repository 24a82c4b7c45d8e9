"""Running a program as a whole and measuring it: wall time, times of its steps, memory of all its processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Run", "drop_from_cache", "read_into_cache", "run_program"]

_MARK = "BENCH_RUN"
_LOOK_EVERY_S = 0.2
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Run:
    """What one run took. `steps`: seconds from the start until a line with that text was printed.

    Memory is the largest sum of proportional set sizes (shared pages count once) over all processes of the run, and
    the part of it that is no file's pages; both None where memory was not looked at.
    """

    seconds: float
    steps: dict[str, float] = field(default_factory=dict)
    peak_pss: int | None = None
    peak_anonymous: int | None = None


def run_program(command: Sequence[str], *, steps: Sequence[str] = (), memory: bool = False) -> Run:
    """Run it to its end. Looking at memory takes time itself: a run is measured for its time or for its memory."""
    mark = uuid.uuid4().hex
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, _MARK: mark}
    )
    watch = _MemoryWatch(mark) if memory else None
    reached: dict[str, float] = {}
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        for step in steps:
            if step in line:
                reached.setdefault(step, time.perf_counter() - started)
    code = process.wait()
    seconds = time.perf_counter() - started
    if watch is not None:
        watch.stop()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{''.join(said[-20:])}")
    return Run(seconds, reached, *((watch.pss, watch.anonymous) if watch is not None else ()))


class _MemoryWatch:
    """Looks at all processes that carry the mark in their environment, a few times a second."""

    def __init__(self, mark: str) -> None:
        self.pss = self.anonymous = 0
        self._mark = f"{_MARK}={mark}".encode()
        self._ours: dict[int, bool] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_EVERY_S):
            sums = [
                _proportional(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)
            ]
            self.pss = max(self.pss, sum(found.get("Pss", 0) for found in sums))
            self.anonymous = max(self.anonymous, sum(f.get("Pss_Anon", 0) + f.get("Pss_Shmem", 0) for f in sums))

    def _is_ours(self, pid: int) -> bool:
        if self._ours.get(pid):
            return True
        try:
            # Read anew until it is so: a process that has not replaced its program yet shows its parent's.
            self._ours[pid] = self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return self._ours[pid]


def _proportional(pid: int) -> Mapping[str, int]:
    """Bytes by the names of smaps_rollup; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def read_into_cache(files: Sequence[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_cache(files: Sequence[Path]) -> None:
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
