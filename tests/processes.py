"""Other processes on this machine, by what their command lines say.

Any of them may end between two looks at it (and stay as a zombie until its parent asks): what has ended has no command
line, no children, and can't be killed once more. Nothing here raises because of that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Protocol

import psutil

__all__ = ["arguments", "below", "is_alive", "kill", "mentioning", "send", "titled", "with_words"]


class HasPid(Protocol):
    @property
    def pid(self) -> int: ...


def arguments(process: psutil.Process) -> list[str]:
    """Its command line, with what it calls itself first; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def below(*pids: int) -> list[psutil.Process]:
    """All that descends from these processes."""
    found = []
    for pid in pids:
        try:
            found += psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            continue
    return found


def titled(processes: Iterable[psutil.Process], *beginnings: str) -> list[psutil.Process]:
    """Those of them that call themselves by a name that begins so."""
    return [process for process in processes if "".join(arguments(process)[:1]).startswith(beginnings)]


def mentioning(text: str) -> list[psutil.Process]:
    """The machine's processes, but for this one, with that text in a word of their command lines."""
    return [found for found in _others() if any(text in word for word in arguments(found))]


def with_words(*words: str) -> list[psutil.Process]:
    """The machine's processes, but for this one, with each of these words in their command lines."""
    return [found for found in _others() if set(words) <= set(arguments(found))]


def _others() -> Iterator[psutil.Process]:
    return (found for found in psutil.process_iter() if found.pid != os.getpid())


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process: HasPid) -> bool:
    """Whether it was still there."""
    return send(process.pid, signal.SIGKILL)


def send(pid: int, number: signal.Signals) -> bool:
    """Whether there was a process to send the signal to."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
