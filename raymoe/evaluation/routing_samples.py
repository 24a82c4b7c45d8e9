"""A few texts token by token, with the experts that the layers' routers preferred, for the evaluation page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

TEXTS_PER_LABEL = 2
MAX_TOKENS = 120
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class RoutingSamples:
    """Counts, for each token of the first texts of each label, how many layers chose each expert first."""

    def __init__(self, ids: Sequence[Sequence[int]], labels: Sequence[str], skipped: int, experts: int) -> None:
        self._labels, self._experts = labels, experts
        self._span = slice(skipped, skipped + MAX_TOKENS)
        taken = [
            text
            for label in dict.fromkeys(labels)
            for text in [number for number, own in enumerate(labels) if own == label][:TEXTS_PER_LABEL]
        ]
        self._ids = {text: list(ids[text]) for text in taken}
        self._counts = {
            text: np.zeros((len(tokens[self._span]), experts), np.int64) for text, tokens in self._ids.items()
        }

    def record(self, text: int, experts_TK: npt.NDArray[np.int64]) -> None:
        """Count one layer's choices for the tokens of a text."""
        if text in self._counts:
            first = experts_TK[self._span, 0]
            self._counts[text] += first[:, None] == np.arange(self._experts)

    def plain(self, tokenizer: Any) -> list[dict[str, Any]]:
        """`samples` of eval.json."""
        return [
            {
                "label": self._labels[text],
                "tokens": [
                    {"text": piece, "experts": counts.tolist()}
                    for piece, counts in zip(token_pieces(tokenizer, ids)[self._span], self._counts[text], strict=True)
                ],
            }
            for text, ids in self._ids.items()
        ]


def token_pieces(tokenizer: Any, ids: Sequence[int], *, most: int | None = MAX_TOKENS + 1) -> list[str]:
    """The text of each of the first `most` tokens. A character of several tokens belongs to the last of them."""
    found: list[str] = []
    before = ""
    for end in range(1, len(ids[:most]) + 1):
        now: str = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unfinished = now.endswith(_UNFINISHED) and end < len(ids)
        found.append("" if unfinished else now[len(before) :])
        before = before if unfinished else now
    return found
