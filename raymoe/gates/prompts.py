"""Prompts to token ids, and token ids to batches of bounded size.

Batches are padded on the right. A causal model's states at real tokens never see what stands to their right, so padding
needs no mask, changes no position, and is simply not read afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.errors import Problem, ProblemReport

if TYPE_CHECKING:
    import torch

__all__ = ["TOKEN_BUDGET", "Batch", "batches", "load_tokenizer", "tokenize"]

# Tokens of one batch, padding included. A constant: what a batch holds must not depend on the machine.
TOKEN_BUDGET = 2048


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer whose files lie in `folder`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        what = f"the base model's tokenizer can't be loaded: {str(error).splitlines()[0]}"
        remedy = "gates from prompts need it; check the tokenizer files of base_model"
        raise ProblemReport([Problem(where="base_model", what=what, remedy=remedy)]) from error


def tokenize(tokenizer: Any, prompts: Sequence[str], *, vocab: int, owner: str) -> list[list[int]]:
    """Token ids of each prompt, beginning with the tokenizer's BOS token (once), if it has one.

    Raises ProblemReport for a prompt without tokens or with tokens that the model has no embedding for.
    """
    bos = tokenizer.bos_token or ""
    texts = [prompt if bos and prompt.startswith(bos) else bos + prompt for prompt in prompts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    problems = []
    for number, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        where = f"{owner}, prompt {number + 1} ({prompt[:40]!r})"
        if not tokens:
            problems.append(Problem(where=where, what="it has no tokens", remedy="give it some text"))
        elif max(tokens) >= vocab:
            what = f"token id {max(tokens)} is beyond the model's vocabulary of {vocab}"
            remedy = "the base model's tokenizer and weights do not belong together"
            problems.append(Problem(where=where, what=what, remedy=remedy))
    if problems:
        raise ProblemReport(problems)
    return ids


class Batch:
    """Right-padded prompts. `ids` (batch, length) int64; `lengths` (batch,) counts the real tokens of each row."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        import torch

        self.lengths = torch.tensor([len(row) for row in rows])
        self.ids: torch.Tensor = torch.zeros((len(rows), int(self.lengths.max())), dtype=torch.int64)
        for number, row in enumerate(rows):
            self.ids[number, : len(row)] = torch.tensor(row)


def batches(prompts: Sequence[Sequence[int]], budget: int = TOKEN_BUDGET) -> Iterator[list[Sequence[int]]]:
    """Prompts in groups whose padded size stays within `budget` tokens; a longer prompt goes alone.

    Sorted by length, so that little is padded.
    """
    group: list[Sequence[int]] = []
    for prompt in sorted(prompts, key=len):
        if group and len(prompt) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
