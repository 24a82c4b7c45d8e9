"""`ridge`: a regularized least-squares classifier for each layer, on the exact inputs of its router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raymoe.gate_modes.base import GateMode
from raymoe.gate_modes.least_squares_memory import GPU_LIBRARY_BYTES

if TYPE_CHECKING:
    from raymoe.gate_modes.layer_values import LayerActivations, LayerRows


class Ridge(GateMode):
    """Fits rows to the states of the prompts' tokens. BOS carries no information about the prompt, and is left out.

    Rows differ in length and need not be unit vectors, so their cosines are not checked.
    """

    name = "ridge"
    needs_prompts = True
    needs_forward_pass = True
    needs_text = True
    fits_together = True
    default_prompt_model = "grafted"
    max_tokens = 16_384  # beyond that, more tokens hardly help
    gpu_library_bytes = GPU_LIBRARY_BYTES
    measured_accuracy = (70, 96)
    single_prompt_note = "then uses a constant regularization and scale, and can't estimate an accuracy"

    def fit_layer(
        self,
        experts: Sequence[LayerActivations],
        shared: Sequence[LayerActivations],
        device: str,
        heartbeat: Callable[[], None] | None = None,
    ) -> LayerRows:
        """As `GateMode.fit_layer`. `heartbeat` is called with each system of equations that is set up or solved."""
        from raymoe.gate_modes.least_squares import fit_activations

        return fit_activations(experts, shared, device, heartbeat)

    def fitting_bytes(self, hidden: int, tokens: int | None = None) -> int:
        """As `GateMode.fitting_bytes`."""
        from raymoe.gate_modes.least_squares_memory import least_squares_bytes

        return least_squares_bytes(self.max_tokens if tokens is None else min(tokens, self.max_tokens), hidden)


MODE = Ridge()
