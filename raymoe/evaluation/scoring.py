"""Computes log-likelihoods of texts, and each layer's choices, with a model that is never whole in memory.

    for a group of texts with states that fit: embed -> layer 0 .. L-1, each loaded once for all variants -> norm ->
    head

Variants are the same weights with different routing; they share the reading of the layers. The head is read in blocks
of the vocabulary, and each token's log-sum-exp grows block by block: tokens x vocabulary never exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.evaluation.moe_block import MoeBlock, Route, make_ffn
from raymoe.routers.streamed_decoder import StreamedDecoder
from raymoe.routers.tokenize import TOKEN_BUDGET, Batch, batch_numbers, chunk_size
from raymoe.storage.source_reader import SourceReader

Float32 = npt.NDArray[np.float32]
RoutingCallback = Callable[[int, int, npt.NDArray[np.int64], Float32], None]
"""`on_routing(layer, text, experts_TK, weights_TK)`: the experts that a layer's router chose for each token of a
text."""

# The most bytes of states of all texts and variants in one pass. More texts need more passes.
STATE_BYTES = 2 << 30
# How many rows of the head are used at once, and for how many tokens their scores are held: 64 MiB of float32.
_VOCAB_BLOCK, _TOKEN_BLOCK = 16384, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of routing. `rows` (layers, experts, hidden) replace the checkpoint's, `shared_rows` those of the shared
    expert's gate; `forced` names the expert of each text. `per_token` replaces the number of experts for a token.
    `on_routing` is called with the chosen experts."""

    name: str
    rows: Float32 | None = None
    shared_rows: Float32 | None = None
    forced: Sequence[int] | None = None
    per_token: int | None = None
    on_routing: RoutingCallback | None = None


def log_likelihoods(
    model: CheckpointModel,
    texts: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    reader: SourceReader,
    device: str,
    *,
    work_done: Callable[[int], None] = lambda tokens: None,
) -> dict[str, list[Float32]]:
    """For each variant and text, the log-likelihoods of its tokens except the first, (tokens - 1,), in nats.

    `texts` are token ids, two or more each. `work_done` is called with numbers of tokens that have passed a layer or a
    block of the head; their sum is `pass_work`.
    """
    with torch.inference_mode():
        found: dict[str, list[Float32]] = {variant.name: [np.empty(0, np.float32)] * len(texts) for variant in variants}
        for numbers in _passes(texts, 4 * (model.spec.hidden + model.spec.kept_keys) * len(variants)):
            one_pass = _Pass(model, texts, numbers, variants, reader, device)
            one_pass.run(work_done)
            for variant in variants:
                for number, values in one_pass.results(variant):
                    found[variant.name][number] = values
        return found


def pass_work(model: CheckpointModel, texts: Sequence[Sequence[int]], variants: int) -> int:
    """Tokens x layers of one call of `log_likelihoods`; a block of the head counts as a layer."""
    layers = model.spec.layers + math.ceil(model.spec.vocab / _VOCAB_BLOCK)
    return sum(map(len, texts)) * layers * variants


