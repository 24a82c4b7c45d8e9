"""A config is converted without its merge being written, to the bytes that the written merge is converted to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.gguf import GgufOptions, write_gguf
from raymoe.planning import MergeOptions
from tests.cli.commands import write_config
from tests.gguf.conftest import TOKENIZER_FILES
from tests.pico import merge_config, merge_without_ray, save_lora


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        # Copies, LoRA, noise and scale; another dtype than the sources'.
        (
            "llama",
            {"mode": "hidden", "dtype": "bfloat16", "expert_options": {"noise_scale": 0.01, "residual_scale": 0.9}},
        ),
        # A shared expert of zeros, and biases.
        ("llama", {"mode": "random", "architecture": "qwen2_moe"}),
        # Two shared experts as one.
        ("llama", {"mode": "random", "architecture": "deepseek"}),
        ("qwen3", {"mode": "cheap_embed"}),
        # All experts in one tensor.
        ("granite", {"mode": "random"}),
        ("lfm2", {"mode": "random", "experts_per_token": 1}),
    ],
)
def test_same_bytes(family: str, options: dict[str, Any], kind: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo(family)
    adapter = save_lora(tmp_path / "adapter", base, ["up_proj", "down_proj", "w1", "w2"])
    config = merge_config(base, [zoo(family, seed=1), f"{base}+{adapter}"], **options)
    if options.get("architecture") == "deepseek":
        sharer = {"source_model": str(zoo(family, seed=2))}
        config["shared_experts"] = [{**sharer, "residual_scale": 0.5}, sharer]
    merge_without_ray(config, tmp_path / "merged", MergeOptions(seed=5))
    for name in TOKENIZER_FILES:
        shutil.copy(base / name, tmp_path / "merged" / name)
    asked = GgufOptions(type=kind, name="same", merge=MergeOptions(seed=5), device="cpu")
    of_files = write_gguf(tmp_path / "merged", tmp_path / "files.gguf", asked)
    of_config = write_gguf(write_config(tmp_path / "merge.yaml", config), tmp_path / "config.gguf", asked)
    assert of_config.path.read_bytes() == of_files.path.read_bytes()
