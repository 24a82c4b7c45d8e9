"""Writes the tables of docs/engines.md from raymoe/engines/rows.csv: runs nothing.

    python scripts/engines_page.py

scripts/run_engines.py measures the rows, and calls this.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import put_between

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from raymoe.architectures import MOE_ARCHITECTURES, DenseSpec, MoeShape, select_moe_architecture  # noqa: E402
from raymoe.architectures.dense_spec import read_spec  # noqa: E402
from raymoe.engines import ENGINES, SAME, UNKNOWN, engine_rows, judge  # noqa: E402
from raymoe.planning.engine_checks import engine_requirement, merge_features  # noqa: E402
from raymoe.report.engine_table import architecture_lines  # noqa: E402

PAGE = ROOT / "docs/engines.md"
MARK = "<!-- table {}: scripts/engines_page.py -->"
# Engines with a column of their own, and what `engines` names together.
COLUMNS = ("vllm", "mlx", "sglang", "llama.cpp", "mistralrs")
TOGETHER = ("vllm", "mlx", "llama.cpp")
SHAPE = MoeShape(experts=4, experts_per_token=2)

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONGROPE = {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [2.0] * 48}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_SIZES = {"intermediate_size": 8192, "num_hidden_layers": 4, "num_key_value_heads": 8, "vocab_size": 100_000}


@dataclass(frozen=True)
class PublishedModel:
    """Models that are often merged: `config` has the keys of their config.json on which engines differ."""

    title: str
    config: dict[str, Any]

    @property
    def spec(self) -> DenseSpec:
        spec = read_spec({**_SIZES, **self.config}, self.title)
        assert isinstance(spec, DenseSpec), spec
        return spec


def _of(title: str, family: str, hidden: int, heads: int, longest: int, **keys: Any) -> PublishedModel:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "max_position_embeddings": longest}
    return PublishedModel(title, {"model_type": family, **sizes, **keys})


MODELS = (
    _of("Llama 3.1, 3.3", "llama", 4096, 32, 131_072, rope_scaling=_LLAMA3, **_UNTIED),
    _of("Llama 3.2 (1B, 3B)", "llama", 3072, 24, 131_072, rope_scaling=_LLAMA3, **_TIED),
    _of("Llama 2 and 3, Yi, Falcon 3, TinyLlama", "llama", 4096, 32, 8192, **_UNTIED),
    _of("SmolLM2", "llama", 2048, 32, 8192, num_key_value_heads=32, **_TIED),
    _of("Mistral 7B v0.2, v0.3", "mistral", 4096, 32, 32_768, sliding_window=None),
    _of("Mistral 7B v0.1 (window)", "mistral", 4096, 32, 32_768, sliding_window=4096),
    _of("Mistral Nemo, Small (head_dim)", "mistral", 5120, 32, 131_072, sliding_window=None, head_dim=128),
    _of(
        "Ministral 8B (windows of some layers)",
        "ministral",
        4096,
        32,
        131_072,
        sliding_window=32_768,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
    ),
    _of("Qwen2.5 (7B and larger)", "qwen2", 3584, 28, 131_072, num_key_value_heads=4, **_UNTIED),
    _of("Qwen2.5 (up to 3B)", "qwen2", 1536, 12, 32_768, num_key_value_heads=2, **_TIED),
    _of("Qwen3 (8B and larger)", "qwen3", 4096, 32, 40_960, head_dim=128, **_UNTIED),
    _of("Qwen3 (up to 4B)", "qwen3", 2560, 32, 40_960, head_dim=128, **_TIED),
    _of("Phi-3, Phi-3.5 with 4k (window)", "phi3", 3072, 32, 4096, num_key_value_heads=32, sliding_window=2047),
    _of(
        "Phi-3, Phi-3.5 with 128k",
        "phi3",
        3072,
        32,
        131_072,
        num_key_value_heads=32,
        rope_scaling=_LONGROPE,
        original_max_position_embeddings=4096,
    ),
    _of(
        "Phi-4-mini",
        "phi3",
        3072,
        24,
        131_072,
        rope_scaling=_LONGROPE,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        **_TIED,
    ),
    _of("Phi-4", "phi3", 5120, 40, 16_384, num_key_value_heads=10, sliding_window=None),
    _of(
        "Gemma 4 (31B, 12B)",
        "gemma4_text",
        5376,
        32,
        262_144,
        num_key_value_heads=16,
        head_dim=256,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
        **_TIED,
    ),
    _of("Qwen3.5 (9B and larger)", "qwen3_5_text", 4096, 16, 262_144, num_key_value_heads=4, head_dim=256, **_UNTIED),
    _of(
        "Granite 4 H (Mamba, no RoPE)",
        "granitemoehybrid",
        2048,
        32,
        131_072,
        shared_intermediate_size=8192,
        num_local_experts=0,
        position_embedding_type="nope",
        layer_types=["mamba", "mamba", "attention", "mamba"],
        mamba_n_heads=64,
        **_TIED,
    ),
    _of(
        "Granite 4 Micro (attention, RoPE)",
        "granitemoehybrid",
        2560,
        40,
        131_072,
        shared_intermediate_size=8192,
        num_local_experts=0,
        position_embedding_type="rope",
        layer_types=["attention"] * 4,
        **_TIED,
    ),
    _of("Granite 3", "granite", 4096, 32, 131_072, **_TIED),
    _of("SmolLM3", "smollm3", 2048, 16, 65_536, num_key_value_heads=4, **_TIED),
    _of("LFM2", "lfm2", 2048, 32, 128_000, layer_types=["conv", "conv", "full_attention", "conv"], **_TIED),
    _of("OLMo 2", "olmo2", 4096, 32, 4096, num_key_value_heads=32, **_UNTIED),
    _of("GLM-4 (9B)", "glm", 4096, 32, 131_072, num_key_value_heads=2, head_dim=128, **_UNTIED),
    _of("Seed-OSS", "seed_oss", 5120, 80, 524_288, head_dim=128, **_UNTIED),
    _of("Code World Model", "cwm", 6144, 48, 131_072, head_dim=128, rope_scaling=_LLAMA3, **_UNTIED),
    _of("ERNIE 4.5 (0.3B)", "ernie4_5", 1024, 16, 131_072, num_key_value_heads=2, head_dim=128, **_TIED),
    _of("Hunyuan", "hunyuan_v1_dense", 4096, 32, 262_144, head_dim=128, **_TIED),
    _of("Command R7B, Command A (windows)", "cohere2", 4096, 32, 131_072, sliding_window=4096, **_TIED),
)


def write_page() -> None:
    """Write all tables of docs/engines.md."""
    for name, text in tables().items():
        put_between(PAGE, MARK.format(name), text)


def tables() -> dict[str, str]:
    """The tables by name, as they are on the page."""
    found = {"models": "\n".join(model_table()), "cells": "\n".join(cell_table())}
    for engine in ENGINES:
        found[engine] = "\n".join(engine_table(engine))
    return found


def model_table() -> Iterator[str]:
    """What to write as `architecture`, for each kind of models and engine."""
    heads = [ENGINES[engine].title for engine in COLUMNS]
    together = ", ".join(ENGINES[engine].title for engine in TOGETHER)
    yield f"| models | default | {' | '.join(heads)} | {together} at once |"
    yield "|---" * (len(COLUMNS) + 3) + "|"
    for model in MODELS:
        cells = [choice(model.spec, (engine,)) for engine in COLUMNS]
        yield f"| {model.title} | {choice(model.spec, ())} | {' | '.join(cells)} | {choice(model.spec, TOGETHER)} |"


def choice(spec: DenseSpec, engines: tuple[str, ...]) -> str:
    """The architecture that `engines` chooses, with a star where a row behind it was read, not run."""
    requirement = engine_requirement(engines, spec, SHAPE)
    chosen = select_moe_architecture(spec, SHAPE, forced=None, where="", requirement=requirement).architecture
    if chosen is None:
        return "none"
    features = merge_features(spec, SHAPE, chosen)
    was_run = all(judge(engine, chosen.name, features).was_run for engine in engines)
    return f"`{chosen.name}`" + ("" if was_run else " \\*")


def cell_table() -> Iterator[str]:
    """How many rows there are, by engine and verdict."""
    yield "| engine | same, run | same, read | otherwise | fails | architectures not looked at |"
    yield "|---|---:|---:|---:|---:|---:|"
    for engine in ENGINES.values():
        rows = [row for row in engine_rows() if row.engine == engine.name]
        count = Counter((row.verdict, row.found) for row in rows)
        either = Counter(row.verdict for row in rows)
        looked = {row.architecture for row in rows}
        numbers = [count[SAME, "run"], count[SAME, "read"], either["otherwise"], either["fails"]]
        yield f"| {engine.title} | {' | '.join(map(str, [*numbers, len(MOE_ARCHITECTURES) - len(looked)]))} |"


def engine_table(engine: str) -> Iterator[str]:
    """What an engine computes of each architecture that was looked at."""
    yield "| architecture | computes | found | but |"
    yield "|---|---|---|---|"
    for line in architecture_lines(engine):
        if line.verdict != UNKNOWN:
            verdict = line.verdict if line.verdict == SAME else f"**{line.verdict}**"
            yield f"| {line.title} (`{line.architecture}`) | {verdict} | {line.how} | {'; '.join(line.exceptions)} |"


if __name__ == "__main__":
    write_page()
