"""Options of an evaluation or a generation, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from raymoe.compute import device_problems
from raymoe.errors import Problem
from raymoe.object_store.options import StorageOptions
from raymoe.sources.hub import HubOptions

AGAINST = ("base", "experts", "oracle", "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """How a finished merge is read and run. `device`: `cpu`, `cuda` or None (a GPU if there is one). `trust_record`:
    use the S3 endpoint and profile in the merge's record."""

    device: str | None = None
    trust_remote_code: bool = False
    trust_record: bool = False
    quiet: bool = False
    hub: HubOptions = field(default_factory=HubOptions)
    storage: StorageOptions = field(default_factory=StorageOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions(ReadingOptions):
    """`max_new_tokens`: the longest answer; 0 only reads the prompts. `chat`: each prompt is one user turn in the
    tokenizer's chat template. `temperature`: 0 takes the most likely token; above 0, tokens are sampled with `seed`.
    `per_token`: the result also has the experts of each token."""

    max_new_tokens: int = 64
    chat: bool = False
    temperature: float = 0.0
    seed: int = 0
    per_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions(ReadingOptions):
    """`against`: what the merge is compared with (None: all that the merge allows). `labels`: `label=expert` pairs for
    labels that are not an expert's name. `limit`: use only the first texts of each label (0: all). `max_tokens`: texts
    are cut to this many tokens."""

    against: tuple[str, ...] | None = None
    labels: tuple[str, ...] = ()
    limit: int = 0
    max_tokens: int = 512
    text_field: str = "text"
    label_field: str = "label"

    @property
    def comparisons(self) -> tuple[str, ...]:
        """What to compare with, in display order."""
        return AGAINST if self.against is None else tuple(name for name in AGAINST if name in self.against)


def parse_against(text: str | None) -> tuple[str, ...] | None:
    """'base, oracle' as ('base', 'oracle'); 'none' is an empty tuple."""
    if text is None:
        return None
    names = [name.strip().lower() for name in text.split(",")]
    return () if names == ["none"] else tuple(names)


def option_problems(options: EvaluationOptions) -> Iterator[Problem]:
    yield from device_problems(options.device)
    for name in options.against or ():
        if name not in AGAINST:
            close = get_close_matches(name, AGAINST, n=1)
            remedy = f"{f'did you mean {close[0]}? ' if close else ''}(any of {', '.join(AGAINST)}, or none)"
            yield Problem(where="--against", what=f"{name!r} is not a comparison", remedy=remedy)
    if options.limit < 0:
        yield Problem(where="--limit", what=f"{options.limit} is below zero", remedy="give a number; 0 is all texts")
    if options.max_tokens < 2:
        what = f"{options.max_tokens} leaves nothing to predict"
        yield Problem(where="--max-tokens", what=what, remedy="give 2 or more")
    if options.text_field == options.label_field:
        what = f"{options.text_field!r} is the text's field too"
        yield Problem(where="--label-field", what=what, remedy="name two fields")


def generation_problems(options: GenerationOptions) -> Iterator[Problem]:
    yield from device_problems(options.device)
    if options.max_new_tokens < 0:
        what, remedy = f"{options.max_new_tokens} is below zero", "give a number; 0 only reads the prompts"
        yield Problem(where="--max-new-tokens", what=what, remedy=remedy)
    if not 0 <= options.temperature < math.inf:
        what, remedy = f"{options.temperature} is not a temperature", "give 0 or more; 0 takes the most likely token"
        yield Problem(where="--temperature", what=what, remedy=remedy)
    if not 0 <= options.seed < 2**63:
        yield Problem(where="--seed", what=f"{options.seed} is not a seed", remedy="give a number from 0 to 2^63 - 1")


def label_pair_problem(pair: str, names: Sequence[str]) -> Problem:
    """The problem of an invalid `--label` value."""
    label, equals, expert = (part.strip() for part in pair.partition("="))
    if not (label and equals and expert):
        what = f"{pair!r} is not LABEL=EXPERT"
    elif names.count(expert) > 1:
        what = f"{pair!r}: {expert!r} is the name of {names.count(expert)} experts"
    else:
        what = f"{pair!r}: there is no expert {expert!r}"
    known = ", ".join(dict.fromkeys(names))
    remedy = f"write LABEL=EXPERT with one of {known}, or a number from 0 to {len(names) - 1}"
    return Problem(where="--label", what=what, remedy=remedy)
