"""Runs calls of the coordinator outside its scheduling thread: requests to a store, which take time.

The threads are daemons, so a server that does not answer does not keep the process alive.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_THREADS = 16
_END_TIMEOUT_S = 10  # for running calls, when their results are no longer needed


class Background:
    """A bounded pool of threads. They start with the first call."""

    def __init__(self, threads: int = _THREADS) -> None:
        self._most, self._threads = threads, list[threading.Thread]()
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self._under_way = 0
        self._changed = threading.Condition()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function in a thread; the future has its result or its exception."""
        future: Future[Any] = Future()
        with self._changed:
            self._under_way += 1
            if len(self._threads) < min(self._most, self._under_way):
                thread = threading.Thread(target=self._work, name="coordinator call", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._calls.put((future, function, arguments))
        return future

    def end(self) -> None:
        """Start no more calls, and wait a limited time for running ones."""
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call[0].cancel()
                self._done()
        until = time.monotonic() + _END_TIMEOUT_S
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, timeout=max(0.0, until - time.monotonic()))
            threads, self._threads = self._threads, []
        for _ in threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if future.set_running_or_notify_cancel():
                try:
                    result = function(*arguments)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
            self._done()

    def _done(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()
