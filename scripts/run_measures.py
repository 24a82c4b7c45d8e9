"""Running a program as a whole and measuring it: wall time, times of its steps, memory of all its processes, processor
time of some of them."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
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
    the part of it that is no file's pages; both None where memory was not looked at. `cpu_seconds` is the processor
    time, user and system, of the processes whose names were given to `run_program`; `cpu_seconds_at` is what they had
    used when each step was reached. `synced_seconds`: as `seconds`, until a `sync` after it had ended; None where none
    was waited for.
    """

    seconds: float
    steps: dict[str, float] = field(default_factory=dict)
    peak_pss: int | None = None
    peak_anonymous: int | None = None
    cpu_seconds: float | None = None
    cpu_seconds_at: dict[str, float] = field(default_factory=dict)
    synced_seconds: float | None = None


def run_program(
    command: Sequence[str], *, steps: Sequence[str] = (), memory: bool = False, cpu_of: str | None = None
) -> Run:
    """Run it to its end. Looking at memory takes time itself: a run is measured for its time or for its memory.

    `cpu_of`: how the command lines begin of the processes whose processor time is wanted. What a process uses in the
    last fifth of a second before it ends is not counted.
    """
    mark = uuid.uuid4().hex
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, _MARK: mark}
    )
    watch = _MemoryWatch(mark) if memory else None
    processor = _CpuWatch(mark, cpu_of) if cpu_of is not None else None
    reached: dict[str, float] = {}
    used: dict[str, float] = {}
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        for step in steps:
            if step in line and step not in reached:
                reached[step] = time.perf_counter() - started
                used |= {step: processor.seconds} if processor is not None else {}
    code = process.wait()
    seconds = time.perf_counter() - started
    for each in (watch, processor):
        if each is not None:
            each.stop()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{''.join(said[-20:])}")
    pss, anonymous = (watch.pss, watch.anonymous) if watch is not None else (None, None)
    return Run(seconds, reached, pss, anonymous, processor.seconds if processor is not None else None, used)


class _Watch(ABC):
    """Looks at all processes that carry the mark in their environment, a few times per second."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{_MARK}={mark}".encode()
        self._ours: dict[int, bool] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    @abstractmethod
    def _look(self, pids: Iterator[int]) -> None:
        """Take what is wanted of the processes of the run."""

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_EVERY_S):
            self._look(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid))

    def _is_ours(self, pid: int) -> bool:
        if self._ours.get(pid):
            return True
        try:
            # Read anew until it is so: a process that has not replaced its program yet shows its parent's.
            self._ours[pid] = self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return self._ours[pid]


class _MemoryWatch(_Watch):
    """`pss`, `anonymous`: the largest sums so far, in bytes."""

    def __init__(self, mark: str) -> None:
        self.pss = self.anonymous = 0
        super().__init__(mark)

    def _look(self, pids: Iterator[int]) -> None:
        sums = [_proportional(pid) for pid in pids]
        self.pss = max(self.pss, sum(found.get("Pss", 0) for found in sums))
        self.anonymous = max(self.anonymous, sum(f.get("Pss_Anon", 0) + f.get("Pss_Shmem", 0) for f in sums))


class _CpuWatch(_Watch):
    """Processor time of the processes whose command lines begin with a text, those that have ended included."""

    def __init__(self, mark: str, name: str) -> None:
        self._name, self._seconds = name.encode(), dict[int, float]()
        super().__init__(mark)

    @property
    def seconds(self) -> float:
        return sum(list(self._seconds.values()))

    def _look(self, pids: Iterator[int]) -> None:
        for pid in pids:
            if (seconds := _processor_seconds(pid, self._name)) is not None:
                self._seconds[pid] = seconds


def _processor_seconds(pid: int, name: bytes) -> float | None:
    """User and system time; None of a process with another name, and of one that has ended."""
    try:
        if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(name):
            return None
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


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
