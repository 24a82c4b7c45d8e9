"""How long prompts are in tokens, without torch or transformers: for estimates, not for what is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymoe.errors import CheckpointError
from raymoe.gates.readings import text_tokens
from raymoe.planning.types import GatePlan
from raymoe.sources.resolve import HubOptions, fetch_file

__all__ = ["prompt_lengths"]

_FILE = "tokenizer.json"
_TEMPLATE_TOKENS = 32  # what a chat template writes around a prompt


def prompt_lengths(gates: GatePlan, *, exact: bool = True) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens of each member's positive and negative prompts, by owner.

    Counted by the tokenizer where it is a tokenizer.json on this machine and `exact` is asked for; else estimated from
    the texts. A chat template is taken to add a few tokens.
    """
    tokenizer = _tokenizer(gates) if exact else None
    lengths = {}
    for member in (*gates.experts, *gates.shared):
        more = _TEMPLATE_TOKENS if member.chat_template else 0
        positive, negative = (_lengths(tokenizer, texts, more) for texts in (member.positive, member.negative))
        lengths[member.owner] = (positive, negative)
    return lengths


def _lengths(tokenizer: Any, texts: Sequence[str], more: int) -> list[int]:
    if tokenizer is None:
        return [text_tokens(text) + more for text in texts]
    return [len(found.ids) + more for found in tokenizer.encode_batch_fast(list(texts))]


def _tokenizer(gates: GatePlan) -> Any:
    path = _local_file(gates)
    if path is None:
        return None
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except Exception:  # not installed, or a file that it can't read: merging tells what is wrong with it
        return None


def _local_file(gates: GatePlan) -> Path | None:
    for side in gates.tokenizer_files:
        if side.name == _FILE and not side.file.location.startswith("s3://"):
            try:
                return fetch_file(side.file, HubOptions())
            except CheckpointError:
                return None
    return None
