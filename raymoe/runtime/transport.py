"""What scheduling needs of Ray, so that its decisions can be tested against actors that die on cue.

An actor's methods are called through its handle, as everywhere; what is waited for, fetched, put and ended goes through
here. A reference is whatever a call gives back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol


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

    def put(self, value: Any) -> Any:
        """A reference to a value that several calls take."""

    def cancel(self, ref: Any) -> None:
        """What a call gives is not wanted any more."""

    def end(self, actor: Any, *, for_good: bool) -> None:
        """End an actor's process. Unless `for_good`, it is started anew where there is room for it."""


class RayTransport:
    """The cluster that this process is connected to."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def ready(self, refs: Sequence[Any], timeout_s: float, *, most: int | None = None) -> list[Any]:
        import ray

        if not refs:
            return []
        found: list[Any] = ray.wait(list(refs), num_returns=most or len(refs), timeout=timeout_s)[0]
        return found

    def fetch(self, ref: Any) -> Any:
        import ray

        return ray.get(ref)

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def cancel(self, ref: Any) -> None:
        import ray

        ray.cancel(ref, force=False, recursive=False)

    def end(self, actor: Any, *, for_good: bool) -> None:
        import ray

        ray.kill(actor, no_restart=for_good)
