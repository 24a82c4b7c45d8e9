"""What scheduling needs from Ray, as an interface: tests use actors that die at given moments.

An actor's methods are called through its handle; waiting, fetching, putting and ending go through this interface. A
reference is the value that a call returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from raymoe.runtime.background import Background

_MOMENT_S = 0.02


class Transport(Protocol):
    """Calls in progress, and the time."""

    def now(self) -> float:
        """Seconds since an arbitrary moment; they never go back."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def ready(self, refs: Sequence[Any], timeout_s: float, *, most: int | None = None) -> list[Any]:
        """The `refs` that have a result or an error. Returns when there are `most`, or all of them, or after
        `timeout_s`."""

    def fetch(self, ref: Any) -> Any:
        """The result. Raises the call's error, and Ray's exceptions for lost objects."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in this process, in a background thread; returns the reference of its result."""

    def end_calls(self) -> None:
        """Drop calls of `run` that have not started, and wait a limited time for running ones."""

    def put(self, value: Any) -> Any:
        """A reference to a value that several calls take."""

    def cancel(self, ref: Any) -> None:
        """Cancel a call: its result is not needed any more."""

    def end(self, actor: Any, *, for_good: bool) -> None:
        """End an actor's process. Unless `for_good`, Ray starts it again where there is room."""


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
            # Ray can't wait for both kinds of references at once, so each is waited for in turn, briefly.
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
