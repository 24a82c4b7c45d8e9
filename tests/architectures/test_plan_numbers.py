"""Plans of real sizes, from files that are all header: the data behind it is a hole that takes no disk."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import raymoe
from raymoe.architectures import read_spec
from raymoe.architectures.dense_spec import DenseSpec
from tests.pico import merge_config, save_tokenizer

# https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **other: object
) -> dict[str, object]:
    """Keys of a config.json; what is left out is the family's default."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **other,
    }


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral-7b")
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B))
    save_tokenizer(folder)
    spec = read_spec(MISTRAL_7B, "mistral")
    assert isinstance(spec, DenseSpec)
    header, end = {}, 0
    for row, _, name in spec.tensors():
        shape = spec.shape_of(row)
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert file.name and end == 2 * 7_241_732_096  # the published size of Mistral 7B
    return folder


@pytest.mark.parametrize(("experts", "total", "active"), [(4, 24.15e9, 12.88e9), (8, 46.70e9, 12.88e9)])
def test_parameters_of_mixtral_sized_merges(experts: int, total: float, active: float, mistral: Path) -> None:
    config = merge_config(mistral, [mistral] * experts, mode="random")
    plan = raymoe.plan(config, allow_all_same=True)
    assert plan.totals.parameters == pytest.approx(total, abs=0.005e9)
    assert plan.totals.active_parameters == pytest.approx(active, abs=0.005e9)
    assert plan.index["metadata"]["total_size"] == 2 * plan.totals.parameters
    assert plan.config["num_local_experts"] == experts
    assert plan.config["sliding_window"] == 4096
    # Everything but the routers is copied, byte for byte.
    routers = 2 * 32 * experts * 4096
    assert plan.totals.bytes_by_kind == {"copy": 2 * plan.totals.parameters - routers, "router": routers}
    assert all(shard.nbytes <= 5_000_000_000 + len(shard.header) for shard in plan.shards)


def test_the_gate_pass_reads_all_layers_but_one_and_holds_one(mistral: Path, tmp_path: Path) -> None:
    plan = raymoe.plan(merge_config(mistral, [mistral] * 2), allow_all_same=True)
    layer = 2 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096)
    assert plan.totals.peak_gate_bytes == layer
    # The base reads all prompts, and once; grafted models have FFNs of their own, of which the last is not run.
    assert plan.totals.gate_bytes == 31 * layer
    other = tmp_path / "other"
    other.mkdir()
    for path in mistral.iterdir():  # weights of 14 GB, if of nothing
        if path.suffix == ".safetensors":
            (other / path.name).symlink_to(path)
        else:
            shutil.copy(path, other / path.name)
    grafted = raymoe.plan(merge_config(mistral, [mistral, other], mode="ridge"), allow_all_same=True)
    assert grafted.totals.gate_bytes == 2 * (32 * layer - 2 * 3 * 4096 * 14336)


@pytest.mark.processes
def test_importing_and_planning_need_neither_torch_nor_ray(zoo: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)])))
    program = (
        "import sys, raymoe\n"
        f"plan = raymoe.plan({str(config)!r})\n"
        "assert plan.architecture == 'mixtral' and plan.gates.experts[0].positive\n"
        "heavy = {'torch', 'ray', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# model_type, sizes of its config.json, parameters as published
PUBLISHED: dict[str, tuple[str, dict[str, object], float]] = {
    "Phi-4": ("phi3", sizes(5120, 17920, 40, 40, 10, 100352), 14.66e9),
    "glm-4-9b-chat-hf": ("glm", sizes(4096, 13696, 40, 32, 2, 151552), 9.40e9),
    "OLMo-2-1124-7B": ("olmo2", sizes(4096, 11008, 32, 32, 32, 100352), 7.30e9),
    "granite-3.1-8b-base": ("granite", sizes(4096, 12800, 40, 32, 8, 49155, tie_word_embeddings=True), 8.17e9),
    "ERNIE-4.5-0.3B": ("ernie4_5", sizes(1024, 3072, 18, 16, 2, 103424), 0.36e9),
    "Seed-OSS-36B": ("seed_oss", sizes(5120, 27648, 64, 80, 8, 155136), 36.15e9),
    "SmolLM3-3B": ("smollm3", sizes(2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True), 3.08e9),
    "Ministral-8B-Instruct-2410": ("ministral", sizes(4096, 12288, 36, 32, 8, 131072), 8.02e9),
    "c4ai-command-r-v01": ("cohere", sizes(8192, 22528, 40, 64, 64, 256000, tie_word_embeddings=True), 34.98e9),
    "c4ai-command-r7b": ("cohere2", sizes(4096, 14336, 32, 32, 8, 256000), 8.03e9),
    "LFM2-1.2B": (
        "lfm2",
        sizes(2048, 12288, 16, 32, 8, 65536, full_attn_idxs=[2, 5, 8, 10, 12, 14]),
        1.17e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str) -> None:
    model_type, config, expected = PUBLISHED[name]
    spec = read_spec({"model_type": model_type, **config}, name)
    assert isinstance(spec, DenseSpec)
    found = sum(math.prod(spec.shape_of(row)) for row, _, _ in spec.tensors())
    assert found == pytest.approx(expected, rel=0.003)
