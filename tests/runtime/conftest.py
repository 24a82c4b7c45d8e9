"""Fixtures for tests of merges on Ray: one config of many small shards, and what a merge of it in one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymoe.planning import MergeOptions
from tests.cli.commands import hashes, start, wait_until, write_config
from tests.processes import below, kill, titled

SHARD_BYTES = 20_000
FLAGS = ("--out-shard-size", str(SHARD_BYTES), "--no-write-model-card")
OPTIONS = MergeOptions(max_shard_bytes=SHARD_BYTES, model_card=False)


@pytest.fixture(scope="session")
def ray_env(local_ray: None) -> dict[str, str]:
    """The environment of a command that is to use the session's cluster."""
    import ray

    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """A command that a test has started, and its actors, are gone before the next test looks for actors."""
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
        process.communicate()
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        wait_until(lambda: not expert_actors(), "the end of all actors")


_started: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class Merge:
    """A config on disk, and the files that it gives."""

    config: Path
    files: dict[str, str]
    flags: tuple[str, ...] = FLAGS

    @property
    def shards(self) -> set[str]:
        return {name for name in self.files if name.endswith(".safetensors")}

    def start(self, output: Path, env: dict[str, str], *flags: str) -> subprocess.Popen[str]:
        """This merge as a command; it works with one actor, unless `flags` say otherwise."""
        _started.append(start("merge", self.config, output, *self.flags, "--actors", "1", *flags, env=env))
        return _started[-1]


@pytest.fixture(scope="session")
def many_shards(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Merge:
    from tests.pico import merge_config, merge_here

    folder = tmp_path_factory.mktemp("many-shards")
    experts = [zoo("llama", seed=seed, dtype="bfloat16") for seed in (1, 2, 3)]
    options = {"noise_scale": 0.01, "reinit": 0.25}
    content = merge_config(zoo("llama", dtype="bfloat16"), experts, mode="random", expert_options=options)
    config = write_config(folder / "config.yaml", content)
    merge_here(config, folder / "out", OPTIONS)
    merge = Merge(config=config, files=hashes(folder / "out"))
    assert len(merge.shards) > 30
    return merge


@pytest.fixture(scope="module")
def second_node(ray_env: dict[str, str]) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """second_node() is a node with two more CPUs in the session's cluster till the end of the file; started again where
    a test has killed it."""
    import ray

    nodes: list[subprocess.Popen[bytes]] = []
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", ray_env["RAY_ADDRESS"], "--block"]
    words += ["--num-cpus", "2", "--disable-usage-stats"]

    def node() -> subprocess.Popen[bytes]:
        env = {key: value for key, value in ray_env.items() if key != "RAY_ADDRESS"}
        quiet = subprocess.DEVNULL

        def is_there() -> bool:
            # Ray gives up a start that takes long, as on a busy machine: then it is started again.
            if not nodes or nodes[-1].poll() is not None:
                nodes.append(subprocess.Popen(words, env=env, stdout=quiet, stderr=quiet, start_new_session=True))
            return bool(ray.cluster_resources().get("CPU", 0) >= 4)

        wait_until(is_there, "the second node's start")
        return nodes[-1]

    yield node
    for process in nodes:
        for each in (*below(process.pid), process):
            kill(each)
        process.wait()


# What an expert actor's process is called while it has nothing to do, and by the names of its tasks.
_TITLES = ("ray::ExpertActor", "ray::write ", "ray::gates of ", "ray::router of layer ", "ray::compare ")


def expert_actors(*pids: int) -> list[psutil.Process]:
    """The processes of expert actors below these processes (by default this one, whose Ray is the session's)."""
    return titled(below(*(pids or (os.getpid(),))), *_TITLES)
