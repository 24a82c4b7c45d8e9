"""How far an evaluation is."""

from __future__ import annotations

from raymoe.report.live_line import LiveLine

__all__ = ["EvaluationProgress"]


class EvaluationProgress(LiveLine):
    """Counts tokens that have passed a layer, stage by stage."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(_words, quiet=quiet)

    def stage(self, name: str, total: int = 0) -> None:
        """What comes next, and how many tokens times layers it is; 0 if that is not known."""
        self._done, self._total = 0, total
        self._next(name)

    def layer_done(self, tokens: int) -> None:
        self.add(tokens)


def _words(done: int, total: int) -> str:
    return f"{done / total:.0%}" if total else f"{done:,} token-layers"
