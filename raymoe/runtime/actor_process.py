"""Sets up an actor's process: memory limits, waiting and priorities of threads, and errors without secrets."""

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
# From malloc.h, and the values that they are set to.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 8 << 20
_M_ARENA_MAX, _ARENAS = -8, 4


def set_up_process() -> None:
    """Set up the process. Every actor calls this first."""
    scrub_streams()
    _return_freed_memory()
    _allow_open_files()
    # torch's threads wait for each other after each operation. By default they do so in a loop, which keeps a core from
    # threads that copy shards and from the very thread that is waited for: the gate pass then takes twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Threads that copy need the interpreter lock for a moment between two pieces. While another thread computes in
    # Python (imports, layers), they wait this long each time: with Python's default of 5 ms they copy at a quarter of
    # the speed.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def without_secrets(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of an actor so that its errors hold no secrets: Ray stores errors with the text of all their
    causes."""

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except Exception as error:
            scrubbed = _scrub_error(error)
        raise scrubbed  # raised outside the `except` block, so that it does not refer to its cause

    @functools.wraps(method)
    def stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from method(*arguments, **options)
            return
        except Exception as error:
            scrubbed = _scrub_error(error)
        raise scrubbed

    wrapper: Any = stream if inspect.isgeneratorfunction(method) else call  # Ray uses the same check
    # Ray looks up a method's options, such as its concurrency group, on the function that `__wrapped__` leads to.
    vars(wrapper).pop("__wrapped__")
    wrapper.__signature__ = inspect.signature(method)
    return cast(Callable[..., Any], wrapper)


def _scrub_error(error: Exception) -> Exception:
    """The error in a form that may be stored: unchanged if its text holds no secret."""
    if isinstance(error, RaymoeError):
        # Its own text is scrubbed. The text of its causes comes from a server or a library.
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
    """Make glibc return large freed blocks to the system at once, and free heap memory above 64 MiB.

    By default both limits grow with the size of freed blocks. Several threads allocate and free weights, so an actor
    would keep unused memory of several layers and several upload parts. Smaller limits than these cost more than they
    save: the kernel would map and zero a layer's activations again for every operation, a third of the gate pass's time
    on a CPU.

    Each arena keeps such blocks of its own, and by default there are 8 per core. An actor that has 128 copies in flight
    sends their small parts from as many threads: on 16 cores it would keep over 1 GB. So threads share few arenas.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)


def _allow_open_files() -> None:
    """Raise the limit of open files as far as this user may. Ray does so for drivers, but not for actors on nodes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some kernels reject 'no limit'
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prioritize_gate_threads() -> None:
    """Lower the priority of this thread, which writes shards, where it shares cores with the gate pass.

    The gate pass takes longest, and the disk is busy anyway. On Linux, niceness is set per thread.
    """
    if os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < _WRITER_NICENESS:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)
