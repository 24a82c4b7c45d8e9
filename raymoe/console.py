"""Output to a terminal: lines on standard error, lines and tables on standard output.

Their text comes from models, configs and records of unknown authors. It cannot move the cursor, change colors or hide
other text, and it shows no secrets (`raymoe.safe_text`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from raymoe.errors import Problem, ProblemReport
from raymoe.safe_text import json_text, printable, safe_message, scrub


def say(text: str) -> None:
    """Print a line for the user on standard error. A failure to write it is ignored."""
    with contextlib.suppress(OSError):
        print(_fitted(safe_message(text), sys.stderr), file=sys.stderr, flush=True)


def say_command(text: str) -> None:
    """Print a command for the user to copy, indented, as one line. A failure to write it is ignored."""
    with contextlib.suppress(OSError):
        print(f"  {safe_message(text)}", file=sys.stderr, flush=True)


def _fitted(text: str, stream: TextIO) -> str:
    """On a terminal, lines that are too long go on below, indented. Words are not split: paths and URLs stay whole."""
    if not stream.isatty():
        return text
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return text
    return "\n".join(line if len(line) <= width else _wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    lines = textwrap.wrap(
        line, max(width, 20), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def typed_lines(mark: str = "") -> Iterator[str]:
    """The lines of standard input that are not blank; `mark` is shown before each. Raises ProblemReport."""
    while True:
        with contextlib.suppress(OSError):
            print(mark, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except (OSError, ValueError) as error:
            what = f"it can't be read: {error}"
            raise ProblemReport([Problem(where="standard input", what=what, remedy="give UTF-8 text")]) from None
        if not line:
            return
        if line.strip():
            yield line.strip()


def print_line(text: str) -> None:
    """A line of a command's answer, on standard output."""
    print(_fitted(safe_message(text), sys.stdout))


def print_json(value: Any) -> None:
    """A value for programs, on standard output: JSON without secrets, escaped where the encoding lacks a character."""
    text = json_text(value, scrubbed=True)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)
    print(text)


def console(*, stderr: bool = False) -> Any:
    """Rich's console for tables and styles. Names are printed as they are: '[...]' in one is no markup. What is piped
    is not wrapped."""
    from rich.console import Console
    from rich.segment import Segment

    class Clean(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
            for text, style, control in super().render(*arguments, **options):
                yield Segment(text if control else printable(scrub(text)), style, control)

    stream = sys.stderr if stderr else sys.stdout
    return Clean(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else 10_000)


def print_warning(table_console: Any, text: str, mark: str = "warning:") -> None:
    """Print a warning among tables. Its mark is magenta, which can be read on light and on dark backgrounds."""
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    row.add_row(Text(mark, "bold magenta"), text)
    table_console.print(row)
