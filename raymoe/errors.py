"""Errors for users.

A user's mistake is an ordinary value here: a `Problem` says what is wrong, where, and what to do about it. Everything
that looks at user input collects problems and raises one `ProblemReport` at the end, so that the user can fix a config
in one go and not one error at a time. The command line prints a report without a traceback and exits with its
`exit_code`; nothing below the command line calls `sys.exit`.

Messages quote text from outside: names of files, values of configs, answers of servers. None of them holds a secret, a
control character, or a line that looks like a message of its own (`raymoe.safe_text`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from typing import ParamSpec, TypeVar

from raymoe.formatting import number_ranges, short_list
from raymoe.safe_text import safe_message, shorten

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Of a line in a file, or of an item in a list.
_NUMBER = re.compile(r"(?<=:)\d{1,18}(?=:|$)|(?<=\[)\d{1,18}(?=\])", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that the user has to fix: where it is, what is wrong, and the remedy."""

    where: str
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "remedy"):
            object.__setattr__(self, name, shorten(safe_message(getattr(self, name))))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n    -> {self.remedy}" if self.remedy else text


def first_few(problems: Iterable[Problem], most: int = 5) -> list[Problem]:
    """The first problems of one kind, and a last one that says that there are more.

    One file can have any number of problems. A generator is not run to its end: each problem takes half a millisecond.

    Example: `problems += first_few(_name_problems(index))`.
    """
    first = list(islice(problems, most + 1))
    return [*first[:most], *(replace(each, what="and more problems of this kind") for each in first[most:])]


def install_remedy(extra: str) -> str:
    """How to install the packages of one of raymoe's extras, which also works without a clone."""
    try:
        lines = [line.partition(";") for line in metadata.requires("raymoe") or ()]
    except metadata.PackageNotFoundError:  # only its code is here, as in a job of a cluster
        lines = []
    wanted = f"extra == '{extra}'"
    packages = [shlex.quote(name.strip()) for name, _, marker in lines if marker.strip().replace('"', "'") == wanted]
    return f"pip install {' '.join(packages)}" if packages else f"install raymoe with its extra {extra}"


class RaymoeError(Exception):
    """Base of all errors whose message is written for the user. `exit_code` is the command's exit status."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(safe_message(each) if isinstance(each, str) else each for each in args))


class ProblemReport(RaymoeError):
    """Wrong usage or config: one or more problems, found before any work started.

    Attributes:
        problems: Every `Problem`, in the order in which they were found, as a tuple of at least one. Each has texts
            `where` (a file and its line, a key, an argument; may be empty), `what` and `remedy` (may be empty). The
            text of the report lists equal problems of several locations once.
        exit_code: The exit status of a command that ends with it.

    Example:
        try:
            raymoe.plan("config.yaml")
        except raymoe.ProblemReport as report:
            places = [problem.where for problem in report.problems]
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]):
        assert problems, "a report without problems"
        self.problems = tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        problems = _merge_repeated(self.problems)
        if len(problems) == 1:
            return str(problems[0])
        head = f"{len(problems)} problems:"
        return "\n".join([head, *(f"  {str(p).replace(chr(10), chr(10) + '  ')}" for p in problems)])

    def __reduce__(self) -> tuple[type[ProblemReport], tuple[tuple[Problem, ...]]]:
        # Exception's own pickling would hand the formatted text to __init__ (reports cross process borders on Ray).
        return type(self), (self.problems,)


def _merge_repeated(problems: Sequence[Problem]) -> list[Problem]:
    """`problems` with one for all places of the same problem, in the order of the first ones."""
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    for problem in problems:
        same_problem = places.setdefault((problem.what, problem.remedy), {})
        same_problem.setdefault(_NUMBER.sub("\0", problem.where), []).append(problem.where)
    return [
        Problem(
            where=short_list([_join_locations(wheres) for wheres in same_problem.values()], separator="; "),
            what=what,
            remedy=remedy,
        )
        for (what, remedy), same_problem in places.items()
    ]


def _join_locations(wheres: Sequence[str]) -> str:
    """Locations that differ in numbers only, as one: `a.yaml:6: experts[0]` and `a.yaml:9: experts[1]` are
    `a.yaml:6, 9: experts[0-1]`.
    """
    columns = zip(*([int(number) for number in _NUMBER.findall(where)] for where in wheres))
    numbers = (number_ranges(sorted(set(column))) for column in columns)
    return _NUMBER.sub(lambda match: next(numbers), wheres[0])


class ProblemCollector:
    """Runs steps and keeps their problems, so that all of them are in one report.

    `kind` is the exception that steps may raise and `report` returns; other exceptions propagate.

    Example:
        collector = ProblemCollector()
        texts = collector.run(read_texts, data)
        model = collector.run(open_model, location)
        if collector.problems or texts is None or model is None:
            raise collector.report()
    """

    def __init__(self, problems: Iterable[Problem] = (), *, kind: type[ProblemReport] = ProblemReport):
        self.problems = list(problems)
        self._kind = kind

    def run(self, step: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """Return what the step returns, or None if it raises a report: then its problems are kept."""
        try:
            return step(*args, **kwargs)
        except self._kind as report:
            self.problems += report.problems
            return None

    def report(self) -> ProblemReport:
        """The exception with all problems, each once."""
        return self._kind(list(dict.fromkeys(self.problems)))


class CheckpointError(ProblemReport):
    """A checkpoint (or adapter) on disk or on the Hub that can't be used: missing, truncated, malformed, quantized."""


class MergeFailed(RaymoeError):
    """A merge that had begun could not be finished; the message says what happened where.

    The same merge, run again, resumes from the finished shards.
    """
