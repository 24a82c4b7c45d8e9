"""How far a long piece of work is: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from raymoe.console import console, say

__all__ = ["ProgressLine"]

_LINE_EVERY_S = 5.0
_Line = TypeVar("_Line", bound="ProgressLine")


class ProgressLine:
    """A stage, and how much of it is done; `describe` says that as text. A context manager."""

    def __init__(self, describe: Callable[[int, int], str], *, total: int = 0, quiet: bool = False) -> None:
        self._describe, self._quiet = describe, quiet
        self._started = self._last_line = time.monotonic()
        self._stage, self._done, self._total = "", 0, total
        self._live: Any = None
        self._on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self: _Line) -> _Line:
        if self._on_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(console=console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        self._show()

    def _begin_stage(self, stage: str) -> None:
        self._stage = stage
        self._show()

    def _show(self) -> None:
        if self._quiet:
            return
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(self._line(), style="bold"))
        elif (now := time.monotonic()) - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            say(self._line())

    def _line(self) -> str:
        elapsed = time.monotonic() - self._started
        return f"{elapsed:5.0f} s | {self._stage} | {self._describe(self._done, self._total)}"
