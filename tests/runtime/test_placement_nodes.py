"""Merges over nodes that do not see each other's folders: the bytes of one on one node, or a message that says why not.

Each node has one folder that the others do not have: the base and the output's place are on the head, an expert is on
each of the two others.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.compute import COMPUTE_THREADS
from raymoe.storage.file_names import RESULT_NAME
from tests.cli.commands import command, finished_shards, hashes, raymoe, wait_until, write_config
from tests.object_store.servers import running_server
from tests.pico import merge_config
from tests.processes import kill
from tests.runtime.in_process import in_this_process
from tests.runtime.nodes import Nodes, can_hide_folders

pytestmark = [pytest.mark.skipif(not can_hide_folders(), reason="needs the right to mount"), pytest.mark.ray]
WIDE = {"hidden_size": 384, "intermediate_size": 2560, "num_hidden_layers": 2, "num_attention_heads": 8}
MANY = ("--out-shard-size", "500K", "--no-write-model-card")


@dataclass(frozen=True)
class World:
    """A cluster of three nodes, and how to run commands beside its head."""

    nodes: Nodes
    base: Path
    experts: tuple[Path, Path]

    def config(self, name: str, **options: object) -> Path:
        return write_config(self.nodes.path("head") / name, merge_config(self.base, list(self.experts), **options))

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return self.nodes.run("head", command(*arguments), stdout=pipe, stderr=pipe, text=True)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        said = process.communicate(timeout=150)[1]
        assert "Traceback" not in said, said
        return process.returncode, said

    def expected(self, config: Path, *flags: str) -> dict[str, Any]:
        """What a merge gives in one process, which sees everything."""
        out = self.nodes.folder / f"{config.stem}-expected"
        with in_this_process():
            done = raymoe("merge", config, out, *flags, "--quiet")
        assert done.returncode == 0, done.stderr
        return files_of(out)


def files_of(out: Path) -> dict[str, Any]:
    """Checksums of a merge's files; of its record what it says, but for samples of the sources that its driver sees."""
    record = json.loads((out / "raymoe.json").read_text())
    return hashes(out) | {"raymoe.json": {key: value for key, value in record.items() if key != "local_files"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from tests.pico import save_model

    server = running_server("moto")
    server.client().create_bucket(Bucket="placement")
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), server.environment)
    paths = [nodes.path(node) / "model" for node in ("head", "a", "b")]
    for seed, path in enumerate(paths):
        save_model(path, "llama", seed=seed, dtype="bfloat16", **WIDE)
    with nodes:
        for node in ("head", "a", "b"):
            nodes.add(node, cpus=1)
        yield World(nodes, paths[0], (paths[1], paths[2]))


