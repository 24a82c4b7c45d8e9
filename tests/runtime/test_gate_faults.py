"""Actors and nodes that are lost while the routers are made: prompts are read again, and the bytes are the same."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raymoe.planning import MergeOptions
from raymoe.runtime.actor_status import WorkKind
from tests.cli.commands import finished_shards, hashes, raymoe, wait_until, write_config
from tests.processes import below, kill, titled
from tests.runtime.conftest import Merge, expert_actors

# Wide enough for a layer's router to take a while, and for its states to lie on the node where they were computed.
_WIDE = {"hidden_size": 512, "head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 16}
_FLAGS = ("--out-shard-size", "1MB", "--no-write-model-card")
READING, FITTING = WorkKind.PROMPTS, WorkKind.ROUTERS
_TITLES = {READING: "ray::gates of ", FITTING: "ray::router of layer "}


@pytest.fixture(scope="module")
def wide(zoo: Callable[..., Path], ray_merge: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Merge:
    from tests.pico import merge_config

    folder = tmp_path_factory.mktemp("wide")
    content = merge_config(
        zoo("llama", **_WIDE), [zoo("llama", seed=seed, **_WIDE) for seed in (1, 2, 3)], mode="ridge"
    )
    numbers = np.random.default_rng(0)
    for number, expert in enumerate(content["experts"]):
        words = [f"{chr(97 + number)}{word}" for word in numbers.integers(0, 1000, 1000)]
        expert["positive_prompts"] = [" ".join(words[n : n + 25]) for n in range(0, 300, 25)]
    config = write_config(folder / "config.yaml", content)
    ray_merge(config, folder / "out", MergeOptions(max_shard_bytes=1_000_000, model_card=False))
    return Merge(config=config, files=hashes(folder / "out"), flags=_FLAGS)


def busy(with_what: WorkKind) -> list[psutil.Process]:
    """Expert actors that are at such a job, by what Ray calls their processes then. Nothing is asked of them: on a busy
    machine an answer comes when the job is over."""
    return titled(below(os.getpid()), _TITLES[with_what])


@pytest.mark.soak
@pytest.mark.parametrize(("at", "actors"), [(READING, "2"), (FITTING, "1")])
def test_a_killed_actor(wide: Merge, ray_env: dict[str, str], tmp_path: Path, at: WorkKind, actors: str) -> None:
    process = wide.start(tmp_path / "out", ray_env, "--actors", actors)
    kill(wait_until(lambda: busy(at), at.value, [process])[0])
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert hashes(tmp_path / "out") == wide.files


@pytest.fixture
def full_head(local_ray: None) -> Iterator[list[Any]]:
    """Actors that hold all CPUs of the session's own node, so that others go elsewhere until these are killed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=1)
    class Holder:
        def is_there(self) -> bool:
            return True

    head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    holders = [Holder.options(scheduling_strategy=head).remote() for _ in range(2)]
    ray.get([holder.is_there.remote() for holder in holders])
    yield holders
    for holder in holders:
        ray.kill(holder)


@pytest.mark.soak
def test_states_that_are_lost_with_their_node(
    wide: Merge,
    ray_env: dict[str, str],
    second_node: Callable[[], subprocess.Popen[bytes]],
    full_head: list[Any],
    tmp_path: Path,
) -> None:
    """A node goes with what prompts have left there, while layers are worked on: the prompts are read again."""
    import ray

    node, out = second_node(), tmp_path / "out"
    process = wide.start(out, ray_env, "--actors", "2")
    wait_until(lambda: busy(FITTING), "the first router", [process])
    lost = [node, *below(node.pid)]
    assert len(expert_actors(node.pid)) == len(expert_actors()) == 2  # so all that prompts have left is there
    for holder in full_head:
        ray.kill(holder)
    for each in lost:
        kill(each)
    node.wait()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "lost with their node: the prompts are read again" in said
    assert hashes(out) == wide.files


@pytest.mark.soak
def test_a_router_that_kills_every_actor(wide: Merge, ray_env: dict[str, str], tmp_path: Path) -> None:
    """One message, and the same command goes on from there."""
    out = tmp_path / "out"
    process = wide.start(out, ray_env)
    killed = set()
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        for actor in busy(FITTING):
            if actor.pid not in killed:
                killed.add(actor.pid)
                kill(actor)
        time.sleep(0.01)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    last = said[said.index("error: ") :]
    assert re.search(r"router of layer \d: its actor died .*, 3 times|no actor is left: the last one died", last)
    assert "run the same command again to go on from the shards that are finished" in last
    assert len(killed) == 3
    assert finished_shards(out) and not (out / "model.safetensors.index.json").exists()
    assert raymoe("merge", wide.config, out, *_FLAGS, "--actors", "1", env=ray_env).returncode == 0
    assert hashes(out) == wide.files
