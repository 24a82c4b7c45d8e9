"""Collects per-layer activations of an expert's prompts; routers are computed from them.

The gate mode decides what is collected (see raymoe/gate_modes). There are two kinds:

sums     per fold of prompts, the sum of a vector that the mode takes of each prompt from the layer's input
states   of the prompts' tokens, as the layer's router will see them

Modes that sum keep a few tokens' states as well: the finished routers are scored on them (see heldout_report.py). BOS
carries no information about a prompt, and is left out of the states. They are kept in bfloat16, as they are on most
GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.gate_modes import MODES
from raymoe.gate_modes.layer_values import FOLDS, LayerActivations
from raymoe.planning.plan import GatePlan, GatePrompts
from raymoe.routers.prompt_passes import part_of
from raymoe.routers.row_checks import not_finite_message
from raymoe.routers.tokenize import TOKEN_BUDGET, Batch, batches, chunk_size, prompt_ids
from raymoe.storage.source_reader import SourceReader

if TYPE_CHECKING:
    import torch

_NOT_FINITE = 0x7F80  # the exponent bits of a bfloat16: all set only in NaN and infinity

Float64 = npt.NDArray[np.float64]
LayerDone = Callable[[int], None]


def capture(gates: GatePlan, prompts: GatePrompts, reader: SourceReader, **options: Any) -> list[LayerActivations]:
    """`capture_layers` for the whole prompts of one expert."""
    return [layer for (layer,) in capture_layers(gates, [prompts], reader, **options)]


def capture_layers(
    gates: GatePlan,
    prompts: Sequence[GatePrompts],
    reader: SourceReader,
    *,
    members: int,
    device: str,
    trust_remote_code: bool = False,
    layer_done: LayerDone | None = None,
    on_counted: LayerDone | None = None,
) -> Iterator[list[LayerActivations]]:
    """The activations of the prompts of several experts at a layer, by expert; one layer after the other. One model
    reads all prompts, or that model with the experts' adapters. `members` is the number of all experts.

    The model's layers are read once, and activations of earlier layers are not kept. Each batch holds prompts of one
    expert, so the result does not depend on which experts are read together. `on_counted` is called once with the total
    work in tokens x layers, `layer_done` with the work of each finished layer. Raises ProblemReport for prompts that
    can't be read (no tokens, tokens beyond the vocabulary).
    """
    from raymoe.routers.streamed_decoder import StreamedDecoder

    decoder = StreamedDecoder(prompts[0], reader, device, others=prompts[1:], quantize=gates.quantize)
    budget = 1 if decoder.rope_depends_on_length else TOKEN_BUDGET
    captured = [_Capture(gates, each, reader, budget, members, trust_remote_code) for each in prompts]
    positions = [(member, number) for member in captured for number in range(len(member.batches))]

    def add(layer: int, number: int, hidden_BTH: torch.Tensor) -> None:
        member, batch = positions[number]
        member.add_inputs(layer, batch, hidden_BTH)

    def look(layer: int, number: int, state_BTH: torch.Tensor) -> None:
        member, batch = positions[number]
        member.add_states(layer, batch, state_BTH)
        if layer_done is not None:
            layer_done(int(member.batches[batch].lengths.sum()))

    together = [batch for member in captured for batch in member.batches]
    mode = MODES[gates.mode]
    if on_counted is not None:
        on_counted(sum(int(batch.lengths.sum()) for batch in together) * mode.layers_run(gates.layers))
    models = [number for number, member in enumerate(captured) for _ in member.batches]
    if mode.sums_layer_inputs:
        layers = decoder.layer_inputs(together, gates.layers, add, look, models=models)
    else:
        layers = decoder.router_inputs(together, gates.layers, look, models=models)
    for layer in layers:
        yield [member.pop_layer(layer) for member in captured]


class _Capture:
    """Captures activations of one expert's prompts, or of a part of them."""

    def __init__(
        self, gates: GatePlan, prompts: GatePrompts, reader: SourceReader, budget: int, members: int, remote_code: bool
    ) -> None:
        positive, negative, bos = prompt_ids(gates, prompts, reader, trust_remote_code=remote_code)
        chunk = chunk_size(prompts.config)
        groups = [(g, sign) for sign, ids in ((False, positive), (True, negative)) for g in batches(ids, budget, chunk)]
        signs = [sign for _, sign in groups]
        everything = [Batch(group) for group, _ in groups]
        part = batch_slice([batch.ids.numel() for batch in everything], *part_of(prompts))
        self.batches = everything[part]
        self._owner, self._hidden, self._kept_layers = prompts.owner, gates.hidden, set(gates.layers_with_router)
        mode = MODES[gates.mode]
        tokens = ChosenTokens(everything, signs, bos, mode.token_limit(members))
        if mode.needs_text and not tokens.has_positive:
            what = f"the positive prompts of {prompts.owner} have no tokens but BOS"
            raise ProblemReport([Problem(where=str(prompts.owner), what=what, remedy="give it some text")])
        self._tokens = tokens.subset(part)
        self._sums = _Sums(gates, everything, signs, part) if mode.sums_layer_inputs else None
        self._states: list[list[npt.NDArray[np.int16]]] = [[] for _ in range(gates.layers)]

    def add_inputs(self, layer: int, batch: int, hidden_BTH: torch.Tensor) -> None:
        assert self._sums is not None
        if layer in self._kept_layers:
            self._sums.add(layer, batch, hidden_BTH)

    def add_states(self, layer: int, batch: int, state_BTH: torch.Tensor) -> None:
        if layer not in self._kept_layers:
            return
        bits = self._tokens.select_states(batch, state_BTH)
        if has_non_finite_bits(bits):
            raise MergeFailed(not_finite_message(self._owner, layer))
        self._states[layer].append(bits)

    def pop_layer(self, layer: int) -> LayerActivations:
        """The activations at a layer that is done. They are not kept."""
        tokens, states = self._tokens, self._states[layer]
        self._states[layer] = []
        summed: dict[str, Any] = {} if self._sums is None else self._sums.pop_layer(layer)
        if not states:  # the last layer of modes that do not run it; one without a router; a part without prompts
            none = np.zeros((0, self._hidden), np.int16)
            return LayerActivations(states=none, prompts=tokens.prompts[:0], negative=tokens.negative[:0], **summed)
        return LayerActivations(
            states=np.concatenate(states), prompts=tokens.prompts, negative=tokens.negative, **summed
        )


