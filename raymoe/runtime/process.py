"""How an actor's process is set up: what memory it keeps, with how many threads it computes, what goes first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import threading

__all__ = ["COMPUTE_THREADS", "let_gates_go_first", "limit_threads", "set_up_process"]

# A constant: how many threads share a sum decides its last bit, and that must not depend on the number of actors.
COMPUTE_THREADS = 2
_WRITERS_NICE = 5
_SWITCH_S = 0.0002
# From malloc.h, and what they are set to.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 8 << 20


def set_up_process() -> None:
    """What every actor's process begins with."""
    _give_memory_back()
    _allow_open_files()
    # Copying threads need the interpreter for a moment between two pieces. While another thread computes in Python
    # (imports, layers), they wait for it this long each time: with Python's 5 ms they copy at a quarter of the speed.
    sys.setswitchinterval(_SWITCH_S)


def _give_memory_back() -> None:
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


def limit_threads(count: int = COMPUTE_THREADS) -> None:
    """Let torch compute with a fixed number of threads (see COMPUTE_THREADS)."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def let_gates_go_first() -> None:
    """Let this thread, which writes shards, stand back where it shares cores with the gate pass.

    The gate pass is what takes longest, and the disk is busy anyway. Linux has a niceness a thread.
    """
    if os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < _WRITERS_NICE:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITERS_NICE)
