"""The interface of a gate mode. It imports neither torch nor numpy, since configs and plans use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from raymoe.tensor_names import EMBEDDING, LAYER_INPUTS, layer_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from raymoe.gate_modes.layer_values import LayerActivations, LayerRows

    Float32 = npt.NDArray[np.float32]


class GateMode:
    """How router rows are made. Subclasses declare what they need and override the methods of their kind:

    | kind | `needs_prompts` | `needs_forward_pass` | makes rows in |
    |---|---|---|---|
    | draws rows | False | False | `draw_rows` |
    | reads token embeddings | True | False | `embedding_row` |
    | runs a model | True | True | `fit_layer`, of what `prompt_vectors` and the kept states give |
    """

    name: ClassVar[str]
    """The value of `gate_mode` in a config."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other values of `gate_mode` that mean this mode."""

    needs_prompts: ClassVar[bool] = False
    """Whether rows come from prompts."""
    needs_forward_pass: ClassVar[bool] = False
    """Whether a model has to read the prompts, layer by layer."""
    needs_text: ClassVar[bool] = False
    """Whether positive prompts need tokens other than BOS, as a blank prompt has none."""
    default_prompt_model: ClassVar[str] = "base"
    """The model that reads prompts if the config names none: base, expert or grafted."""

    sums_layer_inputs: ClassVar[bool] = False
    """Whether `prompt_vectors` of each layer's input are summed. Then the last layer is not run, since its input is
    enough. Otherwise rows are fitted to states as each router sees them: the last layer is run up to its FFN."""
    fits_together: ClassVar[bool] = False
    """Whether an expert's row depends on the prompts of the others."""
    max_tokens: ClassVar[int] = 0
    """How many tokens' states are kept at each layer, for all experts' prompts together."""
    has_directions: ClassVar[bool] = False
    """Whether rows are directions of unit length, so that cosines between them show which experts are too alike."""

    gpu_library_bytes: ClassVar[int] = 0
    """Host memory in bytes of the GPU libraries that `fit_layer` uses."""
    measured_accuracy: ClassVar[tuple[int, int] | None] = None
    """Percentage of held-out tokens that are routed to the right expert first, with five keywords per expert and with
    16 texts per expert: the first table of docs/research/routing.md. None: there is no warning about few prompts."""
    single_prompt_note: ClassVar[str] = ""
    """What the mode can't do if an expert has only one prompt: a clause that follows the mode's name."""

    # --- what is loaded and run

    def needs_parameter(self, name: str, layers: int, ffn: str) -> bool:
        """Whether this mode loads the parameter `name` of a model with `layers` layers and FFNs named `ffn`.

        Example:
            >>> MODES["hidden"].needs_parameter("model.layers.2.self_attn.q_proj.weight", 3, "mlp")
            False
        """
        if name == EMBEDDING:
            return self.needs_prompts
        if name in LAYER_INPUTS:
            return self.needs_forward_pass
        layer = layer_of(name)
        if not self.needs_forward_pass or layer is None or layer >= layers:
            return False
        is_last = layer == layers - 1
        return not is_last or (not self.sums_layer_inputs and f".{ffn}." not in name)

    def layers_run(self, layers: int) -> int:
        """How many of a model's `layers` are run for prompts."""
        return layers - 1 if self.sums_layer_inputs else layers

    # --- what is kept of prompts

    def token_limit(self, experts: int) -> int:
        """How many tokens' states are kept per expert if there are `experts` experts; at least one."""
        return max(1, self.max_tokens // experts)

    def prompt_vectors(self, hidden_BTH: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The vector of each prompt at a layer, which is summed over prompts. Called if `sums_layer_inputs`.

        Args:
            hidden_BTH: The layer's input (prompts, tokens, hidden), padded on the right, in the dtype of the pass.
            lengths_B: Tokens of each prompt without padding (prompts,), on the same device.

        Returns:
            A vector for each prompt (prompts, hidden), float32.
        """
        raise NotImplementedError(self.name)

    # --- how rows are made

    def draw_rows(self, seed: int, owner: str, layers: int, hidden: int, first_layer: int = 0) -> Float32:
        """Rows (layers, hidden) of one expert, from `first_layer` on. They depend on seed, owner and layer alone.
        Called if the mode needs no prompts. `owner` is the expert's name in records, such as `expert 0`."""
        raise NotImplementedError(self.name)

    def embedding_row(
        self,
        positive: Sequence[Sequence[int]],
        negative: Sequence[Sequence[int]],
        read_rows: Callable[[Sequence[int]], Mapping[int, Float32]],
    ) -> Float32:
        """The row (hidden,) of one expert, for all layers. Called if the mode needs prompts and no forward pass.

        Args:
            positive: Token ids of each positive prompt, at least one.
            negative: Token ids of each negative prompt.
            read_rows: Returns the embedding (hidden,) of each given token id.
        """
        raise NotImplementedError(self.name)

    def fit_layer(
        self,
        experts: Sequence[LayerActivations],
        shared: Sequence[LayerActivations],
        device: str,
        heartbeat: Callable[[], None] | None = None,
    ) -> LayerRows:
        """The rows of one layer, in the order of the experts. Called if the mode needs a forward pass.

        Args:
            experts: The activations of each expert's prompts at this layer.
            shared: The same for each shared expert that has prompts.
            device: Where torch computes.
            heartbeat: Called while the work makes progress.

        Returns:
            Rows (experts, hidden), the gate (hidden,) of all shared experts, and how held-out prompts are routed.
        """
        raise NotImplementedError(self.name)

    def fitting_bytes(self, hidden: int, tokens: int | None = None) -> int:
        """Peak bytes of `fit_layer` for `tokens` kept states (default: as many as are kept) of `hidden` dimensions. 0:
        negligible."""
        return 0


class SummedMode(GateMode):
    """Modes with rows that are directions of mean prompt vectors. A subclass defines `prompt_vectors`."""

    needs_prompts = True
    needs_forward_pass = True
    sums_layer_inputs = True
    has_directions = True
    max_tokens = 1_024  # the finished rows are scored on these

    def fit_layer(
        self,
        experts: Sequence[LayerActivations],
        shared: Sequence[LayerActivations],
        device: str,
        heartbeat: Callable[[], None] | None = None,
    ) -> LayerRows:
        """As `GateMode.fit_layer`; only a few sums, computed by numpy."""
        from raymoe.gate_modes.directions import mean_directions

        return mean_directions(experts, shared)


class DrawnMode(GateMode):
    """Modes that draw rows from a seed. A subclass defines `draw_row`."""

    def draw_rows(self, seed: int, owner: str, layers: int, hidden: int, first_layer: int = 0) -> Float32:
        """As `GateMode.draw_rows`: each layer has a generator of its own."""
        import hashlib

        import numpy as np

        rows = []
        for layer in range(first_layer, first_layer + layers):
            key = hashlib.sha256(f"{seed}/router/{owner}/{layer}".encode()).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
            rows.append(self.draw_row(generator, hidden))
        return np.stack(rows)

    def draw_row(self, generator: np.random.Generator, hidden: int) -> Float32:
        """One layer's row (hidden,) of one expert."""
        raise NotImplementedError(self.name)
