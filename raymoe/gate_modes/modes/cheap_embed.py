"""`cheap_embed`: the direction of the sum of all prompt tokens' embeddings. Reads single rows of the embedding, and
runs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from raymoe.gate_modes.base import GateMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Float32 = npt.NDArray[np.float32]
    ReadRows = Callable[[Sequence[int]], Mapping[int, Float32]]


class CheapEmbed(GateMode):
    """Sums token embeddings. A row is the same for all layers."""

    name = "cheap_embed"
    needs_prompts = True
    has_directions = True

    def embedding_row(
        self, positive: Sequence[Sequence[int]], negative: Sequence[Sequence[int]], read_rows: ReadRows
    ) -> Float32:
        """As `GateMode.embedding_row`; of unit length."""
        from raymoe.gate_modes.directions import expert_rows

        without = _sum_direction(negative, read_rows) if negative else None
        return expert_rows(_sum_direction(positive, read_rows), without)


def _sum_direction(prompts: Sequence[Sequence[int]], read_rows: ReadRows) -> Float32:
    """Direction (hidden,) of the sum of all prompt tokens' embeddings."""
    import numpy as np

    from raymoe.gate_modes.directions import normalize

    tokens = [token for prompt in prompts for token in prompt]
    rows = read_rows(tokens)
    total = np.zeros(rows[tokens[0]].shape)
    for token in tokens:  # one by one, in order: a matrix of all of them would grow with the prompts
        total += rows[token]
    return normalize(total)


MODE = CheapEmbed()
