"""Pairs of dense family and MoE host, features of dense models, merged models, and what these must agree with."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES, DenseFamily, find_moe_architecture
from tests.architectures.deepseek_reference import load_deepseek
from tests.pico import MODES, load_dense, merge_config, merge_without_ray

WINDOW = 12
# Of logits, on weights of float32.
MAX_DIFFERENCE = 1e-5
# Keys of dense configs: RoPE scalings, and a window for all layers of a Qwen.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ALL_LAYERS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}


@dataclass(frozen=True)
class Pair:
    """One dense family in one host, with or without a shared expert."""

    family: str
    host: str
    shared: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        name = f"{self.family}-{self.host}"
        return f"{name}-shared" if self.shared else name

    @property
    def dense(self) -> DenseFamily:
        return FAMILIES[self.family]

    @property
    def gates_shared(self) -> bool:
        return self.shared and bool(MOE_ARCHITECTURES[self.host].shared_router)

    def skip_where_unknown(self) -> None:
        """End the test where the transformers that is installed is older than the pair."""
        host, here = MOE_ARCHITECTURES[self.host], transformers.__version__
        types = {self.family} if host.code_repository else {self.family, host.model_type}
        if missing := sorted(types - set(transformers.CONFIG_MAPPING)):
            pytest.skip(f"transformers {here} has no {' and no '.join(missing)}")
        since = host.min_transformers_for(self.options.get("layer_types"))
        if since and Version(here) < Version(since):
            pytest.skip(f"transformers {here} puts a window of some layers on all of them")

    @property
    def modes(self) -> tuple[str, ...]:
        """All gate modes for the first pair of a family, which is what they read; `random` for its other pairs.

        With transformers 4 one mode per pair: what loads differs, gate modes don't.
        """
        is_first = self is next(pair for pair in PAIRS if pair.family == self.family)
        return MODES if is_first and Version(transformers.__version__).major > 4 else ("random",)

    @property
    def experts_per_token(self) -> tuple[int, ...]:
        return (1, 2) if MOE_ARCHITECTURES[self.host].renormalizes_one else (2,)

    def config(self, base: Path, experts: Sequence[Path], shared: Path, **options: Any) -> dict[str, Any]:
        if self.shared:
            options = {"shared": shared, "shared_prompts": self.gates_shared, **options}
        return merge_config(base, experts, architecture=self.host, **options)


_WINDOW = {"sliding_window": WINDOW}
MAMBA = {
    "layer_types": ["mamba", "attention", "mamba"],
    "position_embedding_type": None,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
PAIRS = (
    Pair("llama", "mixtral"),
    Pair("mistral", "mixtral", options=_WINDOW),
    Pair("qwen3", "qwen3_moe"),
    Pair("qwen2", "qwen2_moe"),
    Pair("qwen2", "qwen2_moe", shared=True),
    Pair("llama", "qwen2_moe"),
    Pair("llama", "qwen2_moe", shared=True),
    Pair("mistral", "qwen2_moe", options=_WINDOW),
    Pair("mistral", "qwen2_moe", shared=True, options=_WINDOW),
    Pair("llama", "deepseek"),
    Pair("llama", "deepseek", shared=True),
    Pair("mistral", "deepseek"),
    Pair("mistral", "deepseek", shared=True),
    Pair("internlm3", "mixtral"),
    Pair("internlm3", "qwen2_moe"),
    Pair("internlm3", "deepseek"),
    Pair("phi3", "mixtral", options=_WINDOW),
    Pair("phi3", "qwen2_moe"),
    Pair("phi3", "deepseek"),
    Pair("olmo2", "flex_olmo"),
    Pair("granite_swa", "granitemoe_swa"),
    Pair("granite_swa", "granitemoe_swa", shared=True),
    Pair("smollm3", "granitemoe_swa"),
    Pair("smollm3", "granitemoe_swa", shared=True, options={"use_sliding_window": True, **_WINDOW}),
    Pair("granite", "granitemoe"),
    Pair("granite", "granitemoeshared", shared=True),
    Pair("granite", "granitemoehybrid", shared=True),
    Pair("granitemoehybrid", "granitemoe"),
    Pair("granitemoehybrid", "granitemoeshared", shared=True),
    Pair("granitemoehybrid", "granitemoehybrid", options=MAMBA),
    Pair("granitemoehybrid", "granitemoehybrid", shared=True, options=MAMBA),
    Pair("ernie4_5", "ernie4_5_moe"),
    Pair("ernie4_5", "ernie4_5_moe", shared=True),
    Pair("helium", "ernie4_5_moe"),
    Pair("hunyuan_v1_dense", "hunyuan_v1_moe"),
    Pair("hunyuan_v1_dense", "hunyuan_v1_moe", shared=True),
    Pair("cohere2", "cohere2_moe"),
    Pair("cohere2", "cohere2_moe", shared=True),
    Pair("lfm2", "lfm2_moe"),
    Pair("qwen3_5_text", "qwen3_5_moe"),
    Pair("qwen3_5_text", "qwen3_5_moe", shared=True),
    Pair("gemma4_text", "gemma4_moe"),
    Pair("youtu", "deepseek_v3"),
    Pair("youtu", "deepseek_v3", shared=True),
    Pair("seed_oss", "glm4_moe"),
    Pair("seed_oss", "glm4_moe", shared=True),
    Pair("llama", "glm4_moe"),
    Pair("mistral", "glm4_moe"),
    Pair("internlm3", "glm4_moe"),
    Pair("qwen2", "glm4_moe"),
    Pair("phi3", "glm4_moe", options={"partial_rotary_factor": 0.5}),
    Pair("glm", "glm4_moe"),
    Pair("glm", "glm4_moe", shared=True),
    Pair("qwen3", "glm4_moe"),
    Pair("qwen3", "glm4_moe", shared=True),
    Pair("iquestcoder", "mixtral"),
    Pair("iquestcoder", "qwen2_moe"),
    Pair("iquestcoder", "deepseek"),
    Pair("iquestcoder", "glm4_moe"),
    Pair("ministral", "mixtral", options=_WINDOW),
    Pair("ministral", "qwen2_moe", options={**_WINDOW, "layer_types": MIXED_LAYERS}),
    Pair("cwm", "qwen2_moe", options=_WINDOW),
    Pair("cwm", "qwen2_moe", shared=True, options=_WINDOW),
    Pair("llama", "granitemoe"),
    Pair("mistral", "granitemoe"),
    Pair("qwen2", "granitemoe"),
    Pair("ministral", "granitemoe_swa", options={**_WINDOW, "layer_types": MIXED_LAYERS}),
    Pair("cwm", "granitemoe_swa", options=_WINDOW),
    Pair("cohere", "cohere2_moe"),
    Pair("cohere", "cohere2_moe", shared=True),
)


def one_per_host(pairs: Sequence[Pair]) -> list[Any]:
    """These pairs as parameters: the first of each MoE architecture, with a shared expert and without; the others have
    the mark `slow`, and are in `make test` only."""
    first = {(pair.host, pair.shared): pair for pair in reversed(pairs)}
    return [
        pair if first[pair.host, pair.shared] is pair else pytest.param(pair, marks=pytest.mark.slow) for pair in pairs
    ]


def load_merged(folder: Path) -> Any:
    """A merged model for inference, every weight of it from the checkpoint and no weight left over."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "deepseek":
        return load_deepseek(folder)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"keys that do not fit: {info}"
    return model.eval()


