"""`hidden_avg`: the direction of the mean of the layer's input over each prompt's tokens, averaged over prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymoe.gate_modes.base import SummedMode

if TYPE_CHECKING:
    import torch


class HiddenAvg(SummedMode):
    """Takes the mean of the layer's input over each prompt's tokens. Padding does not count."""

    name = "hidden_avg"
    measured_accuracy = (33, 54)

    def prompt_vectors(self, hidden_BTH: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """As `GateMode.prompt_vectors`."""
        import torch

        is_token = torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device)[None] < lengths_B[:, None]
        return (hidden_BTH.float() * is_token[..., None]).sum(dim=1) / lengths_B[:, None]


MODE = HiddenAvg()
