"""`raymoe inspect`: MoE and dense folders, and folders that are no checkpoints."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.planning import MergeOptions
from raymoe.report.inspect import inspect_checkpoint

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def merged(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pico import merge_config, merge_here

    out = tmp_path_factory.mktemp("inspect") / "out"
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="random")
    merge_here(config, out, MergeOptions(max_shard_bytes=300_000))
    return out


def test_moe(cli: Cli, merged: Path) -> None:
    done = cli("inspect", merged, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    config = json.loads((merged / "config.json").read_text())
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert found["architecture"] == "MixtralForCausalLM"
    assert (found["layers"], found["hidden_size"]) == (config["num_hidden_layers"], config["hidden_size"])
    assert (found["experts"], found["experts_per_token"]) == (3, 2)
    assert found["parameters"] == index["metadata"]["total_parameters"]
    assert found["dtypes"] == {"F32": index["metadata"]["total_size"]}
    assert {shard["file"] for shard in found["shards"]} == set(index["weight_map"].values())
    for shard in found["shards"]:
        assert shard["bytes"] == (merged / shard["file"]).stat().st_size
    # A layer has three matrices of hidden x intermediate an expert.
    expert = 3 * config["num_hidden_layers"] * config["hidden_size"] * config["intermediate_size"]
    assert found["parameters_per_expert"] == expert
    assert found["active_parameters"] == found["parameters"] - expert
    assert found["routers"]["layers"] == config["num_hidden_layers"]
    # `random` rows are of unit length, and of no relation to each other.
    assert found["routers"]["row_norm"] == pytest.approx({"min": 1.0, "max": 1.0}, abs=1e-3)
    assert abs(found["routers"]["cosine_between_rows"]["mean"]) < 0.5
    assert [source["owner"] for source in found["merge"]["sources"]] == ["base", "expert 0", "expert 1", "expert 2"]


def test_moe_as_text(cli: Cli, merged: Path) -> None:
    done = cli("inspect", merged)
    assert done.code == 0
    assert "3 experts of 55.30K, 2 for each token" in done.out
    assert "made by raymoe" in done.out and "expert 2" in done.out


def test_dense(cli: Cli, zoo: Callable[..., Path]) -> None:
    folder = zoo("llama", seed=1)
    found = json.loads(cli("inspect", folder, "--json").out)
    assert found["architecture"] == "LlamaForCausalLM"
    assert not found.keys() & {"experts", "routers", "merge"}
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size
    done = cli("inspect", folder)
    assert done.code == 0 and "experts" not in done.out


def test_no_checkpoint(cli: Cli, tmp_path: Path) -> None:
    for folder, what in ((tmp_path / "none", "there is no such folder"), (tmp_path, "config.json")):
        done = cli("inspect", folder)
        assert done.code == 2
        assert f"{folder}: " in done.err and what in done.err


@pytest.mark.parametrize(("name", "text"), [("config.json", "[]"), ("config.json", "{"), ("raymoe.json", "{")])
def test_broken_json(cli: Cli, merged: Path, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out" / name).write_text(text)
    done = cli("inspect", tmp_path / "out")
    assert done.code == 2
    assert name in done.err


def test_unfinished(cli: Cli, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out/.raymoe").mkdir()
    assert cli("inspect", tmp_path / "out").code == 0  # an empty folder is no journal
    (tmp_path / "out/.raymoe/plan.json").write_text("{}")
    done = cli("inspect", tmp_path / "out")
    assert done.code == 2
    assert "this merge is not finished" in done.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": None}, "3 experts of 55.30K, ? for each token: ? parameters active"),
        ({"num_experts_per_tok": [2]}, "3 experts of 55.30K, ? for each token: ? parameters active"),
        ({"num_experts_per_tok": 9}, "3 experts of 55.30K, 9 for each token: ? parameters active"),
        ({"architectures": {"a": 1}}, "out: ? (mixtral)"),
        ({"architectures": []}, "out: ? (mixtral)"),
        ({"num_hidden_layers": None, "vocab_size": "many"}, "? layers, hidden size 64, vocabulary ?"),
    ],
)
def test_a_config_of_somebody_else(
    changes: dict[str, object], said: str, cli: Cli, merged: Path, tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "out")
    change(tmp_path / "out/config.json", changes)
    done = cli("inspect", tmp_path / "out")
    assert done.code == 0, done.err
    assert said in done.out
    assert cli("inspect", tmp_path / "out", "--json").code == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": None}, "its config has no gate_mode"),
        ({"config": {}}, "its config has no gate_mode"),
        ({"sources": ["a"]}, "its sources are not a list of objects with an owner and a model"),
        ({"sources": None}, "its sources are not a list of objects with an owner and a model"),
    ],
)
def test_what_is_no_record(changes: dict[str, object], said: str, cli: Cli, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    change(tmp_path / "out/raymoe.json", changes)
    for more in ((), ("--json",)):
        done = cli("inspect", tmp_path / "out", *more)
        assert done.code == 2
        assert f"raymoe.json: this record can't be read: {said}" in done.err and not done.out


def test_a_record_that_lacks_keys(cli: Cli, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out/raymoe.json").write_text('{"sources": [], "plan_digest": ""}')
    assert "can't be read: it has no raymoe_version, config" in cli("inspect", tmp_path / "out").err


@pytest.mark.parametrize("host", ["ernie4_5_moe", "hunyuan_v1_moe"])
def test_the_number_of_experts_by_another_name(host: str, cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """As transformers 5 writes it."""
    from tests.architectures.pairs import PAIRS
    from tests.pico import merge_without_ray

    pair = next(pair for pair in PAIRS if pair.host == host)
    pair.skip_where_unknown()
    dense, out = zoo(pair.family), tmp_path / "out"
    merge_without_ray(pair.config(dense, [dense] * 3, dense, mode="random"), out)
    before = json.loads(cli("inspect", out, "--json").out)
    assert before["experts_per_token"] == 2
    change(out / "config.json", {"num_experts_per_tok": None})
    assert json.loads(cli("inspect", out, "--json").out) == before


def change(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"


def mixture_of(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "mixtral", "num_experts_per_tok": 2}')
    return folder


def test_cosines_of_all_pairs(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    rows[3] = 0
    save_file({ROUTER.format(layer=0): rows, ROUTER.format(layer=1): rows[:2]}, tmp_path / "model.safetensors")
    units = rows / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)[:, None]
    expected = [np.mean([a @ b for a, b in combinations(units[:count], 2)]) for count in (7, 2)]
    found = inspect_checkpoint(mixture_of(tmp_path))["routers"]["cosine_between_rows"]
    assert found == pytest.approx({"min": min(expected), "mean": np.mean(expected), "max": max(expected)}, abs=1e-6)


def test_a_router_of_many_rows(tmp_path: Path) -> None:
    """400 kB; a matrix of all pairs of rows would have 320 GB."""
    save_file({ROUTER.format(layer=0): np.ones((200_000, 1), np.float16)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    try:
        routers = inspect_checkpoint(mixture_of(tmp_path))["routers"]
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert routers["cosine_between_rows"]["mean"] == pytest.approx(1)


def test_routers_that_are_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    """A few bytes for each router in a .bin file have all of its rows read again."""
    torch = pytest.importorskip("torch")
    rows = torch.ones(1000, 100)
    torch.save({ROUTER.format(layer=layer): rows for layer in range(3)}, mixture_of(tmp_path) / "pytorch_model.bin")
    done = cli("inspect", tmp_path)
    assert done.code == 2
    assert "its 3 routers have more bytes than the files" in done.err
