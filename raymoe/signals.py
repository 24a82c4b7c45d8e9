"""How a signal ends a command: SIGTERM as Ctrl-C does, by a KeyboardInterrupt in the main thread.

This does not work while Ray's own code starts or connects. If Ray's processes got the signal too (a process group that
is stopped as a whole: a container, a batch job, `timeout`), that code waits half a minute for them, or aborts the
process. So while it runs, another thread receives the signals and ends the process itself, with the same last words and
exit status. Ray's processes end with the one that started them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STATUS = 1
_FINAL_CALLS_TIMEOUT_S = 5.0

_last_words: list[str] = []  # of the command that this process runs, if it runs one
_final_calls: list[Callable[[], None]] = []


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block. In threads other than the main one nothing changes.

    Ray sets handlers of its own while it connects; enter this again afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stoppable(last_words: str) -> Iterator[None]:
    """The block is a command that a signal may end: then these words are printed on standard error."""
    _last_words.append(last_words)
    try:
        with sigterm_as_ctrl_c():
            yield
    finally:
        _last_words.pop()


@contextmanager
def run_before_end(call: Callable[[], None]) -> Iterator[None]:
    """Register a call to be made before `end_on_signal` ends the process."""
    _final_calls.append(call)
    try:
        yield
    finally:
        _final_calls.remove(call)


@contextmanager
def end_on_signal() -> Iterator[None]:
    """SIGINT and SIGTERM end the process, whatever the main thread does: for calls that do not return to Python.

    Only in the main thread of a command; a program that uses raymoe as a library is not ended.
    """
    if not _last_words or threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    listener = threading.Thread(target=_listen, args=(read_end,), daemon=True, name="signals")
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write_end)  # the listener has read to the end
        listener.join()
        os.close(read_end)


def _listen(read_end: int) -> None:
    while numbers := os.read(read_end, 64):
        if any(number in _SIGNALS for number in numbers):
            _end()


def _end() -> None:
    for call in reversed(_final_calls):
        doing = threading.Thread(target=call, daemon=True)
        doing.start()
        doing.join(_FINAL_CALLS_TIMEOUT_S)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{_last_words[-1]}\n")
        sys.stderr.flush()
    os._exit(_STATUS)
