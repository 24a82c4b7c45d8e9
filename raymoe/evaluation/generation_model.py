"""A merge as transformers' decoder of the dense family, with a MoE block in place of each layer's FFN.

    resident    all layers stay on the device
    streamed    at each step, each layer is read, run and freed, and the next one is prefetched

Embedding, head and attention's cache stay on the device either way. Generation itself is transformers' `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raymoe.architectures import FAMILIES
from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.evaluation.moe_block import MoeBlock, make_ffn
from raymoe.evaluation.options import GenerationOptions
from raymoe.routers.layer_loader import LayerLoader, LayerParts, LoadedLayer, compute_dtype, load_weight
from raymoe.routers.streamed_decoder import layer_weights, load_configuration, restore_heads
from raymoe.storage.source_reader import SourceReader
from raymoe.tensor_names import EMBEDDING, HEAD

RoutingCallback = Callable[[int, npt.NDArray[np.int64], npt.NDArray[np.float32]], None]
"""`on_routing(layer, experts_TK, weights_TK)`: the experts that a layer's router chose for each token of one step."""


def resident_bytes(model: CheckpointModel, device: str) -> int:
    """Memory of all weights in the dtype that they are computed with."""
    dtype = _dtype(model, torch.device(device))
    return sum(math.prod(ref.entry.shape) for ref in model.weights.values()) * int(dtype.itemsize)


def _dtype(model: CheckpointModel, device: torch.device) -> torch.dtype:
    return compute_dtype(model.weights[EMBEDDING].entry.dtype, device, exact=False)


class GenerationModel:
    """Use it with one prompt at a time.

    Args:
        model: The merge's weights.
        reader: Reads them. If the model is streamed, it has to stay open while the model is used.
        device: `cpu` or `cuda`.
        resident: Load all layers now and keep them.
        on_routing: Called for each layer of each step.
        layer_loaded: Called with the bytes of each layer that was loaded to be kept.
    """

    def __init__(
        self,
        model: CheckpointModel,
        reader: SourceReader,
        device: str,
        *,
        resident: bool,
        on_routing: RoutingCallback,
        layer_loaded: Callable[[int], None] = lambda count: None,
    ) -> None:
        assert model.rule is not None
        self._model, self._rule, self._reader = model, model.rule, reader
        self._device, self._on_routing = torch.device(device), on_routing
        self._dtype, self._family = _dtype(model, self._device), FAMILIES[model.config["model_type"]]
        self._module = self._empty_decoder()
        self._layers: Sequence[torch.nn.Module] = self._module.model.layers
        self._empty_layers = [layer.state_dict() for layer in self._layers]
        self._parts = [self._layer_parts(number) for number in range(len(self._layers))]
        self._loading: Generator[LoadedLayer, None, None] | None = None  # of the step that is running
        self._load_what_stays()
        for number, layer in enumerate(self._layers):
            if not resident:
                layer.register_forward_pre_hook(partial(self._before_layer, number))
            layer.register_forward_hook(partial(self._after_layer, number, drop=not resident))
        if resident:
            self._load_layers(layer_loaded)

    def generate(self, ids: Sequence[int], options: GenerationOptions, end_tokens: Sequence[int]) -> list[int]:
        """The new tokens. The first step reads the prompt, and each of the others one token."""
        from transformers import GenerationConfig

        ids_BT = torch.tensor([list(ids)], device=self._device)
        if options.max_new_tokens == 0:
            with torch.inference_mode():
                self._module.model(input_ids=ids_BT, use_cache=False)
            return []
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=end_tokens[0] if end_tokens else 0,
            **sampling,
        )
        torch.manual_seed(options.seed)
        with torch.inference_mode():
            made_BT = self._module.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config)
        tokens: list[int] = made_BT[0, len(ids) :].tolist()
        return tokens

    def _empty_decoder(self) -> Any:
        """transformers' model without weights. Tensors that it computes from its config alone are on the device."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = load_configuration(self._model.config)
        config._attn_implementation = "eager" if self._family.has_sinks else "sdpa"
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                computed = child._non_persistent_buffers_set & {n for n, b in child.named_buffers() if b.is_meta}
                if "embed_scale" in computed:
                    child.embed_scale = torch.tensor(child.scalar_embed_scale, device=self._device)
                elif computed:  # the angles of RoPE
                    setattr(parent, name, type(child)(config=config).to(self._device))
        if hasattr(module.model, "first_kv_shared_layer_idx"):
            # From this layer on, Gemma 4 runs the last token of a prompt only. Here, all tokens choose experts.
            module.model.first_kv_shared_layer_idx = len(module.model.layers)
        for layer in module.model.layers:
            setattr(layer, self._family.ffn, torch.nn.Identity())
        module.generation_config = GenerationConfig()  # a family's default names tokens of another tokenizer
        return module.eval().requires_grad_(False)

    def _layer_parts(self, number: int) -> LayerParts:
        names = layer_weights(self._model.weights, number)
        return LayerParts(weights={name: self._model.weights[full].entry for full, name in names.items()})

    def _load_what_stays(self) -> None:
        entries = {name: ref.entry for name, ref in self._model.weights.items() if not name.startswith("model.layers.")}
        self._reader.load(list(entries.values()))
        tensors = {
            name: load_weight(self._reader, entry, self._dtype).to(self._device) for name, entry in entries.items()
        }
        self._reader.release()
        tensors.setdefault(HEAD, tensors[EMBEDDING])
        found = self._module.load_state_dict(tensors, strict=False, assign=True)
        assert not found.unexpected_keys, found.unexpected_keys

    def _load_layers(self, layer_loaded: Callable[[int], None]) -> None:
        for number, loaded in enumerate(self._loaded_layers()):
            # The loader reuses the memory of a layer.
            self._install(number, {name: tensor.clone() for name, tensor in loaded.weights.items()})
            layer_loaded(sum(entry.nbytes for entry in self._parts[number].entries))

    def _loaded_layers(self) -> Generator[LoadedLayer, None, None]:
        return LayerLoader(self._reader, self._device, self._dtype).layers(self._parts)

    def _install(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        layer, prefix = self._layers[number], f"{self._family.ffn}."
        restore_heads(tensors, self._model.head_permutation)
        ffn = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        layer.load_state_dict(own, assign=True)
        setattr(layer, self._family.ffn, make_ffn(self._rule, ffn))

    def _before_layer(self, number: int, layer: torch.nn.Module, arguments: object) -> None:
        if number == 0 or self._loading is None:
            self._loading = self._loaded_layers()
        self._install(number, dict(next(self._loading).weights))

    def _after_layer(
        self, number: int, layer: torch.nn.Module, arguments: object, output: object, *, drop: bool
    ) -> None:
        ffn = getattr(layer, self._family.ffn)
        if isinstance(ffn, MoeBlock) and (choice := ffn.choice_of_sources) is not None:
            self._on_routing(number, choice.experts.cpu().numpy(), choice.weights.float().cpu().numpy())
        if drop:
            setattr(layer, self._family.ffn, torch.nn.Identity())
            layer.load_state_dict(self._empty_layers[number], assign=True)
            if number + 1 == len(self._layers) and self._loading is not None:
                self._loading.close()
                self._loading = None