@pytest.fixture
def out(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = world.nodes.path("head") / request.node.name
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def noisy(world: World) -> Path:
    """Experts get noise, which the nodes that have them compute."""
    return world.config("noisy.yaml", mode="random", expert_options={"noise_scale": 0.01})


@pytest.fixture(scope="module")
def many(world: World, noisy: Path) -> dict[str, Any]:
    """The files of the merge with noise in many shards."""
    return world.expected(noisy, *MANY)


def test_folders_of_three_nodes(world: World, out: Path) -> None:
    """Experts get noise where they are, the head's actor alone can read prompts, and shards have several pieces."""
    torch.set_num_threads(COMPUTE_THREADS)  # as actors do
    config = world.config("hidden.yaml", mode="hidden", expert_options={"noise_scale": 0.01})
    flags = ("--out-shard-size", "10M", "--no-write-model-card")
    code, said = world.end(world.start("merge", config, out, *flags))
    assert code == 0, said
    found = files_of(out)
    assert found == world.expected(config, *flags)
    assert len([name for name in found if name.endswith(".safetensors")]) >= 6
    code, said = world.end(world.start("verify", out))
    assert code == 2 and "the shards of expert 0 (model): no node has all the files that this needs: " in said


@pytest.mark.soak
def test_a_bucket(world: World, noisy: Path, many: dict[str, Any]) -> None:
    expected = world.nodes.folder / "noisy-expected"
    code, said = world.end(world.start("merge", noisy, "s3://placement/out", *MANY))
    assert code == 0, said
    client = running_server("moto").client()
    listed = client.list_objects_v2(Bucket="placement")["Contents"]
    found = {item["Key"].removeprefix("out/") for item in listed} - {RESULT_NAME}
    assert found == many.keys()
    for name in found - {"raymoe.json"}:
        assert client.get_object(Bucket="placement", Key=f"out/{name}")["Body"].read() == (expected / name).read_bytes()
    # Everybody reads a bucket, so that each node can compare what it has.
    code, said = world.end(world.start("verify", "s3://placement/out"))
    assert code == 0, said


@pytest.mark.soak
@pytest.mark.parametrize("side", ["sender", "writer"])
def test_a_side_of_a_stream_is_lost(world: World, noisy: Path, many: dict[str, Any], out: Path, side: str) -> None:
    title = {"sender": "ray::send ", "writer": "ray::receive "}[side]
    node = {"sender": "a", "writer": "head"}[side]
    process = world.start("merge", noisy, out, *MANY)

    def killed() -> bool:
        return any(kill(found) for found in world.nodes.workers(node, title)[:1])

    wait_until(killed, f"a {side} at work", [process])
    code, said = world.end(process)
    assert code == 0, said
    assert files_of(out) == many


@pytest.mark.soak
def test_a_killed_driver_goes_on(world: World, noisy: Path, many: dict[str, Any], out: Path) -> None:
    process = world.start("merge", noisy, out, *MANY)
    wait_until(lambda: len(finished_shards(out)) > 5, "the sixth shard", [process])
    kill(process)
    process.communicate()
    # What the journal calls finished: a file that was put in its place a moment before the kill is written again.
    kept = {name: (out / name).stat().st_ino for name in finished_shards(out)}
    code, said = world.end(world.start("merge", noisy, out, *MANY))
    assert code == 0, said
    assert files_of(out) == many
    assert kept and all((out / name).stat().st_ino == inode for name, inode in kept.items())


def test_a_folder_that_no_node_has(world: World, out: Path) -> None:
    missing = world.nodes.folder / "a/typo"
    config = write_config(world.nodes.path("head") / "typo.yaml", merge_config(world.base, [missing, world.base]))
    code, said = world.end(world.start("merge", config, out))
    assert code == 2
    assert f"no folder {missing} on this node, nor on any other (asked: node 127.0.0.2" in said
    assert "node 127.0.0.3" in said and not out.exists()


def test_models_that_are_read_together_and_are_not_together(world: World, out: Path) -> None:
    config = world.config("ridge.yaml", mode="ridge", prompt_model="grafted")
    code, said = world.end(world.start("merge", config, out))
    assert code == 2 and not out.exists()
    for number, address in enumerate(("127.0.0.2", "127.0.0.3")):
        assert f"reading the prompts of expert {number} (model): no node has all the files that this needs" in said
        assert f"{world.experts[number]} is on node {address}" in said
    assert f"{world.base} is on node " in said and "prompt_model: base" in said


@pytest.mark.soak
def test_the_only_node_with_an_expert_is_lost(world: World, noisy: Path, many: dict[str, Any], out: Path) -> None:
    process = world.start("merge", noisy, out, *MANY)
    wait_until(lambda: len(finished_shards(out)) > 3, "the fourth shard", [process])
    world.nodes.remove("b")
    began = time.monotonic()
    code, said = world.end(process)
    if code:  # else b had sent everything by then
        assert time.monotonic() - began < 100
        assert f"{world.experts[1]}/model.safetensors is on none of the nodes with an actor" in said
        assert "run the same command again when it is back" in said
    world.nodes.add("b", cpus=1)
    if code:
        code, said = world.end(world.start("merge", noisy, out, *MANY))
        assert code == 0, said
    assert files_of(out) == many