class _FeedForward(torch.nn.Module):
    """An expert's FFN, plus those of shared experts times a factor (a number, or a gate's row before the sigmoid)."""

    def __init__(self, routed: Any, shared: Sequence[Any], gate: torch.Tensor | float) -> None:
        super().__init__()
        self.routed, self.shared, self.gate = routed, torch.nn.ModuleList(shared), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = torch.sigmoid(x @ self.gate.T) if isinstance(self.gate, torch.Tensor) else self.gate
        result: torch.Tensor = self.routed(x) + factor * sum(shared(x) for shared in self.shared)
        return result


def load_grafted(
    base: Path,
    expert: Path,
    shared: Path | Sequence[Path] | None = None,
    gates: Sequence[torch.Tensor | float] | None = None,
) -> Any:
    """The base with an expert's FFN, and optionally shared experts' with it, whose factor is `gates[layer]` or 1."""
    model = load_dense(base)
    graft(model, expert, shared, gates)
    return model


def graft(
    model: Any,
    expert: Path,
    shared: Path | Sequence[Path] | None = None,
    gates: Sequence[torch.Tensor | float] | None = None,
) -> None:
    """Give a loaded base the FFNs that `load_grafted` gives it, in place of those that it has."""
    donor, folders = _load_donor(expert), [shared] if isinstance(shared, Path) else shared or []
    sharers = [_load_donor(folder) for folder in folders]
    name = FAMILIES[model.config.model_type].ffn
    for number, layer in enumerate(model.model.layers):
        ffn = getattr(donor.model.layers[number], name)
        if sharers:
            gate = gates[number] if gates is not None else 1.0
            ffn = _FeedForward(ffn, [getattr(sharer.model.layers[number], name) for sharer in sharers], gate)
        setattr(layer, name, ffn)


