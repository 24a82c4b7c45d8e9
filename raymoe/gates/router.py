"""From prompt states to router rows: differences, unit length, and whether the rows can tell experts apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymoe.text import number_ranges

__all__ = ["conditioning_warning", "gate_rows", "normalised", "random_rows", "shared_gate_row"]

Float32 = npt.NDArray[np.float32]

# Above this condition number the rows of a layer are nearly parallel: all experts get nearly the same score.
MAX_CONDITION = 5.0


def normalised(vectors: npt.ArrayLike) -> Float32:
    """Each vector (last axis) at unit length; a zero vector stays zero."""
    array = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(array, axis=-1, keepdims=True)
    units: Float32 = (array / np.maximum(norms, 1e-8)).astype(np.float32)
    return units


def gate_rows(positive: Float32, negative: Float32 | None) -> Float32:
    """Router rows of one expert, (layers, hidden), each at unit length."""
    return normalised(positive if negative is None else positive.astype(np.float64) - negative)


def shared_gate_row(rows: Sequence[Float32]) -> Float32:
    """The one gate (hidden,) of all shared experts out of a row for each of them: each of them counts alike.

    Hosts have one gate, however many experts stand behind it.
    """
    return rows[0] if len(rows) == 1 else normalised(np.sum(rows, axis=0, dtype=np.float64))


def random_rows(mode: str, seed: int, owner: str, layers: int, hidden: int) -> Float32:
    """Rows that need no prompts, (layers, hidden), drawn from (seed, owner, layer).

    `random`: a random direction at unit length, about N(0, 1/hidden) for each element. Rows of N(0, 1), as some tools
    draw them, make router logits so large that the softmax sends everything to one expert.
    `uniform_random`: U(-1/sqrt(hidden), 1/sqrt(hidden)), what torch.nn.Linear starts with.
    """
    rows = []
    for layer in range(layers):
        key = hashlib.sha256(f"{seed}/router/{owner}/{layer}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        if mode == "random":
            rows.append(normalised(generator.standard_normal(hidden)))
        else:
            bound = hidden**-0.5
            rows.append(generator.uniform(-bound, bound, hidden).astype(np.float32))
    return np.stack(rows)


def not_finite(owner: str, layer: int) -> str:
    """What is said of an expert whose prompts leave states that no row can be made of."""
    return (
        f"gates of {owner}: the states of its prompts are not finite numbers at layer {layer}. The model that reads "
        "them has weights that are not finite, or so large that its sums overflow: get it again, or use another"
    )


def conditioning_warning(rows: Sequence[Float32]) -> str | None:
    """A warning with numbers if some layers' rows are nearly parallel. `rows`: one (layers, hidden) array an expert."""
    if len(rows) < 2:
        return None
    stacked = np.stack(rows, axis=1)  # (layers, experts, hidden)
    conditions = np.linalg.cond(stacked.astype(np.float64))
    bad = [layer for layer, value in enumerate(conditions) if not value <= MAX_CONDITION]
    if not bad:
        return None
    worst = max(bad, key=lambda layer: conditions[layer])
    units = normalised(stacked[worst])
    cosines = (units @ units.T)[np.triu_indices(len(rows), 1)]
    return (
        f"the router rows of {len(bad)} of {len(conditions)} layers are nearly parallel (condition number above "
        f"{MAX_CONDITION:g}): layers {number_ranges(bad)}. Worst is layer {worst}: condition number "
        f"{conditions[worst]:.1f}, cosine between two experts' rows {cosines.min():.3f} to {cosines.max():.3f}. Some "
        "experts will get few tokens; use prompts that differ more, add negative_prompts, or gate_mode: ridge"
    )
