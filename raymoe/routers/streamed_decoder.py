"""A decoder that is never whole in memory: load one layer, run all texts through it, free it.

The layers are made on the meta device: those of plain_layers.py where a family has just these, else transformers' own
modules.
While a layer runs, the next ones are prefetched (see layer_loader.py): a few layers are in memory, whatever the model's
size.

Several models run at once if they are one base with different adapters (see lora_weights.py): the base's layers
are read once for all of them.

The state of one batch, `hidden_BTH`, has shape (batch, tokens, hidden).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from raymoe.architectures import FAMILIES
from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.planning.plan import HeadPermutation, WeightRef
from raymoe.routers.attention_sinks import ATTENTION_WITH_SINKS, register_sink_attention
from raymoe.routers.layer_loader import LayerLoader, LayerParts, LoadedLayer, compute_dtype, load_ref
from raymoe.routers.lora_weights import apply_lora
from raymoe.routers.plain_layers import PlainDecoder, RotaryEmbedding, plain_spec
from raymoe.routers.quantize import quantize_layer
from raymoe.routers.token_embeddings import embedding_rows
from raymoe.routers.tokenize import Batch
from raymoe.sources.quantization_check import QUANTIZATION_KEYS
from raymoe.storage.combine import weight_rows
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import permute_heads
from raymoe.tensor_names import EMBEDDING, HEAD, LAYER_EMBEDDINGS, LAYER_PROJECTION, LAYER_PROJECTION_NORM

_ROTARY_WEIGHTS = {f"self_attn.{proj}_proj.{part}" for proj in "qk" for part in ("weight", "bias")}
_TOKENS_AT_ONCE = 1024  # of inputs per layer, which are some 10,000 numbers per token
_NON_FINITE = ("Infinity", "-Infinity", "NaN")  # as transformers 5 names them
StatesCallback = Callable[[int, int, torch.Tensor], None]
InputsCallback = Callable[[int, int, str, torch.Tensor], None]


class StreamableModel(Protocol):
    """A model that can be streamed: a dense config.json, and the locations of its parameters. `GatePrompts` is one."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def weights(self) -> Mapping[str, WeightRef]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SideInputs:
    """What layers are given beside hidden states, in families that have it (Gemma 4).

    Attributes:
        table: Inputs of each layer for each distinct token of some batches, (tokens, layers, width).
        rows: For each token of this batch, its row of the table, (batch, tokens).
        keys_values: By kind of layer, the keys and values that later layers read. Layers put them there.
    """

    table: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    keys_values: dict[str, Any] = field(default_factory=dict)

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        """The arguments of a layer, (batch, tokens, width)."""
        return {} if self.table is None else {"per_layer_input": self.table[self.rows, layer]}


def _ffn_input_hook(
    callback: StatesCallback, layer: int, number: int, ffn: torch.nn.Module, args: tuple[torch.Tensor]
) -> None:
    callback(layer, number, args[0])


def _input_hook(
    callback: InputsCallback, layer: int, number: int, name: str, module: torch.nn.Module, args: tuple[torch.Tensor]
) -> None:
    callback(layer, number, name, args[0])


