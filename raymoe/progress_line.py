"""How far a long piece of work is: a live line on a terminal or in a notebook, elsewhere a line every few seconds.

In a notebook the line stays when the work is done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from raymoe.console import console, say
from raymoe.safe_text import safe_message

_LINE_EVERY_S = 5.0
_NOTEBOOK_EVERY_S = 0.5  # each update is a message to the browser
_Display = TypeVar("_Display", bound="LiveDisplay")


class LiveDisplay:
    """Shows what is going on, from the time that it was made. A context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._live: Any = None
        self._notebook = _NotebookLine() if _in_notebook() else None
        # A dumb terminal or a log gets lines; a person gets one line that moves.
        self._on_terminal = self._notebook is None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self: _Display) -> _Display:
        if self._on_terminal and not self.quiet:
            from rich.live import Live

            self._live = Live(console=console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._notebook is not None:
            self._notebook.finish()

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self._started

    def show(self, line: Callable[[], str], more: Callable[[], Sequence[str]] = tuple) -> None:
        """Show `line()`, on a terminal with the lines of `more()` below it."""
        if self.quiet:
            return
        if self._live is not None:
            from rich.console import Group
            from rich.text import Text

            self._live.update(Group(Text(line(), style="bold"), *map(Text, more())))
        elif self._notebook is not None:
            self._notebook.update(line, more)
        elif (now := time.monotonic()) - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            say(line())

    def say(self, line: str) -> None:
        """A line that stays, above the one that moves."""
        self._live.console.print(line) if self._live is not None else say(line)


class _NotebookLine:
    """One output of a cell, whose text changes. It needs no widgets, and is plain text in the notebook's file."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_at = 0.0
        self._last: Callable[[], str] | None = None

    def update(self, line: Callable[[], str], more: Callable[[], Sequence[str]]) -> None:
        self._last = line
        if (now := time.monotonic()) - self._shown_at >= _NOTEBOOK_EVERY_S:
            self._shown_at = now
            self._show(line(), *more())

    def finish(self) -> None:
        """The last state, without what is below the line."""
        if self._last is not None:
            self._show(self._last())

    def _show(self, *lines: str) -> None:
        bundle = {"text/plain": "\n".join(map(safe_message, lines))}
        if self._handle is None:
            display: Any = sys.modules["IPython.display"].display
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this; IPython on a terminal has none."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None and "IPython.display" in sys.modules


class ProgressLine(LiveDisplay):
    """A stage, and how much of it is done; `describe` says that as text. A context manager."""

    def __init__(self, describe: Callable[[int, int], str], *, total: int = 0, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._describe = describe
        self._stage, self._done, self._total = "", 0, total

    def add(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        self.show(self._line)

    def stage(self, name: str, total: int | None = None) -> None:
        """What comes next. With a `total` (0: it is not known), what is done is counted anew."""
        self._stage = name
        if total is not None:
            self._done, self._total = 0, total
        self.show(self._line)

    def _line(self) -> str:
        return f"{self.seconds:5.0f} s | {self._stage} | {self._describe(self._done, self._total)}"
