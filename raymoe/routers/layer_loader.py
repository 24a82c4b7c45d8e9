"""Loads a model's layers onto the device one after another, with prefetching.

    CPU   a thread reads the next layer and converts it to float32, while the current one runs
    GPU   file --several threads--> pinned buffer --stream of its own--> GPU memory, as one copy per layer

On a CPU, two buffers of one layer each are used in turn: mapping new memory for each layer would cost more than reading
it. On a GPU, two pinned buffers of one layer each are used in turn, so that reading, copying and computing overlap; at
most three layers are in GPU memory. Weights that are stored in the dtype of computation are copied unchanged. Others
are cast on the CPU first, as are the factors of adapters (to float64) and weights that are combined from those of
several models (storage/combine.py).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raymoe.planning.plan import Combination, WeightRef
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.combine import load_combined
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import load_array

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_READERS = 6  # threads that read one layer: one alone does not keep up with page cache or NVMe
_BLOCK_BYTES = 8 << 20
_ALIGNMENT = 256  # bytes; tensors in a buffer are aligned for fast kernels

FactorKey = tuple[int, str, str]
"""Which of several adapters, on which weight, and which of its factors (see `LoraPair.entries`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """The locations of a layer's weights, by their names in its module, and of adapters' factors; and the weights that
    are combined from several models."""

    weights: Mapping[str, TensorEntry]
    factors: Mapping[FactorKey, TensorEntry] = field(default_factory=dict)
    combined: Mapping[str, Combination] = field(default_factory=dict)

    @property
    def entries(self) -> list[TensorEntry]:
        """The tensors that are loaded whole. Tensors to combine are read in blocks."""
        return [*self.weights.values(), *self.factors.values()]


@dataclass(slots=True, kw_only=True)
class LoadedLayer:
    """A layer on the device: weights in the dtype of computation, factors in float64."""

    weights: dict[str, torch.Tensor]
    factors: dict[FactorKey, torch.Tensor]


def compute_dtype(stored: str, device: torch.device, *, exact: bool) -> torch.dtype:
    """The dtype of computation for weights stored as `stored`: on a GPU the same; on a CPU float32.

    CPUs that multiply bfloat16 natively, several times as fast as float32, compute in it unless `exact`.
    """
    if device.type != "cpu":
        return _TORCH_DTYPES[stored]
    return torch.bfloat16 if stored == "BF16" and not exact and _multiplies_bfloat16() else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices (AVX-512 BF16 or AMX)."""
    tests = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(test is not None and test() for test in tests)


def load_weight(reader: SourceReader, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    """A weight on the CPU, in the dtype that it is computed with."""
    if not entry.file.kind.is_object:
        weight = torch.empty(entry.shape, dtype=dtype)
        _read_and_cast(reader, entry, weight.reshape(-1))
        return weight
    flat = torch.frombuffer(reader.view(entry), dtype=_TORCH_DTYPES[entry.dtype])
    weight = flat.reshape(entry.shape).to(dtype)
    reader.heartbeat()
    return weight


def _read_and_cast(reader: SourceReader, entry: TensorEntry, target: torch.Tensor) -> None:
    """Read a tensor of a local file into `target` (elements,), which may have another dtype."""
    stored = _TORCH_DTYPES[entry.dtype]
    if not entry.nbytes:
        return
    if stored == target.dtype:
        reader.read_into(entry.file, entry.start, memoryview(target.view(torch.uint8).numpy()))
        return
    piece = torch.empty(min(target.numel(), _BLOCK_BYTES // stored.itemsize), dtype=stored)
    content = memoryview(piece.view(torch.uint8).numpy())
    for at in range(0, target.numel(), piece.numel()):
        count = min(piece.numel(), target.numel() - at)
        reader.read_into(entry.file, entry.start + at * stored.itemsize, content[: count * stored.itemsize])
        target[at : at + count].copy_(piece[:count])


def _load_factors(reader: SourceReader, layer: LayerParts) -> dict[FactorKey, torch.Tensor]:
    """Adapters' factors on the CPU, in their own memory."""
    return {key: torch.from_numpy(load_array(reader, e).astype(np.float64)) for key, e in layer.factors.items()}


def load_ref(reader: SourceReader, ref: WeightRef, dtype: torch.dtype) -> torch.Tensor:
    """A weight on the CPU, in the dtype that it is computed with; a combined one with its values in the merge."""
    if ref.combined is None:
        return load_weight(reader, ref.entry, dtype)
    return _load_combination(reader, ref.combined, dtype)


def _load_combination(reader: SourceReader, combination: Combination, dtype: torch.dtype) -> torch.Tensor:
    content = load_combined(reader, combination)
    flat = torch.from_numpy(content.reshape(-1).view(np.uint8)).view(_TORCH_DTYPES[combination.dtype])
    return flat.reshape(combination.shape).to(dtype)


def _load_combinations(reader: SourceReader, layer: LayerParts, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: _load_combination(reader, each, dtype) for name, each in layer.combined.items()}


class LayerLoader:
    """Loads the tensors of each layer to `device`, in order. Use it for one run over the layers."""

    def __init__(self, reader: SourceReader, device: torch.device, dtype: torch.dtype) -> None:
        self._reader, self._device, self._dtype = reader, device, dtype

    def layers(self, layers: Sequence[LayerParts]) -> Generator[LoadedLayer, None, None]:
        """The tensors of each layer; they are valid until the next layer is requested."""
        if self._device.type == "cuda":
            with _PinnedBufferRing(self._reader, self._device, self._dtype, layers) as ring:
                yield from ring.layers()
            return
        largest = max((sum(map(_elements, _local_weights(layer).values())) for layer in layers), default=0)
        with torch.inference_mode(False):  # a thread outside of inference mode writes them
            buffers = [torch.empty(largest, dtype=self._dtype) for _ in range(2)]
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            ahead: Future[LoadedLayer] | None = pool.submit(self._load, layers[0], buffers[0]) if layers else None
            for number in range(len(layers)):
                assert ahead is not None
                loaded, ahead = ahead.result(), None
                if number + 1 < len(layers):  # into the buffer of the layer before this one
                    ahead = pool.submit(self._load, layers[number + 1], buffers[(number + 1) % 2])
                yield loaded
                del loaded

    def _load(self, layer: LayerParts, buffer: torch.Tensor) -> LoadedLayer:
        self._reader.load(layer.entries)
        local, at = _local_weights(layer), 0
        remote = {name: entry for name, entry in layer.weights.items() if name not in local}
        weights = {name: load_weight(self._reader, entry, self._dtype) for name, entry in remote.items()}
        for name, entry in local.items():
            place = buffer[at : at + math.prod(entry.shape)]
            _read_and_cast(self._reader, entry, place)
            weights[name] = place.view(entry.shape)
            at += _elements(entry)
        weights |= _load_combinations(self._reader, layer, self._dtype)
        factors = _load_factors(self._reader, layer)
        self._reader.release()  # data read from objects is in use or converted: its source can be freed
        return LoadedLayer(weights=weights, factors=factors)


def _elements(entry: TensorEntry) -> int:
    """The buffer elements of a local file's tensor, rounded up so that the next tensor is aligned."""
    return -(-math.prod(entry.shape) // _ALIGNMENT) * _ALIGNMENT


def _local_weights(layer: LayerParts) -> dict[str, TensorEntry]:
    return {name: entry for name, entry in layer.weights.items() if not entry.file.kind.is_object}


@dataclass
class _Layout:
    """Where each weight of a layer is in a buffer: name -> (start, end). `spans` join adjacent weights of a file."""

    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    spans: list[tuple[SourceFile, int, int, int]] = field(default_factory=list)  # file, start and end there, start here
    size: int = 0

    def add(self, name: str, entry: TensorEntry) -> None:
        if self.spans and self.spans[-1][0] == entry.file and self.spans[-1][2] == entry.start:
            file, start, _, at = self.spans[-1]
            self.ranges[name] = (at + entry.start - start, at + entry.end - start)
            self.spans[-1] = (file, start, entry.end, at)
        else:
            at = -(-self.size // _ALIGNMENT) * _ALIGNMENT
            self.ranges[name] = (at, at + entry.nbytes)
            self.spans.append((entry.file, entry.start, entry.end, at))
        self.size = max(self.size, self.ranges[name][1])


class _PinnedBufferRing:
    """Transfers layers to a GPU. A context manager."""

    def __init__(
        self, reader: SourceReader, device: torch.device, dtype: torch.dtype, layers: Sequence[LayerParts]
    ) -> None:
        self._reader, self._device, self._dtype, self._layers = reader, device, dtype, layers
        self._layouts = [self._layout(layer) for layer in layers]
        largest = max((layout.size for layout in self._layouts), default=0)
        self._pinned = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copy_events: list[Any] = [None, None]  # the event after which a pinned buffer may be filled again
        self._stream = torch.cuda.Stream(device)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read-layer")

    def __enter__(self) -> _PinnedBufferRing:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._stream.synchronize()

    def layers(self) -> Iterator[LoadedLayer]:
        waiting = [self._ahead.submit(self._start_transfer, number) for number in range(min(2, len(self._layers)))]
        for number in range(len(self._layers)):
            loaded, ready = waiting.pop(0).result()
            torch.cuda.current_stream(self._device).wait_event(ready)
            # Their memory is not reused before this stream has finished with them.
            for tensor in (*loaded.weights.values(), *loaded.factors.values()):
                tensor.record_stream(torch.cuda.current_stream(self._device))
            if number + 2 < len(self._layers):
                waiting.append(self._ahead.submit(self._start_transfer, number + 2))
            yield loaded
            del loaded

    def _layout(self, layer: LayerParts) -> _Layout:
        layout = _Layout()
        direct = [(entry, name) for name, entry in layer.weights.items() if self._needs_no_cast(entry)]
        for entry, name in sorted(direct, key=lambda pair: (pair[0].file.location, pair[0].start)):
            layout.add(name, entry)
        return layout

    def _needs_no_cast(self, entry: TensorEntry) -> bool:
        return _TORCH_DTYPES[entry.dtype] == self._dtype and entry.nbytes > 0

    def _start_transfer(self, number: int) -> tuple[LoadedLayer, Any]:
        """Read a layer and start its copy. Returns its tensors on the GPU, and the event after which they are valid."""
        layout, layer, slot = self._layouts[number], self._layers[number], number % 2
        if self._copy_events[slot] is not None:
            self._copy_events[slot].synchronize()
        pinned = self._pinned[slot]
        self._fill(layout, memoryview(pinned.numpy()))
        others = {name: entry for name, entry in layer.weights.items() if name not in layout.ranges}
        self._reader.load([*others.values(), *layer.factors.values()])
        cast = {name: load_weight(self._reader, entry, self._dtype) for name, entry in others.items()}
        cast |= _load_combinations(self._reader, layer, self._dtype)
        made = _load_factors(self._reader, layer)
        with torch.cuda.stream(self._stream):
            whole = torch.empty(layout.size, dtype=torch.uint8, device=self._device)
            whole.copy_(pinned[: layout.size], non_blocking=True)
            weights = {name: tensor.to(self._device) for name, tensor in cast.items()}
            factors = {key: tensor.to(self._device) for key, tensor in made.items()}
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._copy_events[slot] = ready
        self._reader.release()
        for name, (start, end) in layout.ranges.items():
            weights[name] = whole[start:end].view(self._dtype).reshape(layer.weights[name].shape)
        return LoadedLayer(weights=weights, factors=factors), ready

    def _fill(self, layout: _Layout, buffer: memoryview) -> None:
        reads = []
        for file, start, end, at in layout.spans:
            step = end - start if file.kind.is_object else _BLOCK_BYTES
            for low in range(start, end, step):
                part = buffer[at + low - start : at + min(low + step, end) - start]
                reads.append(self._readers.submit(self._reader.read_into, file, low, part))
        for read in reads:
            read.result()