@functools.lru_cache(maxsize=8)
def _load_donor(folder: Path) -> Any:
    """A dense model whose FFNs are lent, and stay as they are."""
    return load_dense(folder)


@dataclass(frozen=True)
class Mixture:
    """A merge of models that differ, and what it was made of. Read-only where several tests use it."""

    pair: Pair
    folder: Path
    base: Path
    experts: list[Path]
    shared: Path
    config: dict[str, Any]

    @property
    def shared_or_none(self) -> Path | None:
        return self.shared if self.pair.shared else None


def make_mixture(pair: Pair, zoo: Callable[..., Path], folder: Path, mode: str = "random") -> Mixture:
    """A merge of three experts in a base of its own, two per token."""
    base, *experts = (zoo(pair.family, seed=seed, **pair.options) for seed in range(4))
    shared = zoo(pair.family, seed=4, **pair.options)
    config = pair.config(base, experts, shared, mode=mode, experts_per_token=2)
    merge_without_ray(config, folder)
    return Mixture(pair, folder, base, experts, shared, config)


def moe_blocks(merged: Any) -> list[Any]:
    """The MoE block of each layer (transformers 4 gives Mixtral's another name). Gemma 4's layers are their own."""
    names = ("block_sparse_moe", "feed_forward", "mlp")
    blocks = [
        layer if hasattr(layer, "router") else next(getattr(layer, name) for name in names if hasattr(layer, name))
        for layer in merged.model.layers
    ]
    assert all(router_of(block).shape[0] > 1 for block in blocks)
    return blocks


def router_of(block: Any) -> torch.Tensor:
    """The rows of a MoE block's router, (experts, hidden)."""
    router = router_module(block)
    weight: torch.Tensor = getattr(router, "wg", router).weight
    return weight


def router_module(block: Any) -> Any:
    """The module of a MoE block that is given what its router sees."""
    router = getattr(block, "gate", None) or block.router
    return getattr(router, "proj", getattr(router, "layer", router))


@torch.inference_mode()
def force_router(merged: Any, reference: Any, ids: torch.Tensor, expert: int) -> None:
    """Change the routers of `merged` so that each token of `ids` goes to `expert`, and to no other by more than 1e-40.

    A router has no bias, so that a row that wins for every token is solved for: what the routers will see is what the
    FFNs of `reference`, the model that is to come out, see. There must be fewer tokens than dimensions.
    """
    seen: list[torch.Tensor] = []
    host = find_moe_architecture({"model_type": merged.config.model_type})
    factor = host.router_factor(merged.config.hidden_size) if host else 1.0
    ffn = FAMILIES[reference.config.model_type].ffn
    hooks = [
        getattr(layer, ffn).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        for layer in reference.model.layers
    ]
    reference(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for block, states_NH in zip(moe_blocks(merged), seen, strict=True):
        assert states_NH.shape[0] < states_NH.shape[1]
        row = 50.0 * torch.linalg.pinv(states_NH.double()).sum(dim=1).float()
        router = router_of(block)
        row = row * factor
        router.copy_(-row.expand_as(router))
        router[expert] = row
