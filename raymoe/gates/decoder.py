"""A decoder that is never in memory: one layer is loaded, all texts go through it, it is dropped.

The layers are transformers' own modules, made on the meta device, so that every family computes what transformers
computes. While a layer runs, the next ones are read (see loading.py): a few layers are held, whatever the model's size.

The state of one batch, `hidden_BTH`, has shape (batch, tokens, hidden).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from raymoe.architectures import FAMILIES
from raymoe.config.modes import EMBEDDING
from raymoe.errors import Problem, ProblemReport
from raymoe.gates.embeddings import embedding_rows
from raymoe.gates.loading import LayerLoader, compute_dtype, load_weight
from raymoe.gates.prompts import Batch
from raymoe.gates.quantise import quantised_layer
from raymoe.planning.types import WeightRef
from raymoe.storage.reader import SourceReader
from raymoe.storage.transform import read_rows, with_lora

__all__ = ["ReadableModel", "StreamedDecoder"]

_HEAD = "lm_head.weight"
Visit = Callable[[int, int, torch.Tensor], None]


class ReadableModel(Protocol):
    """What can be streamed: a dense model's config.json, and where its parameters lie (`GatePrompts`, for one)."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def weights(self) -> Mapping[str, WeightRef]: ...


def _look(visit: Visit, layer: int, number: int, ffn: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
    visit(layer, number, args[0])


def _configuration(config: Mapping[str, Any]) -> Any:
    """transformers' configuration. Raises ProblemReport if the transformers that runs here is older than the family."""
    import transformers

    model_type = config["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        what = f"transformers {transformers.__version__} has no {model_type} models, which are to read prompts"
        remedy = "install transformers 5 where this runs, or use a gate mode that reads no layers (cheap_embed, random)"
        raise ProblemReport([Problem(where=f"model_type {model_type}", what=what, remedy=remedy)])
    keys = {key: _decoded(v) for key, v in config.items() if key not in ("model_type", "quantization_config")}
    return transformers.AutoConfig.for_model(model_type, **keys)


def _decoded(value: Any) -> Any:
    """A value of config.json as configuration classes take it: transformers 5 writes infinity as an object."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else dict(value)
    return value


class StreamedDecoder:
    """Runs texts through a model whose weights are loaded layer by layer.

    It computes in the weights' own dtype where that is fast, else in float32 (see `compute_dtype`).
    `ffn` makes another module out of the tensors of a layer's FFN, to stand in its place.
    """

    def __init__(
        self,
        model: ReadableModel,
        reader: SourceReader,
        device: str,
        *,
        quantise: str | None = None,
        exact: bool = False,
        ffn: Callable[[Mapping[str, torch.Tensor]], torch.nn.Module] | None = None,
    ) -> None:
        from transformers import AutoModel

        self._reader, self._weights = reader, model.weights
        self._family = FAMILIES[model.config["model_type"]]
        self._device, self._quantise, self._ffn = torch.device(device), quantise, ffn
        self._config = _configuration(model.config)
        self._config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._model: Any = AutoModel.from_config(self._config)
        self._dtype = compute_dtype(self._weights[EMBEDDING].entry.dtype, self._device, exact=exact)

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether a token's state depends on how long its sequence is, padding included: texts must go alone."""
        return self._model.rotary_emb.rope_type in ("dynamic", "longrope")

    def layer_inputs(
        self, batches: Sequence[Batch], layers: int, visit: Visit, look: Visit | None = None
    ) -> Iterator[int]:
        """Call `visit(layer, batch, hidden_BTH)` with each batch's input to layers 0 .. layers - 1; the number of each
        layer, when all is said of it.

        Only the first `layers - 1` layers are run, since the input of the last one is all that is asked for. `look` is
        called as by `router_inputs`, for the layers that are run.
        """
        states = [self.embed(batch) for batch in batches]
        for number, hidden in enumerate(states):
            visit(0, number, hidden)
        for layer in self.loaded_layers(layers - 1):
            for number in range(len(batches)):
                states[number] = self._run_seen(layer, number, states[number], look)
                visit(layer + 1, number, states[number])
            yield layer
        yield layers - 1

    def router_inputs(self, batches: Sequence[Batch], layers: int, visit: Visit) -> Iterator[int]:
        """Call `visit(layer, batch, state_BTH)` with the normalised state that layer's FFN gets, 0 .. layers - 1; the
        number of each layer, when all batches have been through it.

        It is what the layer's router sees in a merge that has this model's attention and norms. The FFN of the last
        layer is neither read nor run.
        """
        states = [self.embed(batch) for batch in batches]
        for layer in self.loaded_layers(layers, last_ffn=False):
            for number in range(len(batches)):
                states[number] = self._run_seen(layer, number, states[number], visit)
            yield layer

    def _run_seen(self, layer: int, number: int, hidden_BTH: torch.Tensor, look: Visit | None) -> torch.Tensor:
        with torch.inference_mode():
            if look is None:
                return self.run_layer(layer, hidden_BTH)
            with self.ffn_of(layer).register_forward_pre_hook(partial(_look, look, layer, number)):
                return self.run_layer(layer, hidden_BTH)

    def loaded_layers(self, count: int, *, last_ffn: bool = True) -> Iterator[int]:
        """The numbers of the first `count` layers, each loaded while the one before it is in use.

        A layer can be run until the next one is asked for. Without `last_ffn` the last one has no FFN: what stands in
        its place gives back its input.
        """
        wanted = [self._layer_weights(layer, last_ffn or layer < count - 1) for layer in range(count)]
        with closing(LayerLoader(self._reader, self._device, self._dtype).layers(wanted)) as loaded:
            for layer in range(count):  # enumerate would hold on to each layer until the next is there
                self._install(layer, next(loaded))
                yield layer
                self._model.layers[layer] = torch.nn.Identity()

    def ffn_of(self, layer: int) -> torch.nn.Module:
        """What stands in the place of the FFN of a layer that is loaded."""
        module: torch.nn.Module = getattr(self._model.layers[layer], self._family.ffn)
        return module

    def final_norm(self) -> torch.nn.Module:
        """The norm after the last layer."""
        name = self._family.final_norm
        module: torch.nn.Module = getattr(self._model, name)
        weight = load_weight(self._reader, self._weights[f"model.{name}.weight"], self._dtype)
        module.load_state_dict({"weight": weight.to(self._device)}, assign=True)
        self._reader.release()
        return module

    def head_blocks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The head, `rows` tokens of the vocabulary at a time: (first token, rows_VH). Tied, it is the embedding.

        Where a family scales its logits, the rows are scaled.
        """
        ref = self._weights.get(_HEAD, self._weights[EMBEDDING])
        factor = getattr(self._config, "logit_scale", 1.0) / getattr(self._config, "logits_scaling", 1.0)
        vocab = ref.entry.shape[0]
        for start in range(0, vocab, rows):
            part = slice(start, min(start + rows, vocab))
            block = read_rows(self._reader, ref.entry, part)
            if ref.lora is not None:
                block = with_lora(self._reader, block, ref.lora, part)
            rows_VH = torch.from_numpy(block).to(self._device, self._dtype)
            yield start, rows_VH if factor == 1.0 else rows_VH * factor

    def _install(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        module, prefix = self._model.layers[layer], f"{self._family.ffn}."
        ffn = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if self._ffn is not None or not ffn:
            setattr(module, self._family.ffn, torch.nn.Identity())
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        if self._quantise:
            module = quantised_layer(module, tensors, self._device, self._quantise)
        else:
            module.load_state_dict(tensors, assign=True)
        if self._ffn is not None and ffn:
            setattr(module, self._family.ffn, self._ffn(ffn))
        module.eval()

    def _layer_weights(self, layer: int, with_ffn: bool) -> dict[str, WeightRef]:
        prefix = f"model.layers.{layer}."
        weights = {name.removeprefix(prefix): ref for name, ref in self._weights.items() if name.startswith(prefix)}
        return {name: ref for name, ref in weights.items() if with_ffn or not name.startswith(f"{self._family.ffn}.")}

    def embed(self, batch: Batch) -> torch.Tensor:
        """The input of layer 0, (batch, tokens, hidden)."""
        rows = embedding_rows(self._reader, self._weights[EMBEDDING], batch.ids.flatten().tolist())
        hidden = torch.from_numpy(np.stack([rows[token] for token in batch.ids.flatten().tolist()]))
        hidden = hidden.reshape(*batch.ids.shape, -1).to(self._device, self._dtype)
        return hidden * getattr(self._config, "embedding_multiplier", 1.0)

    def run_layer(self, layer: int, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """A loaded layer's output for its input of the same shape."""
        tokens = hidden_BTH.shape[1]
        positions = torch.arange(tokens, device=self._device)[None]
        # Made anew for each batch: dynamic RoPE remembers the longest sequence that it has seen.
        rotary = type(self._model.rotary_emb)(config=self._config).to(self._device)
        output = self._model.layers[layer](
            hidden_BTH,
            attention_mask=self._mask(layer, tokens),
            position_ids=positions,
            position_embeddings=rotary(hidden_BTH, positions),
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output  # a tuple in transformers 4
        return result

    def _mask(self, layer: int, tokens: int) -> torch.Tensor | None:
        """None is plain causal attention; a mask (1, 1, tokens, tokens) only where a sliding window bites."""
        window = getattr(self._config, "sliding_window", None)
        types = getattr(self._config, "layer_types", None)
        if not window or tokens <= window or (types and types[layer] != "sliding_attention"):
            return None
        index = torch.arange(tokens, device=self._device)
        distance = index[:, None] - index[None]
        return ((distance >= 0) & (distance < window))[None, None]
