"""`raymoe verify`: 0 for a merge that is what its sources give, 1 for a difference, 2 if nothing can be compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.planning import MergeOptions
from tests.cli.commands import raymoe, write_config
from tests.object_store.canned import Answer, canned
from tests.runtime.in_process import in_this_process

Cli = Callable[..., Any]
ONE = ("--actors", "1")


@pytest.fixture(scope="module")
def sources(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for number in range(3):
        shutil.copytree(zoo("llama", seed=number), folder / f"model-{number}")
    return folder


@pytest.fixture(scope="module")
def finished(sources: Path) -> Path:
    """Experts with noise, and a router from prompts: every kind of part but zeros."""
    from tests.pico import merge_config, merge_here

    experts = [sources / "model-1", sources / "model-2"]
    config = merge_config(sources / "model-0", experts, mode="cheap_embed", expert_options={"noise_scale": 0.01})
    merge_here(config, sources / "out", MergeOptions(max_shard_bytes=300_000, seed=3))
    return sources / "out"


@pytest.fixture
def merged(finished: Path, tmp_path: Path) -> Path:
    """A copy of the merge that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def shard_of(folder: Path, tensor: str) -> Path:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for name, file in weight_map.items() if tensor in name)


def flip_byte(path: Path, tensor: str) -> None:
    """Change the first byte of a tensor whose name holds `tensor`."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = next(entry["data_offsets"][0] for name, entry in header.items() if tensor in name)
    content[8 + length + start] ^= 1
    path.write_bytes(content)


def test_good(cli: Cli, without_ray: None, finished: Path) -> None:
    done = cli("verify", finished, *ONE)
    assert done.code == 0
    assert "written" not in done.err  # of progress lines, where there are any: this command writes nothing
    tensors = len(json.loads((finished / "model.safetensors.index.json").read_text())["weight_map"])
    assert done.out == f"verified: {tensors} tensors equal to what the sources give, byte for byte\n"
    assert cli("verify", finished, "--quiet", *ONE).out == ""


def test_every_difference_is_listed(cli: Cli, without_ray: None, merged: Path) -> None:
    """A flipped bit in an expert, in attention and in a router, a changed config, and a tensor too many."""
    for tensor in ("0.block_sparse_moe.experts.1.w2", "2.self_attn.q_proj", "1.block_sparse_moe.gate"):
        flip_byte(shard_of(merged, tensor), tensor)
    path = merged / "config.json"
    path.write_text(path.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
    save_file({"model.extra": np.zeros(3)}, merged / "model-extra.safetensors")
    path = merged / "model.safetensors.index.json"
    recorded = path.stat().st_size
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-extra.safetensors"
    path.write_text(json.dumps(index))
    done = cli("verify", merged, *ONE)
    assert done.code == 1
    assert done.out.splitlines() == [
        "model-extra.safetensors: belongs to a model, and this merge did not write it",
        "config.json: changed since the merge",
        f"model.safetensors.index.json: {path.stat().st_size} bytes, expected {recorded}",
        "model.extra: a tensor that this merge does not have",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight: differs",
        "model.layers.1.block_sparse_moe.gate.weight: differs",
        "model.layers.2.self_attn.q_proj.weight: differs",
        "NOT verified: 7 differences",
    ]


def test_truncated_shard(cli: Cli, without_ray: None, merged: Path) -> None:
    shard = shard_of(merged, "experts.0.w1")
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    done = cli("verify", merged, *ONE)
    assert done.code == 1
    assert f"{shard.name}: {size - 1} bytes, expected {size}" in done.out


def test_missing_shard(cli: Cli, without_ray: None, merged: Path) -> None:
    shard = shard_of(merged, "experts.0.w1")
    shard.unlink()
    done = cli("verify", merged, *ONE)
    assert done.code == 1
    assert f"{shard.name}: missing" in done.out


def test_changed_source(cli: Cli, without_ray: None, sources: Path, finished: Path) -> None:
    source = sources / "model-2/model.safetensors"
    before = source.read_bytes()
    try:
        flip_byte(source, "layers.0.mlp.up_proj")
        done = cli("verify", finished, *ONE)
    finally:
        source.write_bytes(before)
    assert done.code == 1
    assert done.out.splitlines()[0] == "model.layers.0.block_sparse_moe.experts.1.w3.weight: differs"


def test_source_is_gone(cli: Cli, sources: Path, finished: Path) -> None:
    (sources / "model-1").rename(sources / "elsewhere")
    try:
        done = cli("verify", finished, *ONE)
    finally:
        (sources / "elsewhere").rename(sources / "model-1")
    assert done.code == 2
    assert "model-1" in done.err


def test_unfinished(cli: Cli, merged: Path) -> None:
    (merged / ".raymoe").mkdir()
    (merged / ".raymoe/plan.json").write_text("{}")
    done = cli("verify", merged, *ONE)
    assert done.code == 2
    assert "this merge is not finished" in done.err


def test_no_merge(cli: Cli, sources: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, sources / "model-0"):
        done = cli("verify", folder)
        assert done.code == 2
        assert "there is no raymoe.json" in done.err
    done = cli("verify", tmp_path / "none")
    assert done.code == 2
    assert "there is no such folder" in done.err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 1, "sources": [], "options": {}}'])
def test_broken_record(cli: Cli, merged: Path, text: str) -> None:
    (merged / "raymoe.json").write_text(text)
    done = cli("verify", merged, *ONE)
    assert done.code == 2
    assert "raymoe.json" in done.err


def test_from_another_folder(sources: Path, ray_env: dict[str, str], tmp_path: Path) -> None:
    """Paths in the config and on the command line are relative; the merge is verified from somewhere else."""
    content = {
        "base_model": "model-0",
        "gate_mode": "random",
        "experts": [{"source_model": "./model-1"}, {"source_model": "model-2"}],
    }
    write_config(sources / "relative.yaml", content)
    assert raymoe("merge", "relative.yaml", "relative-out", env=ray_env, cwd=sources).returncode == 0
    out = os.path.relpath(sources / "relative-out", tmp_path)
    with in_this_process():
        done = raymoe("verify", out, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("verified: ")


def test_a_card_may_be_edited(merged: Path, cli: Cli, without_ray: None) -> None:
    with open(merged / "README.md", "a") as file:
        file.write("\nBy hand.\n")
    answer = cli("verify", merged, *ONE)
    assert answer.code == 0, answer.err
    assert "note: README.md: " in answer.out and "(a card may be edited)" in answer.out and "verified: " in answer.out
    (merged / "README.md").unlink()
    assert cli("verify", merged, *ONE).code == 0


def test_a_record_that_says_nothing(merged: Path, cli: Cli) -> None:
    (merged / "raymoe.json").write_text("{}")
    answer = cli("verify", merged, *ONE)
    assert answer.code == 2
    assert "this record can't be read: it has no config" in answer.err
    assert "merge again with --overwrite" in answer.err


S3_RECORD: dict[str, Any] = {
    "files": {},
    "sources": [
        {"owner": "base", "model": "s3://bucket/base", "revision": None, "adapter": None},
        {"owner": "expert 0", "model": "s3://bucket/e", "revision": None, "adapter": None},
    ],
    "prompt_files": [],
    "options": {},
    "config": {
        "base_model": "s3://bucket/base",
        "gate_mode": "random",
        "experts_per_token": 1,
        "experts": [{"source_model": "s3://bucket/e"}],
    },
}


@pytest.mark.parametrize("command", ["verify", "eval"])
@pytest.mark.parametrize("how", ["nothing", "trusted", "endpoint", "profile"])
@pytest.mark.s3
def test_a_record_does_not_say_where_credentials_go(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, how: str
) -> None:
    """The endpoint of somebody else's record is asked for nothing before the user has said so."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    keys = {"AWS_ACCESS_KEY_ID": "AKIAVICTIM", "AWS_SECRET_ACCESS_KEY": "secret/secret", "AWS_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    no_such = [Answer(404, code="NoSuchBucket")] * 20
    with canned(*no_such) as theirs, canned(*no_such) as ours:
        storage = {"profile": "work"} if how == "profile" else {"endpoint": theirs.url}
        record = {**S3_RECORD, "config": {**S3_RECORD["config"], "storage": storage}}
        (tmp_path / "raymoe.json").write_text(json.dumps(record))
        (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
        (tmp_path / "texts.jsonl").write_text('{"text": "a b c", "label": "0"}\n')
        if how in ("endpoint", "profile"):
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ours.url)
        if how == "profile":
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        texts = ("--data", tmp_path / "texts.jsonl") if command == "eval" else ()
        refused = cli(command, tmp_path, *texts, *(["--trust-record"] if how == "trusted" else []))
        asked = bool(theirs.requests), bool(ours.requests)
    assert refused.code == 2, refused.err
    consent = "requests signed with your credentials would be sent there" in refused.err
    if how == "nothing":
        assert consent and f"s3://bucket/base, s3://bucket/e is reached at {theirs.url}" in refused.err
        assert "set AWS_ENDPOINT_URL_S3 yourself, or give --trust-record" in refused.err
    elif how == "profile":
        assert consent and "with the profile 'work' of this user" in refused.err and "set AWS_PROFILE" in refused.err
    else:
        assert not consent
    if how in ("nothing", "profile"):
        assert asked == (False, False)
    elif command == "verify":
        assert asked == (how == "trusted", how == "endpoint")


FILE = {"size": 1, "checksum": "xxh3-128:0"}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"a": {"size": "1"}}},
        {"files": {"a": {"size": 1}}},
        {"files": {"../secret": FILE}},
        {"files": {"/etc/passwd": FILE}},
        {"prompt_files": {"a": 1}},
        {"prompt_files": [{"owner": "expert 0"}]},
        {"prompt_files": [3]},
        {"sources": 3},
        {"sources": [{"owner": "base", "model": ["a"]}]},
        {"options": {"max_shard_bytes": 1, "nothing": 2}},
        {"options": [1]},
        {"config": {"experts": 3}},
    ],
    ids=str,
)
def test_records_that_raymoe_did_not_write(cli: Cli, tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "raymoe.json").write_text(json.dumps({**S3_RECORD, **changes}))
    refused = cli("verify", tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert f"{tmp_path}/raymoe.json: this record can't be read: " in refused.err