def has_non_finite_bits(bits: npt.NDArray[np.int16]) -> bool:
    """Whether bfloat16 values, as int16, have NaN or infinity among them."""
    return bool((bits & _NOT_FINITE == _NOT_FINITE).any())


def batch_slice(sizes: Sequence[int], part: int, parts: int) -> slice:
    """The adjacent batches of `part` of `parts`, divided by their sizes."""
    ends = np.cumsum(sizes)
    of_batch = (ends - np.asarray(sizes) / 2) * parts // max(1, ends[-1])
    return slice(int((of_batch < part).sum()), int((of_batch <= part).sum()))


class ChosenTokens:
    """Selects the tokens to keep states of: `limit` evenly spaced ones of all real tokens except BOS. With
    `skips_first`, a prompt's first token is left out too, unless it is the only one.

    Batches of positive prompts come first. So neither kind is lost if there are many more prompts of the other.
    """

    def __init__(
        self,
        groups: Sequence[Batch],
        signs: Sequence[bool],
        bos: int | None,
        limit: int,
        *,
        skips_first: bool = False,
    ) -> None:
        import torch

        real = []
        for group in groups:
            mask = torch.arange(group.ids.shape[1])[None] < group.lengths[:, None]
            if bos is not None:
                mask[:, 0] &= group.ids[:, 0] != bos
            if skips_first:
                mask[:, 0] &= group.lengths == 1
            real.append(mask)
        total = [
            sum(int(mask.sum()) for mask, s in zip(real, signs, strict=True) if s is sign) for sign in (False, True)
        ]
        self.has_positive = total[False] > 0
        positive = min(total[False], max((limit + 1) // 2, limit - total[True]))
        chosen = torch.cat(
            [_evenly_spaced(total[False], positive), _evenly_spaced(total[True], min(total[True], limit - positive))]
        )
        number, at = [0, 0], 0
        self._masks: list[torch.Tensor] = []
        self._prompts: list[npt.NDArray[np.int64]] = []
        self._negative: list[npt.NDArray[np.bool_]] = []
        for mask, sign in zip(real, signs, strict=True):
            count = int(mask.sum())
            kept = mask.clone()
            kept[mask] = chosen[at : at + count]
            at += count
            self._masks.append(kept)
            rows = torch.arange(number[sign], number[sign] + len(mask))
            number[sign] += len(mask)
            self._prompts.append(rows[:, None].expand_as(kept)[kept].numpy())
            self._negative.append(np.full(int(kept.sum()), sign))

    def subset(self, part: slice) -> ChosenTokens:
        """The tokens of some of the batches, which are renumbered."""
        some = object.__new__(ChosenTokens)
        some.has_positive = self.has_positive
        for name in ("_masks", "_prompts", "_negative"):
            setattr(some, name, getattr(self, name)[part])
        return some

    @property
    def prompts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(0, np.int64), *self._prompts])

    @property
    def negative(self) -> npt.NDArray[np.bool_]:
        return np.concatenate([np.zeros(0, np.bool_), *self._negative])

    def select_states(self, number: int, state_BTH: torch.Tensor) -> npt.NDArray[np.int16]:
        """The chosen tokens' states of one batch, (chosen, hidden)."""
        import torch

        chosen = state_BTH[self._masks[number].to(state_BTH.device)]
        bits: npt.NDArray[np.int16] = chosen.to(torch.bfloat16).cpu().view(torch.int16).numpy()
        return bits


