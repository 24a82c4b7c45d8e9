"""How far an evaluation is: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

__all__ = ["EvaluationProgress"]

_LINE_EVERY_S = 5.0


class EvaluationProgress:
    """Counts tokens that have passed a layer, stage by stage. A context manager."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._started = self._last_line = time.monotonic()
        self._stage, self._done, self._total = "", 0, 0
        self._live: Any = None
        self._on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> EvaluationProgress:
        if self._on_terminal and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str, total: int = 0) -> None:
        """What comes next, and how many tokens times layers it is; 0 if that is not known."""
        self._stage, self._done, self._total = name, 0, total
        self._show()

    def layer_done(self, tokens: int) -> None:
        self._done += tokens
        self._show()

    def _show(self) -> None:
        if self._quiet:
            return
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(self._line(), style="bold"))
        elif (now := time.monotonic()) - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        elapsed = time.monotonic() - self._started
        done = f"{self._done / self._total:.0%}" if self._total else f"{self._done:,} token-layers"
        return f"{elapsed:5.0f} s | {self._stage} | {done}"
