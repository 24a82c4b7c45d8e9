"""One run of a command among those that a case needs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Try"]

_HELD = "holds a finished merge"


@dataclass(kw_only=True)
class Try:
    """A run of the command: its exit status (None: killed by us; 'hung' is a timeout) and what it said."""

    status: int | None
    said: str
    hung: bool = False

    @property
    def is_clean_error(self) -> bool:
        """One message and no traceback."""
        messages = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return self.status in (1, 2) and "Traceback" not in self.said and len(messages) == 1

    @property
    def found_finished(self) -> bool:
        """An earlier try had ended before it was killed."""
        return self.is_clean_error and _HELD in self.said