def _evenly_spaced(total: int, count: int) -> torch.Tensor:
    """(total,) bool: `count` of them evenly spaced."""
    import torch

    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.arange(count) * total // max(1, count)] = True
    return chosen


class _Sums:
    """Sums of the mode's prompt vectors, by layer and fold, for layers in progress."""

    def __init__(self, gates: GatePlan, groups: Sequence[Batch], signs: Sequence[bool], part: slice) -> None:
        """Sums the batches `part` of all `groups`; these are renumbered."""
        self._mode, self._hidden = MODES[gates.mode], gates.hidden
        self._groups, self._signs = groups[part], signs[part]
        self._layers: dict[int, tuple[Float64, Float64]] = {}
        first: list[int] = []  # number of a batch's first prompt
        counts = [0, 0]
        for group, sign in zip(groups, signs, strict=True):
            first.append(counts[sign])
            counts[sign] += len(group.lengths)
        self._first = first[part]
        self._negatives = counts[True]
        self._counts = np.zeros(FOLDS, np.int64)
        for number, sign in enumerate(self._signs):
            if not sign:
                self._counts += np.bincount(self._fold_numbers(number), minlength=FOLDS)

    def _fold_numbers(self, number: int) -> npt.NDArray[np.int64]:
        return (self._first[number] + np.arange(len(self._groups[number].lengths))) % FOLDS

    def add(self, layer: int, number: int, hidden_BTH: torch.Tensor) -> None:
        taken = self._mode.prompt_vectors(hidden_BTH, self._groups[number].lengths.to(hidden_BTH.device))
        vectors = taken.cpu().numpy().astype(np.float64)
        positive, negative = self._layer_sums(layer)
        if self._signs[number]:
            negative += vectors.sum(axis=0)
        else:
            np.add.at(positive, self._fold_numbers(number), vectors)

    def _layer_sums(self, layer: int) -> tuple[Float64, Float64]:
        """The sums of a layer: of positive prompts (FOLDS, hidden), of negative ones (hidden,)."""
        if layer not in self._layers:
            self._layers[layer] = np.zeros((FOLDS, self._hidden)), np.zeros(self._hidden)
        return self._layers[layer]

    def pop_layer(self, layer: int) -> dict[str, Any]:
        """Return the sums of a layer, and forget them."""
        positive, negative = self._layer_sums(layer)
        del self._layers[layer]
        mean = negative / self._negatives if self._negatives else None
        return {"sums": positive, "counts": self._counts, "negative_mean": mean}
