"""What an edit is asked to change: checked as far as it can be without the mixture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymoe.errors import Problem, ProblemReport

_NUMBER = re.compile(r"[0-9]{1,6}")
_NUMBERED = re.compile(r"\s*([^=\s]*)\s*=\s*(.*\S)\s*", re.DOTALL)

ExpertSource = str | Mapping[str, Any]
"""A model as a config names it, or an entry of a config's `experts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """Changes of a mixture. Numbers are those that experts have in it, from 0.

    Attributes:
        add: Entries of a config's `experts`, in the order in which they come after those that stay.
        remove: The experts that are dropped.
        replace: The entries that take the places of experts.
        prompts: Positive prompts for experts that stay or are replaced, in place of those of the record.
        keep_routers: Experts that stay keep their router rows.
        keep_backbone: The backbone is that of the mixture, as it is.
        base_model: The dense base model, if it is not to be that of the record.
        gate_mode: The gate mode, if it is not to be that of the record.
        experts_per_token: How many experts work on a token, if not as many as before.
    """

    add: tuple[Mapping[str, Any], ...] = ()
    remove: tuple[int, ...] = ()
    replace: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    prompts: Mapping[int, Any] = field(default_factory=dict)
    keep_routers: bool = False
    keep_backbone: bool = False
    base_model: str | None = None
    gate_mode: str | None = None
    experts_per_token: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no expert changes."""
        return not (self.add or self.remove or self.replace)


def make_request(
    *,
    add: Sequence[ExpertSource] | Mapping[str, Any] = (),
    remove: Sequence[int | str] | int = (),
    replace: Mapping[int, ExpertSource] | Sequence[str] = (),
    prompts: Mapping[int, Any] | Sequence[str] = (),
    keep_routers: bool = False,
    keep_backbone: bool = False,
    base_model: str | None = None,
    gate_mode: str | None = None,
    experts_per_token: int | None = None,
) -> EditRequest:
    """The request of a command's options, or of Python's arguments.

    Args:
        add: Models, or entries of a config's `experts`.
        remove: Numbers of experts; a text may hold several, separated by commas.
        replace: `NUMBER=MODEL` texts, or a mapping.
        prompts: Files. `NUMBER=FILE` is for an expert of the mixture; the others are for the added models, in their
            order. Or a mapping from numbers of experts to what a config has as `positive_prompts`.
        keep_routers, keep_backbone, base_model, gate_mode, experts_per_token: As in `EditRequest`.

    One text, number or entry counts as a list of it: the letters of a name are no list of models.

    Returns:
        The request.

    Raises:
        ProblemReport: With everything that can't be read, names an expert twice, or changes a removed one.

    Example:
        >>> make_request(add=["org/law"], remove=["3"], replace=["1=org/code-2"]).remove
        (3,)
    """
    problems: list[Problem] = []
    added = [_entry(source) for source in ((add,) if isinstance(add, str | Mapping) else add)]
    removed = [
        number
        for each in ((remove,) if isinstance(remove, int | str) else remove)
        for number in _numbers(each, problems)
    ]
    replaced, pairs = _replacements(replace, problems)
    own, further = _prompts(prompts, problems)
    if len(further) > len(added):
        files = "1 file is for an added model" if len(further) == 1 else f"{len(further)} files are for added models"
        what = f"{files}, and {len(added) or 'none'} {'is' if len(added) < 2 else 'are'} added"
        remedy = "give --add for each, or write NUMBER=FILE for an expert of the mixture"
        problems.append(Problem(where="--prompts", what=what, remedy=remedy))
    for entry, file in zip(added, further, strict=False):
        entry["positive_prompts"] = {"file": file}
    for name, numbers in (("--remove", removed), ("--replace", pairs)):
        for number in [each for each, count in Counter(numbers).items() if count > 1]:
            what = f"expert {number} is named twice"
            problems.append(Problem(where=name, what=what, remedy="name each expert once"))
    for number in sorted(set(removed) & replaced.keys()):
        what = f"expert {number} is removed too"
        problems.append(Problem(where="--replace", what=what, remedy="remove it or replace it"))
    for number in sorted(set(removed) & own.keys()):
        what = f"expert {number} is removed, and needs no prompts"
        problems.append(Problem(where="--prompts", what=what, remedy="leave out one of them"))
    if problems:
        raise ProblemReport(problems)
    return EditRequest(
        add=tuple(added),
        remove=tuple(removed),
        replace=replaced,
        prompts=own,
        keep_routers=keep_routers,
        keep_backbone=keep_backbone,
        base_model=base_model,
        gate_mode=gate_mode,
        experts_per_token=experts_per_token,
    )


def _entry(source: ExpertSource) -> dict[str, Any]:
    return {"source_model": source} if isinstance(source, str) else dict(source)


def _numbers(value: int | str, problems: list[Problem]) -> Iterator[int]:
    for text in str(value).split(","):
        if _NUMBER.fullmatch(text.strip()):
            yield int(text)
        else:
            what = f"{text.strip()!r:.80} is not the number of an expert"
            problems.append(Problem(where="--remove", what=what, remedy="give numbers from 0, such as --remove 3"))


def _replacements(
    given: Mapping[int, ExpertSource] | Sequence[str], problems: list[Problem]
) -> tuple[dict[int, Mapping[str, Any]], list[int]]:
    """The entries by number, and all numbers as often as they were given."""
    if isinstance(given, Mapping):
        return {number: _entry(source) for number, source in given.items()}, list(given)
    found: list[tuple[int, Mapping[str, Any]]] = []
    for text in (given,) if isinstance(given, str) else given:
        match = _NUMBERED.fullmatch(text)
        if match is None or not _NUMBER.fullmatch(match[1]):
            what = f"{text!r:.200} is not NUMBER=MODEL"
            problems.append(Problem(where="--replace", what=what, remedy="write --replace 1=org/model"))
        else:
            found.append((int(match[1]), _entry(match[2])))
    return dict(found), [number for number, _ in found]


def _prompts(given: Mapping[int, Any] | Sequence[str], problems: list[Problem]) -> tuple[dict[int, Any], list[str]]:
    """Prompts by number of the expert, and files for added models."""
    if isinstance(given, Mapping):
        return dict(given), []
    own: dict[int, Any] = {}
    further = []
    for text in (given,) if isinstance(given, str) else given:
        match = _NUMBERED.fullmatch(text)
        if match is None or not _NUMBER.fullmatch(match[1]):
            further.append(text)
        elif int(match[1]) in own:
            what = f"expert {match[1]} has two files"
            problems.append(Problem(where="--prompts", what=what, remedy="give one file for each expert"))
        else:
            own[int(match[1])] = {"file": match[2]}
    return own, further
