"""A terminal without a process: what is printed on it, and how wide it is."""

from __future__ import annotations

import io
import os
import sys
from typing import TypeVar

import pytest

_Terminal = TypeVar("_Terminal", bound="Terminal")


class Terminal(io.StringIO):
    """A standard stream that says that it is a terminal."""

    descriptor = 1

    @classmethod
    def install(cls: type[_Terminal], monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> _Terminal:
        """Put one in the place of `sys.stdout` or `sys.stderr`."""
        screen = cls()
        screen.descriptor = getattr(sys, f"__{name}__").fileno()
        monkeypatch.setattr(sys, name, screen)
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((width, 24)))
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        for variable in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
            monkeypatch.delenv(variable, raising=False)
        return screen

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor
