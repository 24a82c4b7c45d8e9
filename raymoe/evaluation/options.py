"""Options of an evaluation or a generation, and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from raymoe.compute import device_problems
from raymoe.config.source_positions import short_repr
from raymoe.errors import Problem
from raymoe.formatting import short_list
from raymoe.object_store.options import StorageOptions
from raymoe.planning.owner import Owner
from raymoe.sources.hub import HubOptions

AGAINST = ("base", "experts", "average", "oracle", "hidden")
NOTHING = "none"
MODEL = "model"
"""The name of the loss of a dense model that is evaluated."""
# Names of losses that are not those of further models. For a merge, `expert NAME` is taken too.
_NAMES_OF_A_MERGE = (*AGAINST, NOTHING, "merged", MODEL)
_NAMES_OF_A_DENSE_MODEL = (NOTHING, MODEL)
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NAME = re.compile(r"\w[\w .+-]{0,63}")


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
    """`against`: what the merge is compared with (None: all that the merge allows): comparisons by name, and further
    models as `NAME=MODEL`. `labels`: `label=expert` pairs for labels that are not an expert's name. `limit`: use only
    the first texts of each label (0: all). `max_tokens`: texts are cut to this many tokens. `experts_per_token`: the
    merge is evaluated with these numbers of experts for a token too."""

    against: tuple[str, ...] | None = None
    labels: tuple[str, ...] = ()
    limit: int = 0
    max_tokens: int = 512
    text_field: str = "text"
    label_field: str = "label"
    experts_per_token: tuple[int | str, ...] = ()

    @property
    def named(self) -> tuple[str, ...] | None:
        """The comparisons that were asked for by name; None if that was left to raymoe."""
        named = tuple(each for each in self.against or () if "=" not in each)
        return None if self.against is None or (self.against and not named) else named

    @property
    def comparisons(self) -> tuple[str, ...]:
        """What to compare with, in display order; further models not included."""
        return AGAINST if self.named is None else tuple(name for name in AGAINST if name in self.named)

    @property
    def models(self) -> dict[str, str]:
        """Further models to compare with, by their names."""
        pairs = (each.partition("=") for each in self.against or () if "=" in each)
        return {name.strip(): model.strip() for name, _, model in pairs}


def parse_against(values: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """'base, oracle' as ('base', 'oracle'); each `NAME=MODEL` is a value of its own. 'none' alone is an empty tuple."""
    if values is None:
        return None
    found: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        found += [value.strip()] if "=" in value else [name.strip().lower() for name in value.split(",")]
    return () if found == [NOTHING] else tuple(found)


def parse_experts_per_token(value: str | Sequence[int | str] | None) -> tuple[int | str, ...]:
    """'1,2,4' as (1, 2, 4). What is no number stays text, for `top_k_problems` to name."""
    if value is None:
        return ()
    found = [part.strip() if isinstance(part, str) else part for part in _split(value)]
    return tuple(int(part) if isinstance(part, str) and _INTEGER.fullmatch(part) else part for part in found)


def _split(value: str | Sequence[int | str]) -> Sequence[int | str]:
    return value.split(",") if isinstance(value, str) else value


def top_k_problems(options: EvaluationOptions, experts: int | None) -> Iterator[Problem]:
    """What is wrong with `experts_per_token`, in one problem. `experts`: how many there are; None if it is unknown."""
    chosen = options.experts_per_token
    numbers = [each for each in chosen if isinstance(each, int) and not isinstance(each, bool)]
    faults = [f"{short_repr(each)} is not a number" for each in chosen if each not in numbers or isinstance(each, bool)]
    faults += [f"{each} is below one" for each in numbers if each < 1]
    if experts is not None:
        faults += [f"{each} is more than the {experts} experts" for each in numbers if each > experts]
    faults += [f"{each} is given twice" for each in dict.fromkeys(numbers) if numbers.count(each) > 1]
    if faults:
        most = "the number of experts" if experts is None else str(experts)
        remedy = f"give different numbers from 1 to {most}, separated by commas"
        yield Problem(where="--experts-per-token", what=short_list(faults, most=3), remedy=remedy)


def option_problems(options: EvaluationOptions, *, of_merge: bool = True) -> Iterator[Problem]:
    """What is wrong with the options. `of_merge`: they are for a merge, and not for a dense model."""
    yield from device_problems(options.device)
    yield from _against_problems(options, of_merge=of_merge)
    if options.limit < 0:
        yield Problem(where="--limit", what=f"{options.limit} is below zero", remedy="give a number; 0 is all texts")
    if options.max_tokens < 2:
        what = f"{options.max_tokens} leaves nothing to predict"
        yield Problem(where="--max-tokens", what=what, remedy="give 2 or more")
    if options.text_field == options.label_field:
        what = f"{options.text_field!r} is the text's field too"
        yield Problem(where="--label-field", what=what, remedy="name two fields")


def _against_problems(options: EvaluationOptions, *, of_merge: bool) -> Iterator[Problem]:
    named = options.named or ()
    for name in named:
        if name not in (*AGAINST, NOTHING):
            close = get_close_matches(name, AGAINST, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            remedy = f"{hint}(any of {', '.join(AGAINST)}, or none, or NAME=MODEL)"
            yield Problem(where="--against", what=f"{name!r} is not a comparison", remedy=remedy)
    if NOTHING in named and len(set(named)) > 1:
        yield Problem(where="--against", what="'none' goes with no other comparison", remedy="leave out one of them")
    pairs = [each for each in options.against or () if "=" in each]
    if len(options.models) < len(pairs):
        yield Problem(where="--against", what="two models have one name", remedy="give each NAME=MODEL another name")
    taken = _NAMES_OF_A_MERGE if of_merge else _NAMES_OF_A_DENSE_MODEL
    for name, model in options.models.items():
        where = f"--against {name}={model}"
        if not _NAME.fullmatch(name):
            what = "the name has other characters than letters, digits, spaces and . + - _, or more than 64"
            yield Problem(where=where, what=what, remedy="write NAME=MODEL, such as law=org/law-model")
        elif name in taken or (of_merge and Owner.parse(name)):
            what = f"{name!r} is already the name of a loss"
            yield Problem(where=where, what=what, remedy="choose another name for the model")
        if not model:
            yield Problem(where=where, what="no model is named", remedy="write NAME=MODEL, such as law=org/law-model")


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
