"""Options of a conversion, and their checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType

from raymoe.compute import device_problems
from raymoe.errors import Problem, install_remedy
from raymoe.object_store.options import StorageOptions
from raymoe.planning import MergeOptions
from raymoe.sources.hub import HubOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """How elements are stored: `block_bytes` for every `block` adjacent elements of a row.

    `number` is ggml's number of the type, `file_type` llama.cpp's number for files that mostly have this type.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    file_type: int

    @property
    def is_quantized(self) -> bool:
        return self.block > 1

    def nbytes(self, elements: int) -> int:
        assert elements % self.block == 0
        return elements // self.block * self.block_bytes


# Source: ggml_type and GGML_QUANT_SIZES in ggml.h and gguf's constants.py; llama_ftype in llama.h.
TYPES: Mapping[str, TensorType] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            TensorType(name="f32", number=0, block=1, block_bytes=4, file_type=0),
            TensorType(name="f16", number=1, block=1, block_bytes=2, file_type=1),
            TensorType(name="bf16", number=30, block=1, block_bytes=2, file_type=32),
            TensorType(name="q8_0", number=8, block=32, block_bytes=34, file_type=7),
            TensorType(name="q4_0", number=2, block=32, block_bytes=18, file_type=2),
        )
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOptions:
    """`type`: a name of `TYPES`, or None for that of the checkpoint. `pre`: llama.cpp's name of the pre-tokenizer, if
    the tokenizer's files do not show it. `name`: the model's name, by default the file's. `merge`: options of the merge
    if a config is converted. `device`: where its gates are computed: `cpu`, `cuda` or None (a GPU if there is one).
    `config_options`: the given options that only affect a config.
    """

    type: str | None = None
    pre: str | None = None
    name: str | None = None
    overwrite: bool = False
    merge: MergeOptions = field(default_factory=MergeOptions)
    config_options: tuple[str, ...] = ()
    allow_all_same: bool = False
    device: str | None = None
    trust_remote_code: bool = False
    quiet: bool = True
    hub: HubOptions = field(default_factory=HubOptions)
    storage: StorageOptions = field(default_factory=StorageOptions)


def option_problems(options: GgufOptions) -> Iterator[Problem]:
    yield from device_problems(options.device)
    if options.type is not None and options.type.lower() not in TYPES:
        remedy = f"one of {', '.join(TYPES)}; llama.cpp's llama-quantize makes others from a bf16 file"
        yield Problem(where="--type", what=f"{options.type!r} is not a type that raymoe writes", remedy=remedy)
    if not has_gguf():
        what = "the Python package gguf, which GGUF files are written with, is not installed"
        yield Problem(where="", what=what, remedy=install_remedy("gguf"))


def has_gguf() -> bool:
    """Whether the package that writes GGUF files is installed; it is an extra of raymoe's."""
    return find_spec("gguf") is not None
