"""Recognizes quantized checkpoints, and rejects them by the name of their method.

A merge copies the bytes of weights. Packed integers could be copied too, but the merged model's config can't describe
experts that are quantized in different ways, and gates can't be computed from them. `config.json` usually names the
method; if not (a converter forgot it), tensor names and dtypes show it. If config.json names a method but all tensors
are plain floats, a tool wrote the weights at full precision again and left the key: that gives only a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymoe.errors import Problem
from raymoe.sources.dtypes import DTYPE_BITS, FLOAT_DTYPES
from raymoe.sources.facts import CheckpointIndex, TensorEntry

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that describe a quantized checkpoint."""

_REMEDY = "use the unquantized checkpoint (BF16, F16 or F32) that this one was made from, and quantize the merge"

# last component of a tensor's name -> the method that it indicates
_TENSOR_SUFFIXES: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "scales": "GPTQ or AWQ",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_2": "ModelOpt FP4",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "input_scale": "FP8",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes 8-bit",
    "weight_format": "bitsandbytes 8-bit",
    "bitsandbytes__nf4": "bitsandbytes 4-bit",
    "bitsandbytes__fp4": "bitsandbytes 4-bit",
}
# Methods that store plain weights and quantize them whenever the model runs: the weights alone give another model.
_RUNTIME_METHODS = ("bitnet", "fp_quant")


def quantization_problems(label: str, config: Mapping[str, Any], index: CheckpointIndex | None) -> list[Problem]:
    """At most one problem: the method that the config or the tensors indicate."""
    declared = _declared_method(config)
    if declared and not _is_leftover(declared[0], index):
        method, key = declared
        what = f"the checkpoint is quantized with {method} (config.json: {key})"
        return [Problem(where=label, what=what, remedy=_REMEDY)]
    for entry in index.tensors.values() if index else ():
        if betrayed := _method_of_tensor(entry):
            what = f"the checkpoint is quantized ({betrayed}): tensor {entry.name!r} of dtype {entry.dtype}"
            return [Problem(where=label, what=what, remedy=_REMEDY)]
    return []


def leftover_warning(label: str, config: Mapping[str, Any], index: CheckpointIndex) -> str | None:
    """The warning about a config.json that names a method although the weights are plain; None if it names none."""
    declared = _declared_method(config)
    if declared is None or not _is_leftover(declared[0], index):
        return None
    method, key = declared
    dtypes = ", ".join(sorted({entry.dtype for entry in index.tensors.values()}))
    return (
        f"{label}: config.json says that the checkpoint is quantized with {method} ({key}), but its tensors are plain "
        f"{dtypes}: the key is taken for a leftover and is not used"
    )


def _is_leftover(method: str, index: CheckpointIndex | None) -> bool:
    if index is None or method.split(",")[0] in _RUNTIME_METHODS:
        return False
    return all(entry.dtype in FLOAT_DTYPES and not _method_of_tensor(entry) for entry in index.tensors.values())


def _declared_method(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(method, config key), from the config or its text part."""
    for part, prefix in ((config, ""), (config.get("text_config"), "text_config.")):
        for key in QUANTIZATION_KEYS:
            value = part.get(key) if isinstance(part, Mapping) else None
            if value:
                return _method_name(value), prefix + key
    return None


def _method_name(quantization: Any) -> str:
    if not isinstance(quantization, Mapping):
        return "an unknown method"
    method = quantization.get("quant_method") or quantization.get("quant_algo")
    if not method and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    bits = quantization.get("bits")
    name = str(method) if method else "an unknown method"
    return f"{name}, {bits} bits" if bits else name


def _method_of_tensor(entry: TensorEntry) -> str | None:
    suffix = entry.name.rsplit(".", 1)[-1]
    if suffix in _TENSOR_SUFFIXES:
        return _TENSOR_SUFFIXES[suffix]
    if DTYPE_BITS[entry.dtype] <= 8 and entry.dtype.startswith("F"):
        return f"{DTYPE_BITS[entry.dtype]}-bit floats"
    if suffix == "weight" and entry.dtype not in FLOAT_DTYPES:
        return "integer weights"
    return None
