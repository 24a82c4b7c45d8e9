"""Finds the one-line change that makes valid YAML of a config with a syntax error.

YAML's parser says what its grammar expected at the place where it gave up. The mistake is often in a line before that
place: an indentation, a colon, a dash or a quote. So the changes that fix common mistakes are tried on the lines
around it, and the one that leaves the fewest problems is proposed. The file itself is not changed.
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
from raymoe.config.source_positions import short_text
from raymoe.formatting import plural

_LINES_BEFORE = 3
_MAX_LINES = 40
_MAX_SHIFT = 8
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Work is bounded by the characters that are parsed (a second or two), so that a large file gets fewer tries.
_MAX_PARSED = 100_000 if _LOADER is yaml.SafeLoader else 2_000_000
_MAX_READ, _MAX_SCORED = 60_000, 8
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
class Fix:
    """`lines` are the new lines from number `first` (from 0) on. `commonness`: how many lines look like that."""

    first: int
    lines: tuple[str, ...]
    what: str
    remedy: str
    commonness: int = 0


def find_fix(text: str, error: yaml.MarkedYAMLError, count_problems: Callable[[str], int]) -> Fix | None:
    """The change of `text` that fixes `error`, or None if no known change does.

    `count_problems` counts the problems of a text that is YAML.
    """
    if error.problem_mark is None or not isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError)):
        return None
    lines = text.split("\n")
    at = _last_content_line(lines, error.problem_mark.line)
    begin = min(at - _LINES_BEFORE, error.context_mark.line if error.context_mark else at)
    numbers = [number for number in range(at, max(-1, begin - 1, at - _MAX_LINES), -1) if _has_content(lines[number])]
    parsed = [
        (reached, fix)
        for fix in islice(_candidate_fixes(lines, numbers), _MAX_PARSED // (len(text) + 1))
        if (reached := _first_bad_line(_apply_fix(lines, fix))) > error.problem_mark.line
    ]
    if not parsed:
        return None
    furthest = max(reached for reached, _ in parsed)
    best = sorted((fix for reached, fix in parsed if reached == furthest), key=lambda c: -c.commonness)
    # Compare only the text that the parser has reached: problems after it say nothing about the change.
    texts = ["\n".join(_apply_fix(lines, fix).split("\n")[:furthest]) for fix in best]
    scored = list(islice(zip(best, texts), min(_MAX_SCORED, 1 + _MAX_READ // (len(text) + 1))))
    return min(scored, key=lambda pair: count_problems(pair[1]))[0]


def _has_content(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _last_content_line(lines: Sequence[str], number: int) -> int:
    """The line of this number, or the last before it that is neither blank nor a comment."""
    while number > 0 and (number >= len(lines) or not _has_content(lines[number])):
        number -= 1
    return number


def _apply_fix(lines: Sequence[str], fix: Fix) -> str:
    return "\n".join([*lines[: fix.first], *fix.lines, *lines[fix.first + len(fix.lines) :]])


def _first_bad_line(text: str) -> int:
    """The number of the line (from 0) where the text stops being YAML; the number of lines if all of it is."""
    try:
        for _ in yaml.parse(text, Loader=_LOADER):
            pass
    except yaml.MarkedYAMLError as error:
        return int(error.problem_mark.line) if error.problem_mark else 0
    except yaml.YAMLError:
        return 0
    return text.count("\n") + 1


def _candidate_fixes(lines: Sequence[str], numbers: Sequence[int]) -> Iterator[Fix]:
    """All changes of these lines, those of likelier mistakes first."""
    for number in numbers:
        for kind in (_look_alike_fixes, _colon_fixes, _dash_fixes, _bracket_fixes, _quote_fixes, _indent_fixes):
            yield from kind(lines, number)


def _line_fix(number: int, line: str, what: str, remedy: str, *, sure: bool = False) -> Fix:
    """`sure`: the line is hardly ever meant as it is."""
    return Fix(first=number, lines=(line,), what=what, remedy=remedy, commonness=_SURE if sure else 0)


def _write_remedy(line: str) -> str:
    return f"write: {short_text(line.strip(), 200)}"


def _look_alike_fixes(lines: Sequence[str], number: int) -> Iterator[Fix]:
    found = [char for char in _LOOK_ALIKES if char in lines[number]]
    if found:
        line = lines[number]
        for char in found:
            line = line.replace(char, _LOOK_ALIKES[char])
        codes = ", ".join(f"U+{ord(char):04X}" for char in found)
        what = f"a space, quote or colon is not the ordinary one ({codes})"
        yield _line_fix(number, line, what, f"type it again; {_write_remedy(line)}", sure=True)


def _colon_fixes(lines: Sequence[str], number: int) -> Iterator[Fix]:
    if match := _NO_SPACE.fullmatch(lines[number]):
        line = f"{match[1]}{match[2]}: {match[3]}"
        yield _line_fix(
            number, line, f"there is no space after the colon of '{match[2]}:'", _write_remedy(line), sure=True
        )
    if match := _NO_COLON.fullmatch(lines[number]):
        line = f"{match[1]}{match[2]}: {match[3]}".rstrip()
        yield _line_fix(number, line, f"there is no colon after '{match[2]}'", _write_remedy(line), sure=True)


def _dash_fixes(lines: Sequence[str], number: int) -> Iterator[Fix]:
    line = lines[number]
    if match := _TAB_AFTER_DASH.fullmatch(line):
        spaced = f"{match[1]}- {match[2]}"
        yield _line_fix(number, spaced, "there is a tab after the dash", _write_remedy(spaced), sure=True)
    elif match := _NO_DASH_SPACE.fullmatch(line):
        spaced = f"{match[1]}- {match[2]}"
        yield _line_fix(number, spaced, "there is no space after the dash", _write_remedy(spaced), sure=True)
    content = line.strip()
    if content.startswith("- "):
        return
    what = "an item of a list has no dash"
    if _NEW_EXPERT.match(line):
        expert = f"{' ' * max(0, _indent(line) - 2)}- {content}"
        yield _line_fix(number, expert, what, "begin each expert with '- source_model: ...'")
    for near in (number - 1, number + 1):
        if 0 <= near < len(lines) and lines[near].lstrip().startswith("- "):
            item = f"{' ' * _indent(lines[near])}- {content}"
            yield _line_fix(number, item, what, _write_remedy(item))
            return


def _quote_fixes(lines: Sequence[str], number: int) -> Iterator[Fix]:
    match = _LINE.fullmatch(lines[number])
    if match is None or not match["value"] or match["value"].startswith("\t"):
        return
    value = match["value"]
    head = lines[number][: match.start("value")]
    first, last = value[0], value[-1]
    if first in "\"'" and (last != first or len(value) == 1):
        yield _line_fix(number, head + value + first, f"the quote {first} is not closed", _write_remedy(value + first))
    elif first in "\"'":
        quoted = _quote(value[1:-1], other=first)
        what = f"the text holds the quote {first} that is around it, or a backslash"
        yield _line_fix(number, head + quoted, what, f"put other quotes around it: {short_text(quoted, 200)}")
    elif last in "\"'":
        yield _line_fix(number, head + last + value, f"the quote {last} is not opened", _write_remedy(last + value))
    else:
        for text in (value, f"{match['key'] or ''}{value}"):
            quoted = _quote(text)
            what = f"'{short_text(text)}' holds characters that have a meaning in YAML"
            line = lines[number].rstrip().removesuffix(text) + quoted
            yield _line_fix(number, line, what, f"put it in quotes: {short_text(quoted, 200)}")


def _quote(value: str, other: str = "") -> str:
    """`value` in quotes that need no escapes, if possible; not in the quote `other`."""
    if other != '"' and '"' not in value and "\\" not in value:
        return f'"{value}"'
    return "'" + value.replace("'", "''") + "'"


def _bracket_fixes(lines: Sequence[str], number: int) -> Iterator[Fix]:
    line = lines[number].rstrip()
    for begin, end in ("[]", "{}"):
        missing = line.count(begin) - line.count(end)
        if missing > 0:
            yield _line_fix(
                number, line + end * missing, f"the bracket {begin} is not closed", _write_remedy(line + end * missing)
            )
        elif missing < 0 and line.endswith(end):
            yield _line_fix(number, line[:missing], f"the bracket {end} closes nothing", _write_remedy(line[:missing]))
    if "[" in line and (commas := _NO_COMMA.sub(r"\1, ", line)) != line:
        yield _line_fix(number, commas, "there is no comma between two texts", _write_remedy(commas))


def _indent_fixes(lines: Sequence[str], number: int) -> Iterator[Fix]:
    """The line, or all items of the list that begins here, at each indentation that the file has."""
    line = lines[number]
    now, is_item, has_tab = _indent(line), line.lstrip().startswith("- "), _is_tabbed(line)
    same_indent = Counter(
        _indent(each) for each in lines if _has_content(each) and each.lstrip().startswith("- ") == is_item
    )
    for indent in sorted({*same_indent, *(_content(each) for each in lines if each.lstrip().startswith("- "))}):
        if (indent == now and not has_tab) or abs(indent - now) > _MAX_SHIFT:
            continue
        group = [line]
        for each in lines[number + 1 :] if is_item else ():
            if _indent(each) != now or not each.lstrip().startswith("- "):
                break
            group.append(each)
        what = f"'{short_text(line.strip())}' {_indented(line)}"
        remedy = f"indent it by {_spaces(indent)}" if indent or has_tab else "do not indent it"
        for count in sorted({1, len(group)}):
            moved = tuple(" " * indent + each.lstrip() for each in group[:count])
            more = f", and the {count - 1} after it" if count > 1 else ""
            yield Fix(first=number, lines=moved, what=what, remedy=remedy + more, commonness=same_indent[indent])


def _indented(line: str) -> str:
    if _is_tabbed(line):
        return "is indented with a tab, where YAML takes spaces only"
    by = f"is indented by {_spaces(_indent(line))}" if _indent(line) else "is not indented"
    return f"{by}, which fits no line around it"


def _is_tabbed(line: str) -> bool:
    return "\t" in line[: len(line) - len(line.lstrip())]


def _spaces(count: int) -> str:
    return f"{count} {plural('space', count)}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _content(line: str) -> int:
    """The column where the text after the dash begins."""
    return len(line) - len(line.lstrip(" -"))
