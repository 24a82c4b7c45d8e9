"""Tells jobs that stand still from jobs that are slow.

A process that hangs (a filesystem that does not answer, SIGSTOP, a deadlock) is not dead: Ray waits for it without end.
Here a job stands still when its actor reports no move of it, or nothing at all, for a time. After half of the time the
coordinator says so; after all of it, it ends the actor and gives the job to another.

The time is counted by the coordinator while it looks. While it does something else itself (it completes an upload, say)
no time passes, since it would not have seen a move.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from raymoe.runtime.timeouts import MAX_BETWEEN_LOOKS_S


class Verdict(Enum):
    """What is to be done about a job."""

    FINE = "it moves, or has not stood still for long"
    WARN = "it has stood still for half of the time, and this has not been said"
    REASSIGN = "it has stood still for all of the time"


@dataclass
class LastHeartbeat:
    """What was last seen of a job, and when that changed, on the clock of `StallClock`."""

    at: float
    heartbeat: object = None
    is_warned: bool = False


class StallClock:
    """The clock of one run, and the time that a job may stand still."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self.limit_s = limit_s
        self.now = 0.0
        self._clock = clock
        self._looked_at = clock()

    def look(self) -> None:
        """Let the time since the last look pass, as far as it was spent looking."""
        now = self._clock()
        self.now += min(now - self._looked_at, MAX_BETWEEN_LOOKS_S)
        self._looked_at = now

    def begin(self) -> LastHeartbeat:
        """A job that begins now."""
        return LastHeartbeat(at=self.now)

    def judge(self, last: LastHeartbeat, heartbeat: object) -> Verdict:
        """What is to be done about a job of which this is `heartbeat` now. Each verdict but FINE is given once."""
        if heartbeat != last.heartbeat:
            last.heartbeat, last.at, last.is_warned = heartbeat, self.now, False
        still = self.now - last.at
        if still >= self.limit_s:
            return Verdict.REASSIGN
        if still >= self.limit_s / 2 and not last.is_warned:
            last.is_warned = True
            return Verdict.WARN
        return Verdict.FINE
