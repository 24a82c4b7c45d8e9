"""Applies an adapter to a base weight on the device.

Models that are one base with different adapters are read together: a layer of the base is loaded once, and each model's
weights are computed from it before its texts run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_BLOCK_ELEMENTS = 1 << 22  # 32 MiB of float64


def apply_lora(weight_OI: torch.Tensor, factors: Mapping[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """`weight` + scaling * B A, in the weight's dtype; with DoRA's magnitudes, each row at its magnitude.

    `factors` are float64, named as by `LoraPair.entries`. The arithmetic is that of `storage.transform.with_lora`.
    """
    a_RI, b_OR, magnitude_O = factors["a"], factors["b"], factors.get("magnitude")
    adapted_OI = torch.empty_like(weight_OI)
    rows = max(1, _BLOCK_ELEMENTS // weight_OI.shape[1])
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        block = weight_OI[part].float() + (b_OR[part] @ a_RI).float() * scaling
        if magnitude_O is not None:
            lengths_O = torch.linalg.vector_norm(block.double(), dim=1)
            factors_O = torch.where(lengths_O != 0, magnitude_O[part] / lengths_O, 1.0)
            block *= factors_O.float()[:, None]
        adapted_OI[part] = block.to(weight_OI.dtype)
    return adapted_OI
