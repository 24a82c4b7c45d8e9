"""A gate pass with 8-bit or 4-bit weights (bitsandbytes): layers are smaller on the GPU, and states less exact."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from raymoe.errors import Problem, ProblemReport


def check_quantize(kind: str, device: str) -> None:
    """Raises ProblemReport with what is missing for `kind` ('8bit' or '4bit') on this device."""
    missing = []
    if device == "cpu":
        missing.append("a CUDA GPU (the gate pass would run on the CPU)")
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("the package bitsandbytes")
    if missing:
        what = f"needs {' and '.join(missing)}"
        remedy = (
            "install bitsandbytes on the GPU nodes, or leave the flag out: layers are streamed, so that models larger "
            "than the GPU's memory need no quantization"
        )
        raise ProblemReport([Problem(where=f"--load-in-{kind}", what=what, remedy=remedy)])


def quantize_layer(module: Any, tensors: Mapping[str, torch.Tensor], device: torch.device, kind: str) -> Any:
    """A decoder layer with its linear layers quantized on `device`; everything else keeps its dtype."""
    module.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    for name, child in list(module.named_modules()):
        if isinstance(child, torch.nn.Linear):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _quantize_linear(child, device, kind))
    return module


def _quantize_linear(linear: torch.nn.Linear, device: torch.device, kind: str) -> Any:
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data.cpu()  # bitsandbytes quantizes when a weight moves to the GPU
    if kind == "8bit":
        result = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        result.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        result = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4")
        result.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        result.bias = linear.bias
    return result.to(device)
