"""What a process works on, by job, and how often each job has moved on.

A job moves on with every piece that it reads, writes or computes. The coordinator sees from the counts which of the
jobs that an actor has been given stand still (see stall.py).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raymoe.runtime.actor_status import Working


@dataclass(eq=False)
class TrackedJob:
    """A job under way: what it is, the name that the coordinator knows it by, and how often it moved on."""

    working: Working
    name: str
    heartbeats: int = 0

    def heartbeat(self) -> None:
        """Something was read, written or computed. For any thread: a count that is lost between two does no harm."""
        self.heartbeats += 1


class ActiveJobs:
    """The jobs of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[TrackedJob] = []

    @contextmanager
    def track(self, working: Working, name: str = "") -> Iterator[TrackedJob]:
        """A job, for the time that it is worked on; its name is its label if none is given."""
        job = TrackedJob(working, name or working.label)
        with self._lock:
            self._jobs.append(job)
        try:
            yield job
        finally:
            with self._lock:
                self._jobs.remove(job)

    @property
    def busy_with(self) -> tuple[Working, ...]:
        with self._lock:
            return tuple(job.working for job in self._jobs)

    @property
    def heartbeats(self) -> dict[str, int]:
        """How often jobs moved on, by name; several of one name are counted together."""
        counts = Counter[str]()
        with self._lock:
            for job in self._jobs:
                counts[job.name] += job.heartbeats
        return dict(counts)
