"""Tables that scripts write into the pages of docs/, between two equal marks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["put_between"]


def put_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between the two marks in a page. Raises ValueError where there are not two."""
    before, _, after = page.read_text(encoding="utf-8").split(mark)
    page.write_text(f"{before}{mark}\n{text}\n{mark}{after}", encoding="utf-8")
