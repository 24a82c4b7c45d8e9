"""`raymoe gguf`: what it says, and what it refuses before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from raymoe.cli import run_command
from tests.cli.commands import write_config
from tests.export.gguf.test_same_as_transformers import LLAMA3, LONGROPE
from tests.pico import copy_model, merge_config

Cli = Callable[..., Any]


def test_a_checkpoint(cli: Cli, merged: Callable[..., Path], tmp_path: Path) -> None:
    folder, file = merged("mistral", "mixtral", model={"sliding_window": 12}), tmp_path / "model.gguf"
    done = cli(folder, file, "--type", "q8_0")
    assert done.code == 0
    assert done.out.startswith(f"{file}: ") and "in 33 tensors, q8_0, architecture llama" in done.out
    assert "warning: llama.cpp attends to all tokens, the model to the last 12" in done.err
    again = cli(folder, file, "--quiet")
    assert (again.code, again.out) == (2, "")
    assert f"{file}: this file exists already\n    -> --overwrite replaces it" in again.err
    assert cli(folder, file, "--type", "f16", "--overwrite", "--quiet").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_config(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)]))
    done = cli(config, tmp_path / "model.gguf", "--device", "cpu")
    assert done.code == 0, done.err
    assert "f32, architecture llama" in done.out
    as_json = tmp_path / "c.json"
    as_json.write_text(json.dumps(yaml.safe_load(config.read_text())))
    assert cli(as_json, tmp_path / "same.gguf", "--name", "model").code == 0
    assert cli(config, tmp_path / "model.gguf", "--type", "F32", "--overwrite").code == 0
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "m.gguf"), "there is no such folder"),
        ((".", "m.gguf"), "config.json is missing"),
        (("model/config.json", "m.gguf"), "this file is not a config"),
        (("nothing.yaml", "m.gguf"), "nothing.yaml"),
        (
            ("model", "m.gguf", "--type", "q5_k"),
            "--type: 'q5_k' is not a type that raymoe writes\n.*q8_0.*llama-quantize",
        ),
        (("model", "model"), "this is a folder\n.*model.gguf"),
        (("model", "m.bin"), "does not end in .gguf"),
        (("model", "no/m.gguf"), "there is no such folder\n    -> make it first"),
        (("model", "s3://bucket/m.gguf"), "a GGUF file is written to a local path"),
        (("model", "/proc/m.gguf"), "/proc/m.gguf: it can't be written"),
        (("model", "m.gguf", "--random-seed", "0"), "--random-seed: has no effect on a checkpoint"),
        (("model", "m.gguf", "--allow-crimes", "--device", "cpu"), "--allow-crimes, --device: has no effect"),
        (("model", "m.gguf", "--device", "tpu"), "--device: there is no device 'tpu'\n.*cpu, cuda or auto"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], message: str, cli: Cli, zoo: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(zoo("llama"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = cli(*arguments)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert sorted(tmp_path.iterdir()) == before


def test_all_that_is_wrong_is_told_at_once(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    model = copy_model(zoo("llama"), tmp_path / "model", config={"hidden_act": "gelu"})
    (model / "tokenizer.json").unlink()
    done = cli(model, tmp_path / "m.gguf", "--type", "q9")
    assert done.code == 2
    assert "3 problems:" in done.err
    for part in ("activation 'gelu': it has silu", "neither a tokenizer.json", "'q9' is not a type"):
        assert part in done.err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma', which raymoe can't convert\n.*mixtral.*llama"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}},
            "RoPE scaling 'yarn' with beta_fast 16",
        ),
    ],
)
def test_models_that_llama_cpp_can_not_compute(
    config: dict[str, Any], message: str, cli: Cli, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    content = json.loads((zoo("llama") / "config.json").read_text())
    dropped = [key for key in ("rope_parameters",) if key in content and "rope_scaling" in config]
    model = copy_model(zoo("llama"), tmp_path / "model", config=config, drop_config=dropped)
    done = cli(model, tmp_path / "m.gguf")
    assert done.code == 2
    assert re.search(message, done.err), done.err


@pytest.mark.parametrize("scaling", [LLAMA3, LONGROPE["rope_scaling"]], ids=["llama3", "longrope"])
def test_qwen3_does_not_have_all_scalings(
    scaling: dict[str, Any], cli: Cli, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    done = cli(zoo("qwen3", rope_scaling=scaling, attention_bias=True), tmp_path / "m.gguf")
    assert done.code == 2
    kind = scaling["rope_type"]
    for part in ("qwen3, can't hold", "a bias on q, k and v", f"'{kind}': it knows linear, dynamic, yarn"):
        assert part in done.err


def test_tensors_without_a_place(cli: Cli, merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged("llama", "mixtral"), tmp_path / "strange"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"model.layers.0.extra.weight": torch.zeros(2)}, folder / "extra.safetensors")
    index["weight_map"]["model.layers.0.extra.weight"] = "extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = cli(folder, tmp_path / "m.gguf")
    assert done.code == 2
    assert "1 tensor(s) can't be written to the file: model.layers.0.extra.weight" in done.err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_key_value_heads", 4, r"k_proj\.weight has shape \(32, 64\), expected \(64, 64\)"),
        ("routed_scaling_factor", 2.5, "routed_scaling_factor is 2.5, and only 1.0 is converted"),
        ("num_local_experts", 2, r"can't be written to the file: model\.layers\.0\.block_sparse_moe\.experts\.2"),
        ("num_experts_per_tok", 4, "num_experts_per_tok is 4"),
    ],
)
def test_configs_that_do_not_fit(
    key: str, value: Any, message: str, cli: Cli, merged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(merged("llama", "mixtral"), tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    done = cli(folder, tmp_path / "m.gguf")
    assert done.code == 2
    assert re.search(message, done.err), done.err


# The config names a layer without experts, which has none of the tensors of one.
MISSING = r"tensor\(s\) missing: model\.layers\.\d\.mlp\.gate_proj"


@pytest.mark.parametrize(
    ("family", "host", "changed", "message"),
    [
        ("cohere2", "cohere2_moe", {"expert_selection_fn": "sigmoid"}, 'fn is "sigmoid", and only "softmax" is conv'),
        ("cohere2", "cohere2_moe", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, and only null is converted"),
        ("cohere2", "cohere2_moe", {"mlp_layer_types": ["dense", "sparse", "sparse"]}, MISSING),
        ("qwen3", "qwen3_moe", {"decoder_sparse_step": 2}, MISSING),
        ("qwen3", "qwen3_moe", {"mlp_only_layers": [1]}, MISSING),
        ("ernie4_5", "ernie4_5_moe", {"moe_layer_start_index": 1}, MISSING),
        ("ernie4_5", "ernie4_5_moe", {"moe_k": 3}, "moe_k is 3, and only 2 is converted"),
        ("hunyuan_v1_dense", "hunyuan_v1_moe", {"moe_topk": 3}, "moe_topk is 3, and only 2 is converted"),
        ("llama", "glm4_moe", {"topk_group": 2}, "topk_group is 2, and only 1 is converted"),
    ],
)
def test_other_settings_than_raymoe_writes(
    family: str,
    host: str,
    changed: dict[str, Any],
    message: str,
    cli: Cli,
    merged: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Each makes transformers compute something that the file would not."""
    folder = Path(shutil.copytree(merged(family, host), tmp_path / "other"))
    config = {**json.loads((folder / "config.json").read_text()), **changed}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    done = cli(folder, tmp_path / "m.gguf")
    assert done.code == 2
    assert re.search(message, done.err), done.err


