"""Plans which prompts one actor reads in one pass over a model's layers. Torch-free.

Prompts that need the same stored weights share a pass, so that each layer is loaded once for all of them. A pass holds
the states of all its tokens, so it takes no more prompts than fit `STATE_BYTES`; an expert with more prompts is read in
several parts. The number of parts depends only on the texts, and an expert's sums are added in the order of its parts.
So the routers do not depend on which actor reads which part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from raymoe.planning.plan import GatePrompts, WeightRef
from raymoe.sources.facts import SourceFile

STATE_BYTES = 2 << 30
"""The most bytes of the states of one pass, in float32, for the number of tokens that `text_tokens` estimates. English
has about half as many tokens as that; a tokenizer of single bytes has twice as many."""

_TEXT_BYTES_PER_TOKEN = 2
_TOKENS_PER_PROMPT = 8  # besides its text: BOS and similar tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(GatePrompts):
    """The share of an expert's prompts that is read in one pass: `part` of `parts`, counted from 0."""

    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        return f"{self.owner} (part {self.part + 1} of {self.parts})" if self.parts > 1 else str(self.owner)


def part_of(prompts: GatePrompts) -> tuple[int, int]:
    """Which part of the prompts is read, and of how many parts. Prompts that are not a `Reading` are part 0 of 1."""
    return (prompts.part, prompts.parts) if isinstance(prompts, Reading) else (0, 1)


def plan_readings(members: Sequence[GatePrompts], actors: int, hidden: int) -> list[tuple[Reading, ...]]:
    """The passes for `actors` that read in parallel; states have `hidden` dimensions.

    Each actor reads a model's layers once, not once per expert, if the base reads all prompts or the experts are one
    model with different adapters.
    """
    groups: list[list[GatePrompts]] = []
    groups_by_files: dict[tuple[SourceFile, ...], list[list[GatePrompts]]] = {}
    for member in members:
        # Only experts with the same files are compared, since there may be a thousand experts with different models.
        alike = groups_by_files.setdefault(_weight_files(member), [])
        group = next((group for group in alike if _same_but_adapters(group[0], member)), None)
        if group is None:
            group = []
            alike.append(group)
            groups.append(group)
        group.append(member)
    return [reading for group in groups for reading in _split_passes(group, max(1, actors), hidden)]


def _weight_files(member: GatePrompts) -> tuple[SourceFile, ...]:
    return tuple(dict.fromkeys(ref.entry.file for ref in member.weights.values()))


def _same_but_adapters(one: GatePrompts, other: GatePrompts) -> bool:
    if one.config != other.config or one.weights.keys() != other.weights.keys():
        return False
    if one.weights is other.weights:  # the base's, which all of its experts share
        return True
    return all(_stored(ref) == _stored(other.weights[name]) for name, ref in one.weights.items())


def _stored(ref: WeightRef) -> tuple[object, ...]:
    """A weight's identity without its adapter."""
    return ref.entry, ref.combined


def _split_passes(group: Sequence[GatePrompts], actors: int, hidden: int) -> Iterator[tuple[Reading, ...]]:
    parts = [part for member in group for part in _split_parts(member, hidden)]
    count = min(actors, len(parts))
    for start, end in pairwise(len(parts) * number // count for number in range(count + 1)):
        held = 0
        taken: list[Reading] = []
        for part in parts[start:end]:
            nbytes = _state_bytes(part, hidden) // part.parts
            if taken and held + nbytes > STATE_BYTES:
                yield tuple(taken)
                held, taken = 0, []
            held += nbytes
            taken.append(part)
        yield tuple(taken)


def _split_parts(member: GatePrompts, hidden: int) -> list[Reading]:
    count = max(1, -(-_state_bytes(member, hidden) // STATE_BYTES))
    plain = {field.name: getattr(member, field.name) for field in fields(GatePrompts)}
    return [Reading(**plain, part=part, parts=count) for part in range(count)]


def _state_bytes(member: GatePrompts, hidden: int) -> int:
    return 4 * hidden * sum(map(text_tokens, (*member.positive, *member.negative)))


def text_tokens(text: str) -> int:
    """An estimate of a text's tokens from its bytes alone."""
    return len(text.encode(errors="replace")) // _TEXT_BYTES_PER_TOKEN + _TOKENS_PER_PROMPT
