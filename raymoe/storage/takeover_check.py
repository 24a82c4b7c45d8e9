"""Ends the retries of a run's writes when a newer run has taken over the output.

    write --> transient error --> wait --> TakeoverCheck --> the next try, or TakenOver

A newer run aborts the uploads of older ones. Most stores then refuse the parts of such an upload for good. Some answer
with an error that looks transient (moto: 500), and would be asked again until the deadline of the call, which is long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from raymoe.storage.claim import taken_over_error

_EVERY_S = 2.0  # many writes fail at once where a store is overloaded: the check must not add to that


class TakeoverCheck:
    """Called before a write is tried again. Raises TakenOver if the output is no longer this run's. Thread-safe."""

    def __init__(self, location: str, is_of_this_run: Callable[[], bool]) -> None:
        """`is_of_this_run` looks at the output. It returns soon, and True if it can't tell."""
        self._location, self._is_of_this_run = location, is_of_this_run
        self._next = 0.0
        self._is_taken_over = False
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Look, unless another thread is looking or has just done so."""
        with self._lock:
            is_due = self._is_taken_over or time.monotonic() >= self._next
            if is_due:
                self._next = time.monotonic() + _EVERY_S
        if is_due:
            self.look()

    def look(self) -> None:
        """Look in any case: a write has failed."""
        if self._is_taken_over or not self._is_of_this_run():
            self._is_taken_over = True
            raise taken_over_error(self._location)
