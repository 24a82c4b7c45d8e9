"""How long prompts are in tokens, without torch or transformers: for estimates only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from raymoe.errors import ProblemReport
from raymoe.object_store.location import LocationKind
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePlan, MergePlan, PromptPlan
from raymoe.routers.prompt_passes import text_tokens
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import fetch_file
from raymoe.sources.tokenizer_files import plain_tokenizer, tokenizer_guard

_FILE = "tokenizer.json"
_TEMPLATE_TOKENS = 32  # that a chat template adds to a prompt
_TEXTS_AT_ONCE = 256  # that are tokenized at once


def prompt_lengths(
    plan: PromptPlan, *, exact: bool = True, hub: HubOptions | None = None
) -> dict[Owner, tuple[list[int], list[int]]]:
    """Tokens of each expert's positive and negative prompts, by owner.

    The tokenizer counts them if `exact` and its tokenizer.json is on this machine; otherwise they are estimated from
    the texts. `hub` says where the Hub's cache is; nothing is downloaded. A chat template counts as a few tokens.
    """
    tokenizer = _tokenizer(plan, hub or HubOptions()) if exact else None
    lengths = {}
    for member in plan.members:
        more = _TEMPLATE_TOKENS if member.chat_template else 0
        positive, negative = (
            [length + more for length in _lengths(tokenizer, texts)] for texts in (member.positive, member.negative)
        )
        lengths[member.owner] = (positive, negative)
    return lengths


def reading_work(plan: PromptPlan, *, hub: HubOptions | None = None) -> int:
    """The work of reading all experts' prompts, in tokens x layers, as `prompt_lengths` counts them."""
    if not plan.runs_model:
        return 0
    lengths = prompt_lengths(plan, hub=hub)
    return plan.layers * sum(sum(positive) + sum(negative) for positive, negative in lengths.values())


def plan_work(plan: MergePlan, *, hub: HubOptions | None = None) -> int:
    """The work of reading all prompts of a merge, for its backbone and its routers, in tokens x layers."""
    return sum(reading_work(prompts, hub=hub) for prompts in plan.prompt_plans)


def count_distinct_tokens(plan: GatePlan, *, hub: HubOptions | None = None) -> int | None:
    """The most distinct tokens in the prompts of one expert, counted by the tokenizer; None if its tokenizer.json is
    not on this machine. `hub` as in `prompt_lengths`."""
    tokenizer, most = _tokenizer(plan, hub or HubOptions()), 0
    for member in plan.members:
        ids: set[int] = set()
        for some in _groups((*member.positive, *member.negative)):
            if (found := _ids(tokenizer, some)) is None:
                return None
            ids.update(*found)
        most = max(most, len(ids) + (_TEMPLATE_TOKENS if member.chat_template else 0))
    return most


def _lengths(tokenizer: Any, texts: Sequence[str]) -> Iterator[int]:
    for some in _groups(texts):
        found = _ids(tokenizer, some)
        yield from map(text_tokens, some) if found is None else map(len, found)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        yield list(texts[start : start + _TEXTS_AT_ONCE])


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]] | None:
    """The texts' tokens; None without a tokenizer, or if it can't read a text: the merge reports what is wrong."""
    if tokenizer is None:
        return None
    try:
        with tokenizer_guard(_FILE, "it can't read a text"):
            return [each.ids for each in tokenizer.encode_batch_fast(texts)]
    except ProblemReport:
        return None


def _tokenizer(plan: PromptPlan, hub: HubOptions) -> Any:
    """The tokenizer; None without a readable file: the merge reports what is wrong with it."""
    for side in plan.tokenizer_files:
        if side.name == _FILE and side.file.kind is not LocationKind.S3:
            try:
                return plain_tokenizer(fetch_file(side.file, replace(hub, offline=True)).read_bytes(), _FILE)
            except (ProblemReport, OSError):
                return None
    return None
