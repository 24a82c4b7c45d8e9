"""Ends a run that no actor can continue: no actor has been up for too long, or no actor that is up has the files that
the remaining work needs.

Unavailable actors may come back, so a run waits for them for a limited time.
"""

from __future__ import annotations

from collections.abc import Callable

from raymoe.errors import MergeFailed
from raymoe.formatting import human_time
from raymoe.runtime.actor_pool import ActorPool
from raymoe.runtime.stall import StallClock
from raymoe.runtime.timeouts import STARTUP_GRACE_S, STUCK_TIMEOUT_S


class StuckCheck:
    """Tracks when an actor was last up, and when an actor last had a job."""

    def __init__(self, pool: ActorPool, stall: StallClock, now: Callable[[], float]) -> None:
        self._pool, self._stall, self._now = pool, stall, now
        self._last_busy, self._last_up = now(), stall.now

    def check(self, *, is_busy: bool, first_waiting: Callable[[], tuple[frozenset[str], str]]) -> None:
        """Raise MergeFailed if no running or restarting actor can do the remaining work.

        `is_busy`: jobs are running. `first_waiting`: the files and the name of waiting work.
        """
        up, absent = self._pool.up, [helper for helper, actor in self._pool.helpers.items() if not actor.is_up]
        are_up = bool(up) and not absent
        if are_up:
            self._last_up = self._stall.now
        elif self._stall.now - self._last_up >= self._stall.limit_s:
            subject = f"{absent[0].label} has not" if up else "none of the actors has"
            raise MergeFailed(
                f"{subject} been up for {human_time(self._stall.limit_s)}: Ray has no room for it, or its process "
                "stands still. Run the same command again to go on from the shards that are finished."
            )
        if is_busy or not are_up:
            self._last_busy = self._now()
            return
        some_away = len(up) < len(self._pool.actors)
        if self._now() - self._last_busy >= (STUCK_TIMEOUT_S if some_away else STARTUP_GRACE_S):
            raise self._stuck(*first_waiting())

    def _stuck(self, files: frozenset[str], label: str) -> MergeFailed:
        missing_by_node = {actor.info["node"]: actor.info["missing"] for actor in self._pool.up if actor.info}
        missing = sorted({file for file in files if all(file in gone for gone in missing_by_node.values())})
        what = f"{missing[0]} is on none of the nodes" if missing else "no node has all the files that it takes"
        return MergeFailed(
            f"{label}: {what} with an actor ({', '.join(sorted(missing_by_node))}). A node that had it may be lost; "
            "run the same command again when it is back, to go on from the shards that are finished."
        )
