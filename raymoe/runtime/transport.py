"""What scheduling needs of Ray, so that its decisions can be tested against actors that die on cue.

An actor's methods are called through its handle, as everywhere; what is waited for, fetched, put and ended goes through
here. A reference is whatever a call gives back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from raymoe.runtime.background import Background

_MOMENT_S = 0.02


class Transport(Protocol):
    """What is under way, and the time."""

    def now(self) -> float:
        """Seconds from any moment; they never go back."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def ready(self, refs: Sequence[Any], timeout_s: float, *, most: int | None = None) -> list[Any]:
        """Those of `refs` that have come back or failed, within a time: as soon as there are `most`, or all of them."""

    def fetch(self, ref: Any) -> Any:
        """What came back. Raises what the call raised, and Ray's exceptions for what was lost."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have a function called in this process, beside what else it does; the reference of its result."""

    def end_calls(self) -> None:
        """Nothing more of what `run` was asked for is wanted: what has begun is waited for a while."""

    def put(self, value: Any) -> Any:
        """A reference to a value that several calls take."""

    def cancel(self, ref: Any) -> None:
        """What a call gives is not wanted any more."""

    def end(self, actor: Any, *, for_good: bool) -> None:
        """End an actor's process. Unless `for_good`, it is started anew where there is room for it."""


class RayTransport:
    """The cluster that this process is connected to."""

    def __init__(self) -> None:
        self._background = Background()

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def ready(self, refs: Sequence[Any], timeout_s: float, *, most: int | None = None) -> list[Any]:
        calls = [ref for ref in refs if isinstance(ref, Future)]
        if not calls:
            return _ready_in_cluster(refs, timeout_s, most)
        until, wanted = self.now() + timeout_s, most or len(refs)
        others = [ref for ref in refs if not isinstance(ref, Future)]
        while True:
            found = [ref for ref in calls if ref.done()]
            left = until - self.now()
            if len(found) >= wanted or left <= 0:
                return [*found, *_ready_in_cluster(others, 0, None)][:wanted]
            # Two kinds of things can't be waited for at once; so each in turn, for a moment.
            found += _ready_in_cluster(others, min(left, _MOMENT_S), max(1, wanted - len(found)))
            if len(found) >= wanted:
                return found[:wanted]
            if not others:
                wait(calls, timeout=min(left, _MOMENT_S), return_when=FIRST_COMPLETED)

    def fetch(self, ref: Any) -> Any:
        import ray

        return ref.result() if isinstance(ref, Future) else ray.get(ref)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._background.run(function, *arguments)

    def end_calls(self) -> None:
        self._background.end()

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def cancel(self, ref: Any) -> None:
        import ray

        ray.cancel(ref, force=False, recursive=False)

    def end(self, actor: Any, *, for_good: bool) -> None:
        import ray

        ray.kill(actor, no_restart=for_good)


def _ready_in_cluster(refs: Sequence[Any], timeout_s: float, most: int | None) -> list[Any]:
    import ray

    if not refs:
        return []
    found: list[Any] = ray.wait(list(refs), num_returns=min(most or len(refs), len(refs)), timeout=timeout_s)[0]
    return found