def test_an_unfinished_merge(cli: Cli, merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged("llama", "mixtral"), tmp_path / "unfinished"))
    (folder / ".raymoe").mkdir()
    (folder / ".raymoe/plan.json").write_text("{}")
    assert "this merge is not finished" in cli(folder, tmp_path / "m.gguf").err


def test_values_beyond_the_type(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Seen while the file is written, of which nothing is left; a file that was there stays."""
    model = copy_model(zoo("llama"), tmp_path / "model", tensors={"lm_head.weight": torch.full((416, 64), 1e5)})
    file = tmp_path / "m.gguf"
    file.write_text("somebody's")
    done = cli(model, file, "--type", "f16", "--overwrite")
    assert done.code == 2
    assert "lm_head.weight: holds values beyond 65504, which f16 can't\n    -> write --type bf16" in done.err
    assert file.read_text() == "somebody's"
    assert not list(tmp_path.glob("*part"))


def test_without_the_gguf_package(cli: Cli, zoo: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = cli(zoo("llama"), tmp_path / "m.gguf")
    assert done.code == 2
    assert "the Python package gguf" in done.err and "pip install 'gguf>=" in done.err


def test_help_needs_no_gguf_and_no_torch(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["raymoe", "gguf", "--help"])
    with pytest.raises(SystemExit) as ended:
        run_command()
    assert ended.value.code == 0
    assert "--type" in capsys.readouterr().out
