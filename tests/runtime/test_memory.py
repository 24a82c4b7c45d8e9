"""Peak memory does not grow with the model: what a merge of eight times the bytes needs, against the smaller one."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cli.commands import write_config

HIDDEN, LAYERS = 1024, 4
_SCRIPT = """
import json, sys
import raymoe
from raymoe.runtime.settings import RuntimeSettings

result = raymoe.merge(sys.argv[1], sys.argv[2], settings=RuntimeSettings(verbosity=-1, actors=1), allow_all_same=True)
size = sum(file.size for file in result.files)
print(json.dumps({"driver": result.peak_driver_bytes, "actor": max(result.peak_actor_bytes), "output": size}))
"""


def save_hollow_model(folder: Path, intermediate: int) -> Path:
    """A Llama of zeros in bfloat16: a header, and a hole for the weights, which takes no disk."""
    folder.mkdir()
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [64, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{proj}_proj.weight": [HIDDEN, HIDDEN] for proj in "qkvo"}
        shapes |= {f"{prefix}{norm}_layernorm.weight": [HIDDEN] for norm in ("input", "post_attention")}
        shapes |= {f"{prefix}mlp.{proj}_proj.weight": [intermediate, HIDDEN] for proj in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = [HIDDEN, intermediate]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 64,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_does_not_grow(ray_env: dict[str, str], tmp_path: Path) -> None:
    """Of three experts two are copied as they are, and one is transformed."""
    peaks = []
    for width, at_least in ((256, 45e6), (4096, 330e6)):
        model = str(save_hollow_model(tmp_path / f"model-{width}", width))
        experts = [{"source_model": model, **keys} for keys in ({}, {"residual_scale": 0.5}, {})]
        content = {"base_model": model, "gate_mode": "random", "experts": experts}
        config = write_config(tmp_path / f"{width}.yaml", content)
        words = [sys.executable, "-c", _SCRIPT, config, tmp_path / f"out-{width}"]
        done = subprocess.run(words, env=ray_env, capture_output=True, text=True, timeout=120, check=True)
        peak = json.loads(done.stdout)
        assert peak["output"] > at_least
        peaks.append(peak)
    small, large = peaks
    grown = large["output"] - small["output"]
    limit = 64 << 20
    assert grown > 4 * limit
    assert large["driver"] - small["driver"] < limit // 2
    assert large["actor"] - small["actor"] < limit
