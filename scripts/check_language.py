"""Checks code, docs and scripts for words that raymoe's prose avoids (CONTRIBUTING.md, Words).

    python scripts/check_language.py    # prints every finding; if there is one, the exit status is 1

A list of words can check some of the rules: processes are not called persons ("who", "nobody"), rates use "per"
("requests per hour"), and sentences begin with their subject (not "So does the driver", "What is left over ends").
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED = ("raymoe", "docs", "cluster", "examples", "scripts", "README.md")
SUFFIXES = frozenset({".py", ".md", ".sh", ".yaml", ".yml"})

_TIMES = "hour|minute|second|day"
_UNITS = (
    f"{_TIMES}|GB|MB|actor|expert|layer|shard|node|model|member|prompt|token|tensor|file|part|row|line|run|text|entry"
    "|step|column|page|object|job|merge|process|thread|adapter|kind|document|shape|block"
)
# Measures: they mean a rate without a number before them too.
_MEASURES = (
    "times|seconds|minutes|requests|bytes|tokens|kB|GB|MB|KiB|GiB|MiB|objects|actors|restarts|pieces|prompts|texts|rows"
    "|lines|files|GPUs|threads|words|weights|shards"
)
_NUMBER = r"\d[\d,.]*|an?|one|two|three|four|five|half|most|several|few"
_THINGS = (
    "actor|worker|GPU|entry|object|prompt|text|excerpt|tensor|token|value|row|line|file|copy|job|thread|process|restart|request"
    "|shard|column|word|entropy"
)
_RATES = (
    rf"(?:once|twice) an? (?:{_TIMES})",
    rf"(?:{_MEASURES}) an? (?:{_UNITS})",
    rf"(?:{_NUMBER}) (?:[\w-]+ )?(?:{_THINGS})s? an? (?:{_UNITS})",
)


def _words(pattern: str) -> re.Pattern[str]:
    """The pattern in upper or lower case; a space of it may be the end of a line, in comments too."""
    return re.compile(pattern.replace(" ", r"(?: +| *\n *(?:# )?)"), re.IGNORECASE)


RULES = {
    "name the thing: an actor, another process": _words(
        r"\b(?:who|whom|whoever|nobody|somebody|anybody|everybody|someone|anyone|everyone|no one)\b"
    ),
    "write 'per' for a rate": _words(rf"\b(?:{'|'.join(_RATES)})\b(?! (?:time|run|try|copy)\b)"),
    "begin with the subject": _words(r"\b(?:so|neither|nor) (?:is|are|do|does|did|has|have|was|were|can)\b(?![.'])"),
    "use the plain word: fix, correct": _words(r"\bmend(?:s|ed|ing)?\b"),
    "use the field's word: in flight": _words(r"\bunder way\b"),
    "write a whole sentence": re.compile(r"\b(?:Not so|To be (?:asked|told|seen|called))\b"),
}
# In pages only: in code, "What a shard's bytes are made of" may describe a class.
PAGE_RULES = {
    "begin with the subject, not with a clause": re.compile(
        r"(?:^[ >-]*|[.:] )What (?:is|was|has|can|no|finds|rots|stays|lacks|dies|needs)\b(?![^.]*\?)", re.MULTILINE
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """An excluded word: its file (relative to the root), its line from 1 on, the word, and what to write instead."""

    file: str
    line: int
    word: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word!r}: {self.remedy}"


def find_in_text(file: str, text: str) -> Iterator[Finding]:
    """The findings in the text of a file, rule by rule."""
    rules = RULES | PAGE_RULES if file.endswith(".md") else RULES
    for remedy, pattern in rules.items():
        for match in pattern.finditer(text):
            word = " ".join(match.group().replace("#", " ").split())
            yield Finding(file, text.count("\n", 0, match.start()) + 1, word, remedy)


def checked_files(root: Path) -> Iterator[Path]:
    """The files below `root` that are checked, but not this one, which lists the words."""
    for name in CHECKED:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in SUFFIXES and path.name != Path(__file__).name:
                yield path


def find_all(root: Path) -> dict[str, list[Finding]]:
    """Findings by file, for files that have any."""
    found = {}
    for path in checked_files(root):
        name = path.relative_to(root).as_posix()
        if findings := list(find_in_text(name, path.read_text(encoding="utf-8"))):
            found[name] = findings
    return found


def main() -> int:
    """Print what is found; the exit status."""
    findings = [each for found in find_all(ROOT).values() for each in found]
    print("".join(f"{each}\n" for each in findings), end="")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
