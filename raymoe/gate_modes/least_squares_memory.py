"""How much memory `least_squares.py` takes. Torch-free, since plans use it."""

from __future__ import annotations

from raymoe.gate_modes.layer_values import FOLDS

# How many tokens are summed at once, and the largest system that is solved for each fold and each regularization.
CHUNK, CHOICE_SIZE = 4096, 1024
_F64 = 8
GPU_LIBRARY_BYTES = 350_000_000
"""Host memory of the libraries that factorize on a GPU. Measured on H200."""
_SAFETY_FACTOR = 1.08  # packed copies of matrices in libraries, measured


def least_squares_bytes(tokens: int, hidden: int) -> int:
    """Peak bytes of fitting one layer's router to `tokens` tokens: their states twice in bfloat16, chunks of them and
    systems (hidden, hidden) in float64."""
    if tokens < hidden:  # the dual form
        working = 3 * _F64 * tokens * hidden + 4 * _F64 * tokens**2
    else:
        working = max(_sums_bytes(min(tokens, CHUNK), hidden, systems=2), _F64 * (CHUNK * hidden + 4 * hidden**2))
        if hidden <= CHOICE_SIZE:  # the systems without each fold, and the states of the fold
            fold = tokens // FOLDS
            working = max(working, _sums_bytes(min(fold, CHUNK), hidden, systems=7) + (_F64 + 2 * 2) * fold * hidden)
    return round(_SAFETY_FACTOR * (2 * 2 * tokens * hidden + working))


def _sums_bytes(chunk: int, hidden: int, *, systems: int) -> int:
    """Bytes of a chunk of weighted states, the chunk before it, and `systems` systems."""
    return _F64 * (3 * chunk * hidden + systems * hidden**2)
