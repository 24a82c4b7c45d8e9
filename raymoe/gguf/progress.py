"""How far a conversion is: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from raymoe.text import human_bytes

__all__ = ["GgufProgress"]

_LINE_EVERY_S = 5.0


class GgufProgress:
    """Counts the bytes of tensors that have been written. A context manager."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._started = self._last_line = time.monotonic()
        self._stage, self._done = "", 0
        self._live: Any = None
        self._on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> GgufProgress:
        if self._on_terminal and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str) -> None:
        """What comes next."""
        self._stage = name
        self._show()

    def written(self, count: int) -> None:
        self._done += count
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
        return f"{elapsed:5.0f} s | {self._stage} | {human_bytes(self._done)} of {human_bytes(self._total)}"
