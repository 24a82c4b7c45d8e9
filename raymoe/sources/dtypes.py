"""Element types: the one table of safetensors codes, their sizes and their names elsewhere.

Source of the codes: the safetensors format, https://huggingface.co/docs/safetensors/index#format, and the `Dtype` enum
of its Rust crate. Codes below one byte (packed floats) are listed so that a header with them can be read. They only
occur in quantized checkpoints, which raymoe rejects with a better message than 'unknown dtype'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

# Weights have up to five dimensions, and names of up to 150 characters. An untrusted file may have any number, and the
# cost of both is more than linear: a product of sizes, a search among names, a message.
MAX_DIMENSIONS = 16
MAX_NAME_CHARACTERS = 1000

# safetensors code -> bits per element
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "U16": 16,
        "I16": 16,
        "U32": 32,
        "I32": 32,
        "U64": 64,
        "I64": 64,
        "F16": 16,
        "BF16": 16,
        "F32": 32,
        "F64": 64,
        "C64": 64,
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F4": 4,
    }
)

# safetensors code -> bytes per element, for the codes of whole bytes
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({c: b // 8 for c, b in DTYPE_BITS.items() if b % 8 == 0})

# torch's name (as in `torch_dtype` and `dtype` of a config.json) -> safetensors code
DTYPE_OF_NAME: Mapping[str, str] = MappingProxyType(
    {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
)
NAME_OF_DTYPE: Mapping[str, str] = MappingProxyType({code: name for name, code in DTYPE_OF_NAME.items()})

# Dtypes of weights that raymoe reads: all others are rejected, or are not weights.
FLOAT_DTYPES = tuple(NAME_OF_DTYPE)

_ALIASES = {"half": "F16", "float": "F32", "double": "F64"}


def dtype_code(name: str) -> str:
    """The safetensors code of a dtype as users write it: `bfloat16`, `torch.bfloat16`, `bf16`, `BF16`.

    Raises ValueError for a name that is not in the table.
    """
    code = _code(name)
    if code not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPE_OF_NAME)}")
    return code


def is_dtype(name: str) -> bool:
    """Whether `dtype_code` knows a name."""
    return _code(name) in DTYPE_BITS


def _code(name: str) -> str:
    short = name.removeprefix("torch.")
    return DTYPE_OF_NAME.get(short) or _ALIASES.get(short) or short.upper()


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor in a safetensors file; None if a packed dtype does not fill its last byte."""
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    return bits // 8 if bits % 8 == 0 else None
