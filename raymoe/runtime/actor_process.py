"""How an actor's process is set up: what memory it keeps, with how many threads it computes, what goes first, and that
it tells no secrets."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, cast

from raymoe.errors import RaymoeError
from raymoe.safe_text import scrub, scrub_streams

_WRITER_NICENESS = 5
_SWITCH_INTERVAL_S = 0.0002
# From malloc.h, and what they are set to.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 8 << 20


def set_up_process() -> None:
    """What every actor's process begins with."""
    scrub_streams()
    _return_freed_memory()
    _allow_open_files()
    # Copying threads need the interpreter for a moment between two pieces. While another thread computes in Python
    # (imports, layers), they wait for it this long each time: with Python's 5 ms they copy at a quarter of the speed.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def without_secrets(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an actor whose errors hold no secrets: Ray stores them with the text of all that led to them."""

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except Exception as error:
            scrubbed = _scrub_error(error)
        raise scrubbed  # out here it does not hold what it was made from

    @functools.wraps(method)
    def stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from method(*arguments, **options)
            return
        except Exception as error:
            scrubbed = _scrub_error(error)
        raise scrubbed

    wrapper: Any = stream if inspect.isgeneratorfunction(method) else call  # Ray asks so too
    # Ray looks for the options of a method, such as its concurrency group, at what `__wrapped__` leads to.
    vars(wrapper).pop("__wrapped__")
    wrapper.__signature__ = inspect.signature(method)
    return cast(Callable[..., Any], wrapper)


def _scrub_error(error: Exception) -> Exception:
    """The error as it may be stored: the same one where its text has no secret left."""
    if isinstance(error, RaymoeError):
        # Its own text is scrubbed. What it was made from is a server's or a library's text.
        error.__cause__ = error.__context__ = None
        return error
    text = "".join(traceback.format_exception(error))
    if scrub(text) == text:
        return error
    error.__cause__ = error.__context__ = None
    error.args = tuple(scrub(each) if isinstance(each, str) else each for each in error.args)
    if isinstance(error, OSError) and isinstance(error.strerror, str):
        error.strerror = scrub(error.strerror)
    scrubbed = str(error)
    return error if scrub(scrubbed) == scrubbed else RuntimeError(scrub(f"{type(error).__name__}: {scrubbed}"))


def _return_freed_memory() -> None:
    """Have glibc give back large freed blocks at once, and what lies free at the end of its heap past 64 MiB.

    By default both limits grow with the blocks that are freed: with weights coming and going in several threads, an
    actor would hold several layers' worth of memory that nobody uses, and several parts of uploads. Smaller limits than
    these cost more than they save: a layer's activations are mapped and zeroed by the kernel again for every operation,
    a third of the gate pass's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not so on other C libraries
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def _allow_open_files() -> None:
    """Raise the limit of open files as far as this user may. Ray does so for drivers, not for a node's actors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # 'no limit' is more than some kernels take
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prioritize_gate_threads() -> None:
    """Let this thread, which writes shards, stand back where it shares cores with the gate pass.

    The gate pass is what takes longest, and the disk is busy anyway. Linux has a niceness a thread.
    """
    if os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < _WRITER_NICENESS:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)
