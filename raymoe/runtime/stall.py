"""Tells stalled jobs from slow jobs.

A process that hangs (a filesystem that does not answer, SIGSTOP, a deadlock) is not dead: Ray waits for it forever.
Here a job is stalled if its actor reports no progress of it, or does not answer at all, for a time. After half of that
time the coordinator warns; after all of it, it ends the actor and gives the job to another.

Time counts only while the coordinator is watching. While it does something else (for example, completes an upload) no
time passes, because it would not see any progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from raymoe.runtime.timeouts import MAX_BETWEEN_LOOKS_S


class Verdict(Enum):
    """What to do about a job."""

    FINE = "it moves, or has not stood still for long"
    WARN = "it has stood still for half of the time, and this has not been said"
    REASSIGN = "it has stood still for all of the time"


@dataclass
class LastHeartbeat:
    """The last progress that was seen of a job, and when, on the clock of `StallClock`."""

    at: float
    heartbeat: object = None
    is_warned: bool = False


class StallClock:
    """The clock of one run, and the time that a job may stall."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self.limit_s = limit_s
        self.now = 0.0
        self._clock = clock
        self._looked_at = clock()

    def look(self) -> None:
        """Advance the clock by the time since the last call, up to `MAX_BETWEEN_LOOKS_S`."""
        now = self._clock()
        self.now += min(now - self._looked_at, MAX_BETWEEN_LOOKS_S)
        self._looked_at = now

    def begin(self) -> LastHeartbeat:
        """The state of a job that starts now."""
        return LastHeartbeat(at=self.now)

    def judge(self, last: LastHeartbeat, heartbeat: object) -> Verdict:
        """What to do about a job with this current `heartbeat`. Each verdict but FINE is given once."""
        if heartbeat != last.heartbeat:
            last.heartbeat, last.at, last.is_warned = heartbeat, self.now, False
        still = self.now - last.at
        if still >= self.limit_s:
            return Verdict.REASSIGN
        if still >= self.limit_s / 2 and not last.is_warned:
            last.is_warned = True
            return Verdict.WARN
        return Verdict.FINE
