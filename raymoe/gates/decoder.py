"""A decoder that is never in memory: one layer is loaded, all prompts go through it, it is dropped.

The layers are transformers' own modules, made on the meta device, so that every family computes what transformers
computes. While a layer runs, a thread reads the next one: two layers at most are held, whatever the model's size.

The state of one batch, `hidden_BTH`, has shape (batch, tokens, hidden).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from raymoe.config.modes import EMBEDDING
from raymoe.gates.embeddings import embedding_rows
from raymoe.gates.prompts import Batch
from raymoe.gates.quantise import quantised_layer
from raymoe.planning.types import GatePrompts, WeightRef
from raymoe.sources.types import TensorEntry
from raymoe.storage.reader import SourceReader
from raymoe.storage.transform import load_array, with_lora

__all__ = ["StreamedDecoder"]

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def _entries(ref: WeightRef) -> tuple[TensorEntry, ...]:
    """What has to be read for a weight."""
    return (ref.entry,) if ref.lora is None else (ref.entry, ref.lora.a, ref.lora.b)


class StreamedDecoder:
    """Runs prompts through a model whose weights are loaded layer by layer.

    On a GPU it computes in the weights' own dtype, on a CPU in float32: there bfloat16 is slower, and less exact.
    """

    def __init__(self, prompts: GatePrompts, reader: SourceReader, device: str, *, quantise: str | None = None) -> None:
        from transformers import AutoConfig, AutoModel

        self._reader, self._weights = reader, prompts.weights
        self._device, self._quantise = torch.device(device), quantise
        config = {k: v for k, v in prompts.config.items() if k not in ("model_type", "quantization_config")}
        self._config: Any = AutoConfig.for_model(prompts.config["model_type"], **config)
        self._config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._model: Any = AutoModel.from_config(self._config)
        self._dtype = torch.float32
        if self._device.type == "cuda":
            self._dtype = _TORCH_DTYPES[self._weights[EMBEDDING].entry.dtype]

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether a token's state depends on how long its sequence is, padding included: prompts must go alone."""
        return self._model.rotary_emb.rope_type in ("dynamic", "longrope")

    def layer_inputs(
        self, batches: Sequence[Batch], layers: int, visit: Callable[[int, int, torch.Tensor], None]
    ) -> None:
        """Call `visit(layer, batch, hidden_BTH)` with each batch's input to layers 0 .. layers - 1.

        Only the first `layers - 1` layers are run, since the input of the last one is all that is asked for.
        """
        with torch.inference_mode(), ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            states = [self._embed(batch) for batch in batches]
            for number, hidden in enumerate(states):
                visit(0, number, hidden)
            for layer, module in self._modules(layers - 1, pool):
                for number, batch in enumerate(batches):
                    states[number] = self._run(module, layer, states[number], batch)
                    visit(layer + 1, number, states[number])

    def _modules(self, count: int, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Any]]:
        """The first `count` layers, each loaded while the one before it is in use."""
        ahead: Future[Mapping[str, torch.Tensor]] | None = pool.submit(self._load, 0) if count else None
        for layer in range(count):
            assert ahead is not None
            tensors = ahead.result()
            ahead = pool.submit(self._load, layer + 1) if layer + 1 < count else None
            module = self._model.layers[layer]
            if self._quantise:
                module = quantised_layer(module, tensors, self._device, self._quantise)
            else:
                module.load_state_dict({name: t.to(self._device) for name, t in tensors.items()}, assign=True)
            del tensors
            yield layer, module.eval()
            self._model.layers[layer] = torch.nn.Identity()

    def _load(self, layer: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{layer}."
        names = [name for name in self._weights if name.startswith(prefix)]
        self._reader.load([entry for name in names for entry in _entries(self._weights[name])])
        tensors = {name.removeprefix(prefix): self._tensor(self._weights[name]) for name in names}
        self._reader.release()  # what is not used in place has been widened or merged: its source can go
        return tensors

    def _tensor(self, ref: WeightRef) -> torch.Tensor:
        """A weight on the CPU, in the dtype that it is computed with."""
        array = load_array(self._reader, ref.entry)
        if ref.lora is not None:
            merged = with_lora(self._reader, array.astype(np.float32), ref.lora, slice(None))
            return torch.from_numpy(merged).to(self._dtype)
        flat = torch.frombuffer(self._reader.view(ref.entry), dtype=_TORCH_DTYPES[ref.entry.dtype])
        return flat.reshape(ref.entry.shape).to(self._dtype)

    def _embed(self, batch: Batch) -> torch.Tensor:
        rows = embedding_rows(self._reader, self._weights[EMBEDDING], batch.ids.flatten().tolist())
        hidden = torch.from_numpy(np.stack([rows[token] for token in batch.ids.flatten().tolist()]))
        return hidden.reshape(*batch.ids.shape, -1).to(self._device, self._dtype)

    def _run(self, module: Any, layer: int, hidden_BTH: torch.Tensor, batch: Batch) -> torch.Tensor:
        tokens = hidden_BTH.shape[1]
        positions = torch.arange(tokens, device=self._device)[None]
        # Made anew for each batch: dynamic RoPE remembers the longest sequence that it has seen.
        rotary = type(self._model.rotary_emb)(config=self._config).to(self._device)
        output = module(
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