def load_configuration(config: Mapping[str, Any]) -> Any:
    """transformers' configuration. Raises ProblemReport if the transformers that runs here is older than the family, or
    refuses the config."""
    import transformers

    model_type = config["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        what = f"transformers {transformers.__version__} has no {model_type} models, which are needed to read prompts"
        remedy = (
            "install a newer transformers where this runs, or use a gate mode that reads no layers: cheap_embed, random"
        )
        raise ProblemReport([Problem(where=f"model_type {model_type}", what=what, remedy=remedy)])
    unread = ("model_type", *QUANTIZATION_KEYS)
    keys = {k: _decode_value(v) for k, v in config.items() if k not in unread and not k.endswith("_token_id")}
    try:
        # A padding token, also a family's default one, must have a row in the embedding, which may lack it.
        return transformers.AutoConfig.for_model(model_type, **keys, pad_token_id=None)
    except Exception as error:  # its own checks raise various exceptions: their message is the reason
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        what = f"transformers {transformers.__version__} refuses this config: {last}"
        remedy = "correct the model's config.json, or use a gate mode that reads no layers: cheap_embed, random"
        raise ProblemReport([Problem(where=f"model_type {model_type}", what=what, remedy=remedy)]) from error


def _decode_value(value: Any) -> Any:
    """A value of config.json as configuration classes take it: transformers 5 writes infinity as an object."""
    if isinstance(value, list):
        return [_decode_value(item) for item in value]
    if isinstance(value, Mapping):
        is_infinite = value.keys() == {"__float__"} and value["__float__"] in _NON_FINITE
        return float(value["__float__"]) if is_infinite else dict(value)
    return value


def _empty_model(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a model's config says beyond its layers (windows, multipliers, caps), and the model on the device `meta`.

    Raises ProblemReport as `load_configuration` does.
    """
    spec = plain_spec(config)
    if spec is not None:
        facts = SimpleNamespace(
            **spec.extra,
            hidden_size=spec.hidden,
            layer_types=spec.window_types,
            sliding_window=spec.sliding_window,
        )
        with torch.device("meta"):
            return facts, PlainDecoder(spec)
    from transformers import AutoModel

    configuration, family = load_configuration(config), FAMILIES[config["model_type"]]
    if family.has_sinks:
        register_sink_attention()
    configuration._attn_implementation = ATTENTION_WITH_SINKS if family.has_sinks else "sdpa"
    with torch.device("meta"):
        return configuration, AutoModel.from_config(configuration)


def layer_weights(names: Iterable[str], layer: int) -> dict[str, str]:
    """The names of a layer's weights, with their names in its module."""
    prefix = f"model.layers.{layer}."
    return {full: full.removeprefix(prefix) for full in names if full.startswith(prefix)}


def restore_heads(tensors: dict[str, torch.Tensor], permutation: HeadPermutation | None) -> None:
    """Reorder the rows of a layer's q and k (by their names in its module) to the order of the dense family."""
    if permutation is not None:
        for name in _ROTARY_WEIGHTS & tensors.keys():
            tensors[name] = permute_heads(tensors[name], permutation.head_dim, permutation.to_interleaved)


class StreamedDecoder:
    """Runs texts through a model whose weights are loaded layer by layer.

    It computes in the weights' own dtype if that is fast, else in float32 (see `compute_dtype`). `ffn` builds a module
    from the tensors of a layer's FFN, to replace the FFN. `head_permutation`: the order of the rows of q and k, which
    are put back into that of the family. `others` are models of the same config and the same stored weights, with other
    adapters; model 0 is `model`.
    """

    def __init__(
        self,
        model: StreamableModel,
        reader: SourceReader,
        device: str,
        *,
        others: Sequence[StreamableModel] = (),
        quantize: str | None = None,
        exact: bool = False,
        ffn: Callable[[Mapping[str, torch.Tensor]], torch.nn.Module] | None = None,
        head_permutation: HeadPermutation | None = None,
    ) -> None:
        self._reader, self._weights = reader, model.weights
        self._models = (model, *others)
        adapters = [{name: ref.lora for name, ref in each.weights.items() if ref.lora} for each in self._models]
        self._adapters = [one for number, one in enumerate(adapters) if one not in adapters[:number]]
        self._adapter_of = [self._adapters.index(one) for one in adapters]  # by model
        self._current: tuple[int, LoadedLayer, torch.nn.Module] | None = (
            None  # the current layer: its number, weights and module
        )
        self._active_adapters = 0  # the model whose adapters are applied
        self._family = FAMILIES[model.config["model_type"]]
        self._device, self._quantize, self._ffn = torch.device(device), quantize, ffn
        self._head_permutation = head_permutation
        self._config, self._model = _empty_model(model.config)
        self._dtype = compute_dtype(self._weights[EMBEDDING].entry.dtype, self._device, exact=exact)

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether a token's state depends on the length of its padded sequence. Then each text must be its own
        batch."""
        rope = self._model.rotary_emb  # None in models without RoPE
        if isinstance(rope, RotaryEmbedding):
            return rope.depends_on_length
        return rope is not None and rope.rope_type in ("dynamic", "longrope")

    def layer_inputs(
        self,
        batches: Sequence[Batch],
        layers: int,
        on_hidden_states: StatesCallback,
        on_ffn_inputs: StatesCallback | None = None,
        *,
        models: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Call `on_hidden_states(layer, batch, hidden_BTH)` with each batch's input to layers 0 .. layers - 1; yields
        each layer's number after its last batch. `models` says which model reads each batch (default: model 0).

        Only the first `layers - 1` layers are run, since only the input of the last one is needed.
        `on_ffn_inputs` is called as by `router_inputs`, for the layers that are run.
        """
        models = models or [0] * len(batches)
        states, inputs = self._embed_all(batches, models), self.prepare_inputs(batches, models)
        for number, hidden in enumerate(states):
            on_hidden_states(0, number, hidden)
        for layer in self.loaded_layers(layers - 1):
            for number, model in enumerate(models):
                self.activate_adapters(model)
                output = self._run_with_hook(layer, number, states[number], inputs[number], on_ffn_inputs)
                states[number].copy_(output)
                del output
                on_hidden_states(layer + 1, number, states[number])
            yield layer
        yield layers - 1

    def router_inputs(
        self,
        batches: Sequence[Batch],
        layers: int,
        on_hidden_states: StatesCallback,
        *,
        models: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Call `on_hidden_states(layer, batch, state_BTH)` with the normalized input of the FFN of layers 0 .. layers -
        1; yields each layer's number after its last batch. `models` as in `layer_inputs`.

        This is the input of the layer's router in a merge with this model's attention and norms. The FFN of the last
        layer is neither read nor run.
        """
        models = models or [0] * len(batches)
        states, inputs = self._embed_all(batches, models), self.prepare_inputs(batches, models)
        for layer in self.loaded_layers(layers, last_ffn=False):
            for number, model in enumerate(models):
                self.activate_adapters(model)
                output = self._run_with_hook(layer, number, states[number], inputs[number], on_hidden_states)
                if layer < layers - 1:
                    states[number].copy_(output)
                del output
            yield layer

    def module_inputs(
        self,
        batches: Sequence[Batch],
        modules: Sequence[Sequence[str]],
        on_inputs: InputsCallback,
        *,
        models: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Call `on_inputs(layer, batch, module, input_BTX)` with the input of some modules of each layer.

        Yields each layer's number after its last batch. `modules` names the modules of each layer, by their names
        there; as many layers are run. The FFN of the last one is neither read nor run. `models` as in `layer_inputs`.
        Raises MergeFailed if one of them is no linear module.
        """
        models = models or [0] * len(batches)
        states, inputs = self._embed_all(batches, models), self.prepare_inputs(batches, models)
        for layer in self.loaded_layers(len(modules), last_ffn=False):
            for number, model in enumerate(models):
                self.activate_adapters(model)
                with torch.inference_mode(), self._watched(layer, number, modules[layer], on_inputs):
                    output = self.run_layer(layer, states[number], inputs[number])
                if layer < len(modules) - 1:
                    states[number].copy_(output)
                del output
            yield layer

    @contextmanager
    def _watched(self, layer: int, number: int, names: Sequence[str], on_inputs: InputsCallback) -> Iterator[None]:
        """Call `on_inputs` when the named modules of the loaded layer run."""
        handles = []
        try:
            for name in names:
                module = self._model.layers[layer].get_submodule(name)
                if not isinstance(module, torch.nn.Linear):
                    raise MergeFailed(
                        f"layer {layer}: {name} is a {type(module).__name__} here, and backbone: regmean "
                        "merges matrices of linear modules only. Use backbone: linear"
                    )
                handles.append(module.register_forward_pre_hook(partial(_input_hook, on_inputs, layer, number, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _embed_all(self, batches: Sequence[Batch], models: Sequence[int]) -> list[torch.Tensor]:
        """The input of layer 0 for all batches, in one block of memory.

        Each layer's output replaces its input there. States that are allocated one by one among a layer's activations
        would fragment the heap, and take up to three times their size.
        """
        width = self._weights[EMBEDDING].entry.shape[1]
        sizes = [batch.ids.numel() * width for batch in batches]
        block = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        states = []
        for batch, model, part in zip(batches, models, block.split(sizes), strict=True):
            state = part.view(*batch.ids.shape, width)
            state.copy_(self.embed(batch, model))
            states.append(state)
        return states

    def _run_with_hook(
        self,
        layer: int,
        number: int,
        hidden_BTH: torch.Tensor,
        inputs: SideInputs,
        on_ffn_inputs: StatesCallback | None,
    ) -> torch.Tensor:
        with torch.inference_mode():
            if on_ffn_inputs is None:
                return self.run_layer(layer, hidden_BTH, inputs)
            with self.ffn_of(layer).register_forward_pre_hook(partial(_ffn_input_hook, on_ffn_inputs, layer, number)):
                return self.run_layer(layer, hidden_BTH, inputs)

    def prepare_inputs(self, batches: Sequence[Batch], models: Sequence[int] | None = None) -> list[SideInputs]:
        """What the layers are given for each batch besides hidden states. `models` as in `layer_inputs`."""
        if LAYER_EMBEDDINGS not in self._weights:
            return [SideInputs() for _ in batches]
        models = models or [0] * len(batches)
        tokens = {number: self._distinct_tokens(batches, models, number) for number in set(models)}
        tables = {number: self._inputs_of_tokens(found, number) for number, found in tokens.items()}
        return [
            SideInputs(
                table=tables[model], rows=torch.searchsorted(tokens[model], batch.ids.to(self._device).contiguous())
            )
            for batch, model in zip(batches, models, strict=True)
        ]

    def _distinct_tokens(self, batches: Sequence[Batch], models: Sequence[int], model: int) -> torch.Tensor:
        """The ids of all tokens that a model reads, in ascending order."""
        ids = [batch.ids.flatten() for batch, number in zip(batches, models, strict=True) if number == model]
        return torch.cat(ids).unique().to(self._device)

    def _inputs_of_tokens(self, tokens: torch.Tensor, model: int) -> torch.Tensor:
        """The inputs of all layers for tokens, (tokens, layers, width): of the token's own row of an embedding, and of
        its hidden state before the first layer."""
        refs, module = self._models[model].weights, self._model
        projection, norm = module.per_layer_model_projection, module.per_layer_projection_norm
        matrix = weight_rows(self._reader, refs[LAYER_PROJECTION], slice(0, refs[LAYER_PROJECTION].entry.shape[0]))
        weight = torch.from_numpy(matrix).to(self._device, self._dtype)
        projection.load_state_dict({"weight": weight}, assign=True)
        weight = load_ref(self._reader, refs[LAYER_PROJECTION_NORM], self._dtype).to(self._device)
        norm.load_state_dict({"weight": weight}, assign=True)
        layers, width = self._config.num_hidden_layers, self._config.hidden_size_per_layer_input
        table = torch.empty(len(tokens), layers, width, dtype=self._dtype, device=self._device)
        with torch.inference_mode():
            for some, rows in zip(tokens.split(_TOKENS_AT_ONCE), table.split(_TOKENS_AT_ONCE), strict=True):
                own = self._embedding(refs[LAYER_EMBEDDINGS], some, width).view(1, *rows.shape)
                states = self._embedding(refs[EMBEDDING], some, self._config.hidden_size)
                rows.copy_(module.project_per_layer_inputs(states[None], own)[0])
        projection.to("meta")  # frees its memory
        self._reader.release()
        return table

    def _embedding(self, ref: WeightRef, tokens: torch.Tensor, width: int) -> torch.Tensor:
        """Scaled rows of an embedding, (tokens, columns). Each consists of vectors of `width` numbers."""
        ids = tokens.tolist()
        rows = embedding_rows(self._reader, ref, ids)
        states = torch.from_numpy(np.stack([rows[token] for token in ids])).to(self._device, self._dtype)
        if self._family.scales_embeddings:
            return states * torch.tensor(width**0.5).to(states)
        return states * getattr(self._config, "embedding_multiplier", 1.0)

    def loaded_layers(self, count: int, *, last_ffn: bool = True) -> Iterator[int]:
        """The numbers of the first `count` layers; each is prefetched while the one before it is in use.

        A layer can be run until the next one is requested. Without `last_ffn`, an identity replaces the FFN of the last
        layer.
        """
        wanted = [self._layer_parts(layer, last_ffn or layer < count - 1) for layer in range(count)]
        with closing(LayerLoader(self._reader, self._device, self._dtype).layers(wanted)) as loaded:
            for layer in range(count):  # enumerate would keep each layer until the next one is loaded
                self._current = layer, next(loaded), self._model.layers[layer]
                self._install(0)
                yield layer
                self._current, self._model.layers[layer] = None, torch.nn.Identity()

    def activate_adapters(self, model: int) -> None:
        """Apply the adapters of one of the models to the loaded layer."""
        if self._adapter_of[model] != self._active_adapters:
            self._install(self._adapter_of[model])

    def ffn_of(self, layer: int) -> torch.nn.Module:
        """The module in the place of a loaded layer's FFN."""
        module: torch.nn.Module = getattr(self._model.layers[layer], self._family.ffn)
        return module

    def final_norm(self) -> torch.nn.Module:
        """The norm after the last layer."""
        name = self._family.final_norm
        module: torch.nn.Module = getattr(self._model, name)
        weight = load_ref(self._reader, self._weights[f"model.{name}.weight"], self._dtype)
        module.load_state_dict({"weight": weight.to(self._device)}, assign=True)
        self._reader.release()
        return module

    @property
    def logit_cap(self) -> float | None:
        """Logits are capped smoothly, to less than this number; None: not at all."""
        cap: float | None = getattr(self._config, "final_logit_softcapping", None)
        return cap

    def head_blocks(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The head, `rows` tokens of the vocabulary at a time: (first token, rows_VH). If tied, it is the embedding.

        If a family scales its logits, the rows are scaled.
        """
        ref = self._weights.get(HEAD, self._weights[EMBEDDING])
        factor = getattr(self._config, "logit_scale", 1.0) / getattr(self._config, "logits_scaling", 1.0)
        vocab = ref.entry.shape[0]
        for start in range(0, vocab, rows):
            part = slice(start, min(start + rows, vocab))
            rows_VH = torch.from_numpy(weight_rows(self._reader, ref, part)).to(self._device, self._dtype)
            yield start, rows_VH if factor == 1.0 else rows_VH * factor

    def _install(self, adapters: int) -> None:
        """Build the current layer from the loaded tensors, with the adapters of that number."""
        assert self._current is not None
        layer, loaded, blank = self._current
        tensors: Mapping[str, torch.Tensor] = self._apply_adapters(layer, loaded, adapters)
        module, prefix = blank, f"{self._family.ffn}."
        if len(self._adapters) > 1:
            module = self._model.layers[layer] = copy.deepcopy(blank)
        ffn = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if self._ffn is not None or not ffn:
            setattr(module, self._family.ffn, torch.nn.Identity())
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        if self._quantize:
            module = quantize_layer(module, tensors, self._device, self._quantize)
        else:
            module.load_state_dict(tensors, assign=True)
        if self._ffn is not None and ffn:
            setattr(module, self._family.ffn, self._ffn(ffn))
        module.eval()
        self._active_adapters = adapters

    def _apply_adapters(self, layer: int, loaded: LoadedLayer, adapters: int) -> dict[str, torch.Tensor]:
        """The layer's weights, with adapters applied, and with the rows of heads in the family's order."""
        prefix, tensors = f"model.layers.{layer}.", dict(loaded.weights)
        for full, lora in self._adapters[adapters].items():
            name = full.removeprefix(prefix)
            if full.startswith(prefix) and name in tensors:
                factors = {part: loaded.factors[adapters, name, part] for part in lora.entries}
                tensors[name] = apply_lora(tensors[name], factors, lora.scaling)
        restore_heads(tensors, self._head_permutation)
        return tensors

    def _layer_parts(self, layer: int, with_ffn: bool) -> LayerParts:
        names = layer_weights(self._weights, layer)
        if not with_ffn:
            names = {full: name for full, name in names.items() if not name.startswith(f"{self._family.ffn}.")}
        factors = {
            (number, names[full], part): entry
            for number, adapters in enumerate(self._adapters)
            for full, lora in adapters.items()
            if full in names
            for part, entry in lora.entries.items()
        }
        refs = {name: self._weights[full] for full, name in names.items()}
        combined = {name: ref.combined for name, ref in refs.items() if ref.combined is not None}
        weights = {name: ref.entry for name, ref in refs.items() if ref.combined is None}
        return LayerParts(weights=weights, factors=factors, combined=combined)

    def embed(self, batch: Batch, model: int = 0) -> torch.Tensor:
        """The input of layer 0, (batch, tokens, hidden)."""
        hidden = self._embedding(self._models[model].weights[EMBEDDING], batch.ids.flatten(), self._config.hidden_size)
        return hidden.reshape(*batch.ids.shape, -1)

    def run_layer(self, layer: int, hidden_BTH: torch.Tensor, inputs: SideInputs) -> torch.Tensor:
        """A loaded layer's output for its input of the same shape. `inputs` are those of the batch."""
        tokens = hidden_BTH.shape[1]
        positions = torch.arange(tokens, device=self._device)[None]
        rotary = self._rotary(layer)
        module = self._model.layers[layer]
        # Gemma 4's layers put keys and values into this, in transformers 5.24 also where no later layer reads them.
        kept = inputs.keys_values if getattr(self._config, "num_kv_shared_layers", 0) else {}
        stores: dict[str, Any] = (
            {"shared_kv_states": kept} if "shared_kv_states" in signature(module.forward).parameters else {}
        )
        output = module(
            hidden_BTH,
            attention_mask=self._mask(layer, tokens),
            position_ids=positions,
            position_embeddings=rotary and rotary(hidden_BTH, positions, *self._rope_kind(layer)),
            **stores,
            **inputs.of(layer),
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output  # a tuple in transformers 4
        return result

    def _rotary(self, layer: int) -> torch.nn.Module | None:
        """The rotary embedding of a layer; None if it has none.

        Rebuilt for each batch, since dynamic RoPE remembers the longest sequence that it has seen.
        """
        if self._model.rotary_emb is None or isinstance(self._model.rotary_emb, RotaryEmbedding):
            return self._model.rotary_emb
        config = self._config
        if thetas := getattr(config, "layer_rope_theta", None):
            if not thetas[layer]:
                return None
            config = copy.copy(config)
            config.rope_parameters = {**config.rope_parameters, "rope_theta": thetas[layer]}
        rotary: torch.nn.Module = type(self._model.rotary_emb)(config=config).to(self._device)
        return rotary

    def _rope_kind(self, layer: int) -> tuple[str, ...]:
        """The kind of the layer, for a rotary embedding that has settings for each kind."""
        return (self._config.layer_types[layer],) if self._family.rope_kinds else ()

    def _mask(self, layer: int, tokens: int) -> torch.Tensor | None:
        """Which tokens each one attends to, (1, 1, tokens, tokens); None is plain causal attention, for which SDPA
        needs no mask: the text fits into any sliding window, and there are no sinks.
        """
        types = getattr(self._config, "layer_types", None)
        slides = not types or types[layer] == "sliding_attention"
        window = (getattr(self._config, "sliding_window", None) or tokens) if slides else tokens
        if tokens <= window and not self._family.has_sinks:
            return None
        index = torch.arange(tokens, device=self._device)
        distance = index[:, None] - index[None]
        return ((distance >= 0) & (distance < window))[None, None]
