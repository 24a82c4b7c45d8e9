"""What to change in a config that is no YAML: the one line whose change makes it one.

YAML's parser says what its grammar expected at the place where it gave up. The mistake is often in a line before that
place: an indentation, a colon, a dash or a quote. So the changes that mend common mistakes are tried on the lines
around it, and the one with which the text reads best is proposed. The file itself is not changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import yaml

from raymoe.config.prompt_sources import PromptFile
from raymoe.config.schema import ExpertConfig, MergeConfig
from raymoe.config.source_positions import excerpt

__all__ = ["Change", "find_change"]

_LINES_BEFORE = 3
_MOST_LINES = 40
_MOST_SHIFT = 8
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Work is bounded by the characters that are parsed (a second or two), so that a large file gets fewer tries.
_MOST_PARSED = 100_000 if _LOADER is yaml.SafeLoader else 2_000_000
_MOST_READ, _MOST_SCORED = 60_000, 8
_SURE = 1_000_000  # more than any count of lines that are alike
_KEYS = "|".join({*MergeConfig.model_fields, *ExpertConfig.model_fields, *PromptFile.model_fields})
_LINE = re.compile(r"(?P<indent> *)(?P<dash>-[ ]+)?(?P<key>[\w-]+: +)?(?P<value>.*?) *")
_NO_SPACE = re.compile(rf"( *(?:- +)?)({_KEYS}):(\S.*)")
_NO_COLON = re.compile(rf"( *(?:- +)?)({_KEYS})(?: *= *| *)(.*)")
_TAB_AFTER_DASH = re.compile(r"( *)-[ \t]*\t[ \t]*(\S.*)")
_NO_DASH_SPACE = re.compile(r"( *)-([^\s-].*)")
_NEW_EXPERT = re.compile(r" *source_model *:")
_NO_COMMA = re.compile(r"""(["'])\s+(?=["'])""")
# Characters that look like one of YAML's: spaces of typesetters, quotes and colons of other keyboards.
_LOOK_ALIKES = {"\u00a0": " ", "\u202f": " ", "\u3000": " ", "\u200b": "", "\ufeff": ""}
_LOOK_ALIKES |= {"\uff1a": ": ", "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """`lines` are the new lines from number `first` (from 0) on. `commonness`: how many lines look like that."""

    first: int
    lines: tuple[str, ...]
    what: str
    remedy: str
    commonness: int = 0


def find_change(text: str, error: yaml.MarkedYAMLError, count_problems: Callable[[str], int]) -> Change | None:
    """The change of `text` that mends `error`, or None if none of those that are known does.

    `count_problems` says how much is wrong with a text that is YAML.
    """
    if error.problem_mark is None or not isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError)):
        return None
    lines = text.split("\n")
    at = _last_written(lines, error.problem_mark.line)
    begin = min(at - _LINES_BEFORE, error.context_mark.line if error.context_mark else at)
    numbers = [number for number in range(at, max(-1, begin - 1, at - _MOST_LINES), -1) if _is_written(lines[number])]
    parsed = [
        (reached, change)
        for change in islice(_changes(lines, numbers), _MOST_PARSED // (len(text) + 1))
        if (reached := _reached(_changed(lines, change))) > error.problem_mark.line
    ]
    if not parsed:
        return None
    furthest = max(reached for reached, _ in parsed)
    best = sorted((change for reached, change in parsed if reached == furthest), key=lambda c: -c.commonness)
    # What is wrong behind the place that is reached says nothing.
    texts = ["\n".join(_changed(lines, change).split("\n")[:furthest]) for change in best]
    scored = list(islice(zip(best, texts), min(_MOST_SCORED, 1 + _MOST_READ // (len(text) + 1))))
    return min(scored, key=lambda pair: count_problems(pair[1]))[0]


def _is_written(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _last_written(lines: Sequence[str], number: int) -> int:
    """The line of this number, or the last before it that is neither blank nor a comment."""
    while number > 0 and (number >= len(lines) or not _is_written(lines[number])):
        number -= 1
    return number


def _changed(lines: Sequence[str], change: Change) -> str:
    return "\n".join([*lines[: change.first], *change.lines, *lines[change.first + len(change.lines) :]])


def _reached(text: str) -> int:
    """The number of the line (from 0) where it stops to be YAML; the number of lines if it does not."""
    try:
        for _ in yaml.parse(text, Loader=_LOADER):
            pass
    except yaml.MarkedYAMLError as error:
        return int(error.problem_mark.line) if error.problem_mark else 0
    except yaml.YAMLError:
        return 0
    return text.count("\n") + 1


def _changes(lines: Sequence[str], numbers: Sequence[int]) -> Iterator[Change]:
    """All changes of these lines, those first that are the likelier mistakes."""
    for number in numbers:
        for kind in (_look_alikes, _colons, _dashes, _brackets, _quotes, _indents):
            yield from kind(lines, number)


def _one(number: int, line: str, what: str, remedy: str, *, sure: bool = False) -> Change:
    """`sure`: the line is hardly ever meant as it is."""
    return Change(first=number, lines=(line,), what=what, remedy=remedy, commonness=_SURE if sure else 0)


def _write(line: str) -> str:
    return f"write: {excerpt(line.strip(), 200)}"


def _look_alikes(lines: Sequence[str], number: int) -> Iterator[Change]:
    found = [char for char in _LOOK_ALIKES if char in lines[number]]
    if found:
        line = lines[number]
        for char in found:
            line = line.replace(char, _LOOK_ALIKES[char])
        codes = ", ".join(f"U+{ord(char):04X}" for char in found)
        what = f"a space, quote or colon is not the ordinary one ({codes})"
        yield _one(number, line, what, f"type it again; {_write(line)}", sure=True)


def _colons(lines: Sequence[str], number: int) -> Iterator[Change]:
    if match := _NO_SPACE.fullmatch(lines[number]):
        line = f"{match[1]}{match[2]}: {match[3]}"
        yield _one(number, line, f"there is no space after the colon of '{match[2]}:'", _write(line), sure=True)
    if match := _NO_COLON.fullmatch(lines[number]):
        line = f"{match[1]}{match[2]}: {match[3]}".rstrip()
        yield _one(number, line, f"there is no colon after '{match[2]}'", _write(line), sure=True)


def _dashes(lines: Sequence[str], number: int) -> Iterator[Change]:
    line = lines[number]
    if match := _TAB_AFTER_DASH.fullmatch(line):
        spaced = f"{match[1]}- {match[2]}"
        yield _one(number, spaced, "there is a tab after the dash", _write(spaced), sure=True)
    elif match := _NO_DASH_SPACE.fullmatch(line):
        spaced = f"{match[1]}- {match[2]}"
        yield _one(number, spaced, "there is no space after the dash", _write(spaced), sure=True)
    content = line.strip()
    if content.startswith("- "):
        return
    what = "an item of a list has no dash"
    if _NEW_EXPERT.match(line):
        expert = f"{' ' * max(0, _indent(line) - 2)}- {content}"
        yield _one(number, expert, what, "begin each expert with '- source_model: ...'")
    for near in (number - 1, number + 1):
        if 0 <= near < len(lines) and lines[near].lstrip().startswith("- "):
            item = f"{' ' * _indent(lines[near])}- {content}"
            yield _one(number, item, what, _write(item))
            return


def _quotes(lines: Sequence[str], number: int) -> Iterator[Change]:
    match = _LINE.fullmatch(lines[number])
    if match is None or not match["value"] or match["value"].startswith("\t"):
        return
    value = match["value"]
    head = lines[number][: match.start("value")]
    first, last = value[0], value[-1]
    if first in "\"'" and (last != first or len(value) == 1):
        yield _one(number, head + value + first, f"the quote {first} is not closed", _write(value + first))
    elif first in "\"'":
        quoted = _quoted(value[1:-1], other=first)
        what = f"the text holds the quote {first} that is around it, or a backslash"
        yield _one(number, head + quoted, what, f"put other quotes around it: {excerpt(quoted, 200)}")
    elif last in "\"'":
        yield _one(number, head + last + value, f"the quote {last} is not opened", _write(last + value))
    else:
        for text in (value, f"{match['key'] or ''}{value}"):
            quoted = _quoted(text)
            what = f"'{excerpt(text)}' holds signs that have a meaning in YAML"
            line = lines[number].rstrip().removesuffix(text) + quoted
            yield _one(number, line, what, f"put it in quotes: {excerpt(quoted, 200)}")


def _quoted(value: str, other: str = "") -> str:
    """In quotes that hold it as it is, if possible; not in those of `other`."""
    if other != '"' and '"' not in value and "\\" not in value:
        return f'"{value}"'
    return "'" + value.replace("'", "''") + "'"


def _brackets(lines: Sequence[str], number: int) -> Iterator[Change]:
    line = lines[number].rstrip()
    for begin, end in ("[]", "{}"):
        missing = line.count(begin) - line.count(end)
        if missing > 0:
            yield _one(number, line + end * missing, f"the bracket {begin} is not closed", _write(line + end * missing))
        elif missing < 0 and line.endswith(end):
            yield _one(number, line[:missing], f"the bracket {end} closes nothing", _write(line[:missing]))
    if "[" in line and (commas := _NO_COMMA.sub(r"\1, ", line)) != line:
        yield _one(number, commas, "there is no comma between two texts", _write(commas))


def _indents(lines: Sequence[str], number: int) -> Iterator[Change]:
    """The line, or all items of the list that begins here, at each indentation that the file has."""
    line = lines[number]
    now, is_item, has_tab = _indent(line), line.lstrip().startswith("- "), _is_tabbed(line)
    alike = Counter(_indent(each) for each in lines if _is_written(each) and each.lstrip().startswith("- ") == is_item)
    for indent in sorted({*alike, *(_content(each) for each in lines if each.lstrip().startswith("- "))}):
        if (indent == now and not has_tab) or abs(indent - now) > _MOST_SHIFT:
            continue
        group = [line]
        for each in lines[number + 1 :] if is_item else ():
            if _indent(each) != now or not each.lstrip().startswith("- "):
                break
            group.append(each)
        what = f"'{excerpt(line.strip())}' {_indented(line)}"
        remedy = f"indent it by {_spaces(indent)}" if indent or has_tab else "do not indent it"
        for count in sorted({1, len(group)}):
            moved = tuple(" " * indent + each.lstrip() for each in group[:count])
            more = f", and the {count - 1} after it" if count > 1 else ""
            yield Change(first=number, lines=moved, what=what, remedy=remedy + more, commonness=alike[indent])


def _indented(line: str) -> str:
    if _is_tabbed(line):
        return "is indented with a tab, where YAML takes spaces only"
    by = f"is indented by {_spaces(_indent(line))}" if _indent(line) else "is not indented"
    return f"{by}, which fits no line around it"


def _is_tabbed(line: str) -> bool:
    return "\t" in line[: len(line) - len(line.lstrip())]


def _spaces(count: int) -> str:
    return f"{count} space{'s' * (count != 1)}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _content(line: str) -> int:
    """Where what follows the dash begins."""
    return len(line) - len(line.lstrip(" -"))
