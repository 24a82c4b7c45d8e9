"""Frequencies of rotary position embeddings (RoPE), for each kind of scaling.

Pair i of a head's d rotated dimensions turns by `position * theta^(-2i/d)` (arXiv 2104.09864). A kind of scaling
changes these frequencies, and some kinds multiply the result by a factor:

    linear    all frequencies over a factor
    dynamic   a larger theta for texts that are longer than the model's (NTK scaling)
    yarn      low frequencies over the factor, high ones as they are, a ramp between (arXiv 2309.00071)
    llama3    the same idea by wavelength (Llama 3.1's report, arXiv 2407.21783)
    longrope  a factor for each frequency, one list for short texts and one for long ones (arXiv 2402.13753)

What a config leaves out is taken as transformers takes it (`modeling_rope_utils.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raymoe.architectures import DenseSpec
from raymoe.architectures.rope import longrope_magnitude, original_length, yarn_magnitude, yarn_magnitude_ratio

_Scaled = tuple[torch.Tensor, float]
"""Frequencies (rotary_dim / 2,) in float32, and the factor on cosines and sines."""


def rope_frequencies(spec: DenseSpec, tokens: int) -> _Scaled:
    """The frequencies of a model's RoPE in radians per token, (rotary_dim / 2,) in float32, and the factor on cosines
    and sines. `tokens` is the length of the text, on which kinds `dynamic` and `longrope` depend."""
    scaling = spec.rope_scaling
    if scaling is None:
        return _plain(spec, spec.rope_theta), 1.0
    return _KINDS[scaling["rope_type"]](spec, scaling, tokens)


def depends_on_length(spec: DenseSpec) -> bool:
    """Whether the frequencies depend on the length of the text."""
    return spec.rope_scaling is not None and spec.rope_scaling["rope_type"] in ("dynamic", "longrope")


def _powers(spec: DenseSpec, theta: float) -> torch.Tensor:
    """theta^(2i/d)."""
    rotated = spec.rotary_dim
    powers: torch.Tensor = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return powers


def _plain(spec: DenseSpec, theta: float) -> torch.Tensor:
    return 1.0 / _powers(spec, theta)


def _linear(spec: DenseSpec, scaling: Mapping[str, Any], tokens: int) -> _Scaled:
    return _plain(spec, spec.rope_theta) / scaling["factor"], 1.0


def _dynamic(spec: DenseSpec, scaling: Mapping[str, Any], tokens: int) -> _Scaled:
    factor, rotated = scaling["factor"], spec.rotary_dim
    stretch = factor * max(tokens, spec.max_positions) / spec.max_positions - (factor - 1)
    return _plain(spec, spec.rope_theta * stretch ** (rotated / (rotated - 2))), 1.0


def _yarn(spec: DenseSpec, scaling: Mapping[str, Any], tokens: int) -> _Scaled:
    factor, rotated = float(scaling["factor"]), spec.rotary_dim
    length = original_length(scaling, spec.max_positions)

    def pair_of(turns: float) -> float:
        """The pair that turns so often within the original length."""
        return rotated * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(rotated // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    powers = _powers(spec, spec.rope_theta)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, _yarn_factor(factor, scaling)


def _yarn_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    ratio = yarn_magnitude_ratio(scaling)
    return yarn_magnitude(factor) if ratio is None else ratio


def _llama3(spec: DenseSpec, scaling: Mapping[str, Any], tokens: int) -> _Scaled:
    frequencies, length = _plain(spec, spec.rope_theta), original_length(scaling, spec.max_positions)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    share = (length / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / factor, between)
    return torch.where(wavelengths < length / high, frequencies, scaled), 1.0


def _longrope(spec: DenseSpec, scaling: Mapping[str, Any], tokens: int) -> _Scaled:
    is_long = tokens > original_length(scaling, spec.max_positions)
    factors = torch.tensor(scaling["long_factor" if is_long else "short_factor"], dtype=torch.float32)
    magnitude = longrope_magnitude(scaling, spec.max_positions)
    return 1.0 / (factors * _powers(spec, spec.rope_theta)), magnitude


_KINDS: Mapping[str, Callable[[DenseSpec, Mapping[str, Any], int], _Scaled]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
