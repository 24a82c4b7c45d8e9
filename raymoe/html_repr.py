"""How results are displayed in a notebook: one small HTML table each.

Text in it comes from models, configs and records: it is escaped, without secrets, and cut. Only opacity is set, no
colors, so that a table is readable on light and dark backgrounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from raymoe.safe_text import printable, scrub, shorten

_MAX_ROWS = 20
_MAX_COLUMNS = 12
_MAX_CHARACTERS = 200
_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0;color:inherit;background:transparent"


def html_table(title: str, rows: Sequence[Sequence[object]], *, head: Sequence[object] = ()) -> str:
    """A table with a title. Of many rows and columns it shows the first, and how many more there are.

    Example: `html_table("Verification", [("tensors", 12)])`.
    """
    lines = [_row(head, "th")] if head else []
    lines += [_row(row, "td") for row in islice(rows, _MAX_ROWS)]
    if len(rows) > _MAX_ROWS:
        lines.append(_row([f"and {len(rows) - _MAX_ROWS:,} more"], "td"))
    heading = f'<div style="font-weight:bold;color:inherit">{_text(title)}</div>'
    return f'<div>{heading}<table style="border-collapse:collapse">{"".join(lines)}</table></div>'


def _row(cells: Sequence[object], tag: str) -> str:
    shown = [*cells[:_MAX_COLUMNS], *(["..."] if len(cells) > _MAX_COLUMNS else [])]
    first, *others = shown or [""]
    # The first cell names the row, and is fainter than its values.
    return f"<tr>{''.join(_cells([first], tag, '.75'))}{''.join(_cells(others, tag, '1'))}</tr>"


def _cells(values: Iterable[object], tag: str, opacity: str) -> Iterable[str]:
    return (f'<{tag} style="{_CELL};opacity:{opacity}">{_text(str(value))}</{tag}>' for value in values)


def _text(value: str) -> str:
    return escape(printable(scrub(shorten(value, _MAX_CHARACTERS))))
