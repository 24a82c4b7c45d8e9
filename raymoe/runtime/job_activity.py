"""Tracks the jobs of a process, and how often each has made progress.

A job makes progress with every piece that it reads, writes or computes. From these counts the coordinator sees which
jobs of an actor stall (see stall.py).
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
    """A running job: what it does, its name for the coordinator, and how often it made progress."""

    working: Working
    name: str
    heartbeats: int = 0

    def heartbeat(self) -> None:
        """Count progress: a piece was read, written or computed. For any thread; an increment lost to a race does no
        harm."""
        self.heartbeats += 1


class ActiveJobs:
    """The jobs of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: list[TrackedJob] = []

    @contextmanager
    def track(self, working: Working, name: str = "") -> Iterator[TrackedJob]:
        """Track a job inside the context. Without `name`, its label is its name."""
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
        """How often jobs made progress, by name; jobs of the same name are added up."""
        counts = Counter[str]()
        with self._lock:
            for job in self._jobs:
                counts[job.name] += job.heartbeats
        return dict(counts)
