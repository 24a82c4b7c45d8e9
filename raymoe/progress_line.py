"""Progress of long work: a live line on a terminal or in a notebook, elsewhere a line every few seconds.

In a notebook the line stays when the work is done.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from raymoe.console import console, say
from raymoe.formatting import human_time
from raymoe.safe_text import safe_message

_LINE_EVERY_S = 5.0
_NOTEBOOK_EVERY_S = 0.5  # each update is a message to the browser
_Display = TypeVar("_Display", bound="LiveDisplay")


class LiveDisplay:
    """Shows progress, with the time since it was made. A context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._live: Any = None
        self._notebook = _NotebookLine() if _in_notebook() else None
        # A dumb terminal or a log gets lines; other terminals get one line that is updated.
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
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def show(self, line: Callable[[], str], more: Callable[[], Sequence[str]] = tuple) -> None:
        """Show `line()`, on a terminal with the lines of `more()` below it."""
        if self.quiet:
            return
        if self._live is not None:
            from rich.console import Group
            from rich.text import Text

            width = self._live.console.width
            below = (Text(_broken(each, width)) for each in more())
            self._live.update(Group(Text(_broken(line(), width), style="bold"), *below))
        elif self._notebook is not None:
            self._notebook.update(line, more)
        elif (now := time.monotonic()) - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            say(line())

    def say(self, line: str) -> None:
        """Print a line that stays, above the live line."""
        self._live.console.print(line) if self._live is not None else say(line)


def _broken(line: str, width: int) -> str:
    """A line for a terminal that may be narrower: it is broken between its parts, and within a part only if it must."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    rows: list[str] = []
    for part in line.split(" | "):
        if rows and len(rows[-1]) + len(part) + 3 <= width:
            rows[-1] += f" | {part}"
        else:
            rows.append(indent + part if rows else part)
    return "\n".join(textwrap.fill(row, width, subsequent_indent=indent, break_long_words=False) for row in rows)


class _NotebookLine:
    """One output of a cell, with a text that changes. It needs no widgets, and is plain text in the notebook's file."""

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


def token_layers(count: float) -> str:
    """Work of reading texts: each token in each layer."""
    return f"{count:,.0f} tokens x layers"


class Pace:
    """The rate at which a count grows, and the time that the rest will take.

    Counted from the first call of a method, and anew if the count has fallen.
    """

    def __init__(self) -> None:
        self._since: tuple[float, float] | None = None  # a moment, and the count until then

    def start(self, done: float, now: float) -> tuple[float, float]:
        """Count from here on, if nothing is counted yet. Returns the moment and the count from which it is counted."""
        if self._since is None or done < self._since[1]:
            self._since = now, done
        return self._since

    def text(self, done: float, left: float, now: float, unit: Callable[[float], str] = "{:,.0f}".format) -> str:
        """`, 300/s, 30 s left`, with `unit` for the rate; empty until a rate is known."""
        since, before = self.start(done, now)
        if done <= before or now <= since:
            return ""
        rate = (done - before) / (now - since)
        return f", {unit(rate)}/s, {human_time(math.ceil(left / rate))} left"


class ProgressLine(LiveDisplay):
    """A stage, and the share of all stages' work that is done, with a rate and the time left. A context manager.

    Args:
        amount: A count of work as text, such as `human_bytes`.
        total: The work of all stages.
        rate: The work of a second as text. Default: as `amount`.
        quiet: Show nothing.
    """

    def __init__(
        self,
        amount: Callable[[float], str],
        *,
        total: int,
        rate: Callable[[float], str] | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(quiet=quiet)
        self._amount, self._rate, self._total, self._pace = amount, rate, total, Pace()
        self._stage, self._before, self._work, self._done = "", 0, 0, 0

    def add(self, count: int) -> None:
        """Add work of the stage that is done. The stage's work is an estimate: what exceeds it does not count."""
        self._done = min(self._done + count, self._work)
        self.show(self._line)

    def stage(self, name: str, work: int | None = None) -> None:
        """Begin a stage with its share of the total work. Without `work`, the current stage gets another name."""
        self._stage = name
        if work is not None:
            self._before, self._work, self._done = self._before + self._work, work, 0
            self._pace.start(self._before, self.seconds)
        self.show(self._line)

    def _line(self) -> str:
        done = self._before + self._done
        parts = [f"{self.seconds:5.0f} s", self._stage]
        if self._total:
            total = self._amount(self._total)
            unit = total.partition(" ")[2]

            def short(count: float) -> str:
                """The amount, without a unit of several words: the total has it."""
                return self._amount(count).removesuffix(f" {unit}") if " " in unit else self._amount(count)

            pace = self._pace.text(done, self._total - done, self.seconds, self._rate or short)
            parts.append(f"{done / self._total:.0%} ({short(done)} of {total}{pace})")
        return " | ".join(parts)
