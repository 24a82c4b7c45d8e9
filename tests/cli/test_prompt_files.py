"""Merges whose prompts come from files: the same model as from a list, a record of what was drawn, and `verify`."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from raymoe.sources.prompt_sampling import sample_prompts
from tests.cli.commands import hashes, raymoe, write_config
from tests.object_store.servers import environment, running_server
from tests.pico import merge_here

Cli = Callable[..., Any]
TEXTS = [[f"{word} number {number}" for number in range(40)] for word in ("river", "salt", "licence")]


@pytest.fixture(scope="module")
def place(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with three files of prompts, a config that names them, and `out`, its merge."""
    folder = tmp_path_factory.mktemp("prompt-files")
    (folder / "a.jsonl").write_text("".join(json.dumps({"q": text}) + "\n\n" for text in TEXTS[0]))
    parquet.write_table(pyarrow.table({"n": range(40), "text": TEXTS[1]}), folder / "b.parquet")
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS[2]).encode()))
    config = {
        "base_model": str(zoo("llama")),
        "gate_mode": "cheap_embed",
        "experts": [
            {
                "source_model": str(zoo("llama", seed=1)),
                "positive_prompts": {"file": "a.jsonl", "field": "q", "limit": 9},
            },
            {
                "source_model": str(zoo("llama", seed=2)),
                "positive_prompts": {"file": "b.parquet", "limit": 5, "seed": 3},
                "negative_prompts": {"file": "c.txt.gz", "limit": None},
            },
        ],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        merge_here(write_config(folder / "files.yaml", config), folder / "out")
    return folder


def listed(place: Path) -> dict[str, Any]:
    """The same config with the texts written out."""
    config: dict[str, Any] = yaml.safe_load((place / "files.yaml").read_text())
    config["experts"][0]["positive_prompts"] = list(sample_prompts(TEXTS[0], 9, 0))
    config["experts"][1] |= {"positive_prompts": list(sample_prompts(TEXTS[1], 5, 3)), "negative_prompts": TEXTS[2]}
    return config


def test_same_bytes_as_from_lists(place: Path, tmp_path: Path) -> None:
    merge_here(listed(place), tmp_path / "out")
    found, expected = hashes(place / "out"), hashes(tmp_path / "out")
    # These two hold the config as it was written.
    assert {name for name in found if found[name] != expected[name]} == {"README.md", "raymoe.json"}
    records = [json.loads((folder / "out/raymoe.json").read_text()) for folder in (place, tmp_path)]
    assert records[0]["plan_digest"] == records[1]["plan_digest"]
    assert (records[1]["prompt_files"], len(records[0]["prompt_files"])) == ([], 3)
    other = listed(place)
    other["experts"][0]["positive_prompts"][-1] += "!"
    merge_here(other, tmp_path / "other")
    assert {name for name in found if found[name] != hashes(tmp_path / "other")[name] and "safetensors" in name}


def test_record_and_card(place: Path) -> None:
    record = json.loads((place / "out/raymoe.json").read_text())
    assert record["config"]["experts"][0]["positive_prompts"] == {
        "file": "a.jsonl",
        "field": "q",
        "limit": 9,
        "seed": 0,
    }
    texts = json.dumps(sample_prompts(TEXTS[1], 5, 3), separators=(",", ":"))
    assert record["prompt_files"][1] == {
        "owner": "expert 1",
        "key": "positive_prompts",
        "file": str(place / "b.parquet"),
        "count": 5,
        "sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }
    assert [(file["key"], file["count"]) for file in record["prompt_files"]] == [
        ("positive_prompts", 9),
        ("positive_prompts", 5),
        ("negative_prompts", 40),
    ]
    rows = [line for line in (place / "out/README.md").read_text().splitlines() if line.startswith(("| 0", "| 1"))]
    assert [row.split(" | ")[2] for row in rows] == ["9", "5"]


def test_plan_counts_prompts_without_torch(place: Path) -> None:
    done = raymoe("plan", "files.yaml", "--json", cwd=place)
    assert done.returncode == 0
    assert json.loads(done.stdout)["gates"]["prompts"] == {"expert 0": 9, "expert 1": 45}


def test_problems_of_files_and_models_come_together(cli: Cli, place: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((place / "files.yaml").read_text())
    config["experts"][0] = {"source_model": "./no-model", "positive_prompts": {"file": "no-prompts.txt"}}
    done = cli("plan", write_config(tmp_path / "bad.yaml", config))
    assert done.code == 2
    assert "no-prompts.txt: experts[0].positive_prompts: there is no file " in done.err
    assert "b.parquet: experts[1].positive_prompts: there is no file " in done.err  # another working directory
    assert "no folder './no-model' here" in done.err


def test_verify_from_another_folder(cli: Cli, place: Path, without_ray: None) -> None:
    done = cli("verify", place / "out", "--actors", "1")
    assert (done.code, done.out.partition(":")[0]) == (0, "verified")


def test_verify_names_the_file_that_changed_or_is_gone(cli: Cli, place: Path, without_ray: None) -> None:
    file, aside = place / "a.jsonl", place / "aside"
    shutil.copy(file, aside)
    try:
        file.write_text(json.dumps({"q": "something else"}))
        done = cli("verify", place / "out", "--actors", "1")
        assert done.code == 1
        assert done.out.splitlines()[0] == (
            f"{file}: positive_prompts of expert 0 are not those of the merge (9 prompts then, 1 now)"
        )
        assert "layers.0.block_sparse_moe.gate.weight: differs" in done.out
        file.unlink()
        done = cli("verify", place / "out", "--actors", "1")
        assert done.code == 2
        assert f"{file}: experts[0].positive_prompts: there is no file {file} here" in done.err
    finally:
        shutil.move(aside, file)


def test_a_file_in_a_bucket(place: Path, ray_env: dict[str, str], tmp_path: Path) -> None:
    """Only the command reads it: the actors of this cluster have no credentials."""
    server = running_server("moto")
    server.client().create_bucket(Bucket="prompts")
    server.client().put_object(Bucket="prompts", Key="a/a.jsonl", Body=(place / "a.jsonl").read_bytes())
    config = yaml.safe_load((place / "files.yaml").read_text())
    config["experts"][0]["positive_prompts"]["file"] = "s3://prompts/a/a.jsonl"
    write_config(place / "bucket.yaml", config)
    with environment(server.environment):
        done = raymoe("merge", "bucket.yaml", tmp_path / "out", env={**ray_env, **server.environment}, cwd=place)
    assert done.returncode == 0, done.stderr
    found, expected = hashes(tmp_path / "out"), hashes(place / "out")
    assert {name for name in found if found[name] != expected[name]} == {"README.md", "raymoe.json"}
    record = json.loads((tmp_path / "out/raymoe.json").read_text())
    assert record["prompt_files"][0]["file"] == "s3://prompts/a/a.jsonl"
