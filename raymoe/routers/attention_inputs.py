"""Collects the inputs of attention's matrices, from which `backbone: regmean` merges the matrices.

Each expert's prompts pass the expert's own model. At each layer, the inputs of the modules that the plan names are
kept: those of up to 16,384 tokens of all experts together, evenly spaced, in bfloat16. So a layer takes the same memory
however many experts there are. The first token of a prompt is left out: attention uses it as a sink, and its states are
unlike all others. Modules that get the same tensor, as q, k and v do, share what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.planning.plan import GatePrompts, MomentPlan
from raymoe.routers.activations import ChosenTokens, batch_slice, has_non_finite_bits
from raymoe.routers.prompt_passes import part_of
from raymoe.routers.tokenize import TOKEN_BUDGET, Batch, batches, chunk_size, prompt_ids
from raymoe.storage.source_reader import SourceReader

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 16_384
"""How many tokens' inputs are kept at each layer, for all experts' prompts together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """The inputs of the matrices of one layer, for one expert's prompts.

    Attributes:
        states: (tokens, width) of each distinct input, as the bits of bfloat16, by the first module that got it.
        module_of: For each module, the module under which its input is.
    """

    states: Mapping[str, npt.NDArray[np.int16]]
    module_of: Mapping[str, str]


def join_inputs(parts: Sequence[LayerInputs]) -> LayerInputs:
    """The inputs of one expert's prompts at a layer, joined from their parts in order. A part may have no tokens."""
    held = [part for part in parts if part.module_of]
    if len(held) < 2:
        return held[0] if held else parts[0]
    names = held[0].states
    states = {name: np.concatenate([part.states[name] for part in held]) for name in names}
    return LayerInputs(states=states, module_of=held[0].module_of)


def layer_modules(plan: MomentPlan) -> list[list[str]]:
    """The modules of each layer whose inputs are kept."""
    return [list(dict.fromkeys(each.moments.module for each in of if each.moments)) for of in plan.matrices]


def capture_inputs(
    plan: MomentPlan,
    prompts: Sequence[GatePrompts],
    reader: SourceReader,
    *,
    members: int,
    device: str,
    trust_remote_code: bool = False,
    layer_done: Callable[[int], None] | None = None,
) -> Iterator[list[LayerInputs]]:
    """The inputs of the matrices of a layer, for the prompts of some experts, by expert; one layer after the other.

    One model reads all prompts, or that model with the experts' adapters. Its layers are read once, and inputs of
    earlier layers are not kept. Each batch holds prompts of one expert, so the result does not depend on which experts
    are read together.

    Args:
        plan: The plan of the merge's second moments.
        prompts: Those to read: experts of `plan`, or parts of their prompts.
        reader: Reads the models and the tokenizer.
        members: The number of all experts of the plan, which share the tokens that are kept.
        device: Where torch computes.
        trust_remote_code: Whether a tokenizer may run code of its own.
        layer_done: Called after each layer, with the tokens that have passed it.

    Raises:
        ProblemReport: For prompts that can't be read (no tokens, tokens beyond the vocabulary).
        MergeFailed: For inputs that are not finite, or modules that the model does not run.
    """
    from raymoe.routers.streamed_decoder import StreamedDecoder

    decoder = StreamedDecoder(prompts[0], reader, device, others=prompts[1:])
    budget = 1 if decoder.rope_depends_on_length else TOKEN_BUDGET
    limit = max(1, MAX_TOKENS // members)
    captured = [_InputCapture(plan, each, reader, budget, limit, trust_remote_code) for each in prompts]
    positions = [(member, number) for member in captured for number in range(len(member.batches))]
    models = [number for number, member in enumerate(captured) for _ in member.batches]
    together = [batch for member in captured for batch in member.batches]

    def look(layer: int, number: int, module: str, input_BTX: torch.Tensor) -> None:
        member, batch = positions[number]
        member.add(layer, batch, module, input_BTX)

    modules = layer_modules(plan)
    for layer in decoder.module_inputs(together, modules, look, models=models):
        yield [member.pop_layer(layer, modules[layer]) for member in captured]
        if layer_done is not None:
            layer_done(sum(int(batch.lengths.sum()) for batch in together))


class _InputCapture:
    """Captures inputs for one expert's prompts, or for a part of them."""

    def __init__(
        self, plan: MomentPlan, prompts: GatePrompts, reader: SourceReader, budget: int, limit: int, remote_code: bool
    ) -> None:
        positive, _, bos = prompt_ids(plan, prompts, reader, trust_remote_code=remote_code)
        everything = [Batch(group) for group in batches(positive, budget, chunk_size(prompts.config))]
        part = batch_slice([batch.ids.numel() for batch in everything], *part_of(prompts))
        tokens = ChosenTokens(everything, [False] * len(everything), bos, limit, skips_first=True)
        self._owner = prompts.owner
        if not tokens.has_positive:
            what = f"the positive prompts of {self._owner} have no tokens but BOS"
            raise ProblemReport([Problem(where=str(self._owner), what=what, remedy="give it some text")])
        self.batches, self._tokens = everything[part], tokens.subset(part)
        self._batch = -1
        self._seen: list[tuple[str, torch.Tensor]] = []  # distinct inputs of the batch that is in the layer
        self._states: dict[str, list[npt.NDArray[np.int16]]] = {}
        self._module_of: dict[str, str] = {}

    def add(self, layer: int, batch: int, module: str, input_BTX: torch.Tensor) -> None:
        """Keep the input of a module, unless another module has got the same tensor."""
        if batch != self._batch:
            self._batch, self._seen = batch, []
        # Tensors that are held here keep their memory, so that no other tensor can be in its place.
        first = next((name for name, seen in self._seen if _is_same(seen, input_BTX)), module)
        if self._module_of.setdefault(module, first) != first:
            raise MergeFailed(f"layer {layer}: {module} shares its input with {first} for some prompts only")
        if first != module:
            return
        self._seen.append((module, input_BTX))
        # Latent keys and values have a dimension of one head besides.
        shape = (*self.batches[batch].ids.shape, input_BTX.shape[-1])
        if input_BTX.numel() != math.prod(shape):
            raise MergeFailed(
                f"layer {layer}: transformers calls {module} with more than one input for a token, which backbone: "
                "regmean can't measure. Use backbone: linear"
            )
        bits = self._tokens.select_states(batch, input_BTX.reshape(shape))
        if has_non_finite_bits(bits):
            raise MergeFailed(
                f"backbone: the inputs of {module} are not finite numbers at layer {layer}, for the prompts of "
                f"{self._owner}. Its model has weights that are not finite, or so large that its sums overflow: get it "
                "again, or use another"
            )
        self._states.setdefault(module, []).append(bits)

    def pop_layer(self, layer: int, modules: Sequence[str]) -> LayerInputs:
        """The inputs at a layer that is done. They are not kept."""
        if self.batches and (missing := [name for name in modules if name not in self._module_of]):
            raise MergeFailed(
                f"layer {layer}: transformers does not call {missing[0]}, and backbone: regmean needs its inputs. Use "
                "backbone: linear"
            )
        states = {name: np.concatenate(parts) for name, parts in self._states.items()}
        found = LayerInputs(states=states, module_of=self._module_of)
        self._batch, self._seen, self._states, self._module_of = -1, [], {}, {}
        return found


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one piece of memory with one shape."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )
