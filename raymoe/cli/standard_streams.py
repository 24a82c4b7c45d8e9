"""Makes the standard streams of the process safe for commands, however the shell has set them up.

A character that a stream's encoding lacks is escaped. A stream that the shell has closed becomes /dev/null. Otherwise
the next opened file, such as a shard, would get its descriptor, and libraries would print into it.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from raymoe.errors import RaymoeError


class OutputLost(RaymoeError):
    """What was printed can't be written to standard output: its reader has gone, or its disk is full."""

    def __init__(self, error: OSError):
        super().__init__(f"standard output can't be written to: {error.strerror}")
        self.is_reported = not isinstance(error, BrokenPipeError)  # `| head` has read what it wanted


class _Output(io.TextIOWrapper):
    """Standard output. Raises OutputLost, which callers can distinguish from errors of files."""

    def __init__(self, plain: io.TextIOWrapper):
        super().__init__(
            plain.buffer, encoding=plain.encoding, errors=plain.errors, line_buffering=plain.line_buffering
        )
        self._plain = plain  # kept, since it closes the buffer when it is freed

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _discard_output(error) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _discard_output(error) from None


def _discard_output(error: OSError) -> OutputLost:
    """Redirect standard output to /dev/null, so that later prints do not fail again, and return the error to raise."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return OutputLost(error)


def make_streams_safe() -> None:
    """Call this before anything is opened or printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            assert opened == number, (opened, number)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    if type(sys.stdout) is io.TextIOWrapper and _descriptor_of(sys.stdout) == 1:  # otherwise a program has replaced it
        sys.stdout = _Output(sys.stdout)


def _descriptor_of(stream: io.TextIOWrapper) -> int | None:
    """The stream's file descriptor; None if a program has replaced the stream by one in memory."""
    try:
        return stream.fileno()
    except OSError:
        return None
