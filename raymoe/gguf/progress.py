"""How far a conversion is."""

from __future__ import annotations

from raymoe.report.live_line import LiveLine
from raymoe.text import human_bytes

__all__ = ["GgufProgress"]


class GgufProgress(LiveLine):
    """Counts the bytes of tensors that have been written."""

    def __init__(self, total: int, quiet: bool) -> None:
        super().__init__(lambda done, whole: f"{human_bytes(done)} of {human_bytes(whole)}", total=total, quiet=quiet)

    def stage(self, name: str) -> None:
        """What comes next."""
        self._next(name)

    def written(self, count: int) -> None:
        self.add(count)