class _Pass:
    """One pass of some texts through the model, in batches; `_groups` has the numbers of the texts in each."""

    def __init__(
        self,
        model: CheckpointModel,
        texts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        variants: Sequence[Variant],
        reader: SourceReader,
        device: str,
    ) -> None:
        self._model, self._texts, self._variants = model, texts, variants
        ffn = partial(make_ffn, model.rule) if model.rule else None
        self._decoder = StreamedDecoder(
            model, reader, device, ffn=ffn, head_permutation=model.head_permutation, exact=True
        )
        budget = 1 if self._decoder.rope_depends_on_length else TOKEN_BUDGET
        groups = batch_numbers([len(texts[number]) for number in numbers], budget, chunk_size(model.config))
        self._groups = [[numbers[place] for place in group] for group in groups]
        self._batches = [Batch([texts[number] for number in group]) for group in self._groups]
        embedded = [self._decoder.embed(batch) for batch in self._batches]
        self._states = {variant.name: list(embedded) for variant in variants}
        inputs = self._decoder.prepare_inputs(self._batches)
        # Keys and values depend on the variant.
        self._inputs = {v.name: [replace(of_batch, keys_values={}) for of_batch in inputs] for v in variants}
        self._values: dict[str, list[torch.Tensor]] = {}

    def run(self, work_done: Callable[[int], None]) -> None:
        for layer in self._decoder.loaded_layers(self._model.spec.layers):
            for variant in self._variants:
                states = self._states[variant.name]
                for number, batch in enumerate(self._batches):
                    self._set_route(layer, variant, number)
                    states[number] = self._decoder.run_layer(layer, states[number], self._inputs[variant.name][number])
                    self._report_routing(layer, variant, number)
                    work_done(int(batch.lengths.sum()))
        self._score(work_done)

    def results(self, variant: Variant) -> Iterator[tuple[int, Float32]]:
        """(number of the text, log-likelihoods of its tokens except the first)."""
        for group, batch, values in zip(self._groups, self._batches, self._values[variant.name], strict=True):
            array = values.cpu().numpy()
            for number, row, length in zip(group, array, batch.lengths.tolist(), strict=True):
                yield number, row[: length - 1].copy()

    def _set_route(self, layer: int, variant: Variant, number: int) -> None:
        ffn = self._decoder.ffn_of(layer)
        if not isinstance(ffn, MoeBlock):
            return
        like = self._states[variant.name][number]

        def rows(values: Float32 | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values[layer]).to(like.device, like.dtype)

        forced = None
        if variant.forced is not None:
            forced = torch.tensor([variant.forced[text] for text in self._groups[number]], device=like.device)
        ffn.route = Route(
            router=rows(variant.rows),
            shared_router=rows(variant.shared_rows),
            forced=forced,
            per_token=variant.per_token,
        )

    def _report_routing(self, layer: int, variant: Variant, number: int) -> None:
        ffn = self._decoder.ffn_of(layer)
        if variant.on_routing is None or not isinstance(ffn, MoeBlock) or (choice := ffn.choice_of_sources) is None:
            return
        rows, tokens = self._batches[number].ids.shape
        experts = choice.experts.reshape(rows, tokens, -1).cpu().numpy()
        weights = choice.weights.reshape(rows, tokens, -1).cpu().numpy()
        for row, text in enumerate(self._groups[number]):
            length = len(self._texts[text])
            variant.on_routing(layer, text, experts[row, :length], weights[row, :length])

    def _score(self, work_done: Callable[[int], None]) -> None:
        """Compute log-likelihoods from the last states. Each block of the head is read once for all texts and
        variants."""
        norm, cap = self._decoder.final_norm(), self._decoder.logit_cap
        scores: dict[str, list[_TokenScores]] = {}
        for variant in self._variants:
            states = self._states.pop(variant.name)
            scores[variant.name] = []
            for batch in self._batches:
                hidden_BTH = norm(states.pop(0)[:, :-1])
                scores[variant.name].append(_TokenScores(hidden_BTH.flatten(0, 1), batch.ids[:, 1:].flatten()))
        for start, rows_VH in self._decoder.head_blocks(_VOCAB_BLOCK):
            for members in scores.values():
                for member, batch in zip(members, self._batches, strict=True):
                    member.add(start, rows_VH, cap)
                    work_done(int(batch.lengths.sum()))
        for name, members in scores.items():
            shapes = [(len(batch.lengths), batch.ids.shape[1] - 1) for batch in self._batches]
            self._values[name] = [m.values().reshape(shape) for m, shape in zip(members, shapes, strict=True)]


class _TokenScores:
    """Log-likelihoods of target tokens (N,) given normalized states (N, H), summed block by block of the head."""

    def __init__(self, states_NH: torch.Tensor, targets_N: torch.Tensor) -> None:
        self._states, self._targets = states_NH, targets_N.to(states_NH.device)
        self._total = torch.full(targets_N.shape, -torch.inf, device=states_NH.device)
        self._target_scores = torch.zeros(targets_N.shape, device=states_NH.device)

    def add(self, start: int, rows_VH: torch.Tensor, cap: float | None) -> None:
        """Add the rows [start, start + V) of the head. `cap`: the model's soft cap of logits."""
        for first in range(0, len(self._states), _TOKEN_BLOCK):
            part = slice(first, first + _TOKEN_BLOCK)
            scores = torch.nn.functional.linear(self._states[part], rows_VH).float()
            if cap is not None:
                scores = torch.tanh(scores / cap) * cap
            self._total[part] = torch.logaddexp(self._total[part], scores.logsumexp(dim=-1))
            place = self._targets[part] - start
            inside = (place >= 0) & (place < len(rows_VH))
            own = scores.gather(1, place.clamp(0, len(rows_VH) - 1)[:, None])[:, 0]
            self._target_scores[part] = torch.where(inside, own, self._target_scores[part])

    def values(self) -> torch.Tensor:
        return self._target_scores - self._total


def _passes(texts: Sequence[Sequence[int]], bytes_per_token: int) -> Iterator[list[int]]:
    """Numbers of texts, shortest first, in groups with states of at most `STATE_BYTES`."""
    group: list[int] = []
    held = 0
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number])):
        size = len(texts[number]) * bytes_per_token
        if group and held + size > STATE_BYTES:
            yield group
            group, held = [], 0
        group.append(number)
        held += size
    if group:
        yield group
