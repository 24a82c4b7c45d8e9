"""Processes, nodes and disks that fail under a merge: it ends with the same bytes, or says why and goes on later."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import finished_shards, hashes, raymoe, wait_until
from tests.processes import kill
from tests.runtime.conftest import FLAGS, Merge, expert_actors


# What the scheduler does at such moments has its own tests (test_scheduler.py); these are the real kills.
@pytest.mark.parametrize("actors", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_killed_actor_is_replaced(many_shards: Merge, ray_env: dict[str, str], tmp_path: Path, actors: int) -> None:
    out = tmp_path / "out"
    process = many_shards.start(out, ray_env, "--actors", str(actors))
    wait_until(lambda: len(finished_shards(out)) > 3 and len(expert_actors()) == actors, "the fourth shard", [process])
    victims = expert_actors()
    kill(victims[0])
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert hashes(out) == many_shards.files


@pytest.mark.soak
def test_an_actor_that_dies_again_and_again(many_shards: Merge, ray_env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = many_shards.start(out, ray_env)
    wait_until(lambda: finished_shards(out), "the first shard", [process])
    killed = set()
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        for actor in expert_actors():
            if actor.pid not in killed:
                killed.add(actor.pid)
                kill(actor)
        time.sleep(0.005)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    last = said[said.index("error: ") :]
    assert "its actor died" in last or "no actor is left" in last
    assert "run the same command again to go on from the shards that are finished" in last
    assert len(killed) == 3  # the first, and two restarts
    assert not (out / "model.safetensors.index.json").exists()
    assert raymoe("merge", many_shards.config, out, *FLAGS, env=ray_env).returncode == 0
    assert hashes(out) == many_shards.files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    words = [mount or "true", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(path.parent).free == 0


def test_disk_full(many_shards: Merge, ray_env: dict[str, str], without_ray: None, small_disk: Path) -> None:
    """Another program fills the disk during the merge."""
    out = small_disk / "out"
    process = many_shards.start(out, ray_env)
    wait_until(lambda: finished_shards(out), "the first shard", [process])
    fill(small_disk / "filler")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "the disk is full" in said and "make room and run the same command again" in said
    check_unfinished(out, many_shards)
    (small_disk / "filler").unlink()
    assert raymoe("merge", many_shards.config, out, *FLAGS).returncode == 0
    assert hashes(out) == many_shards.files


def test_file_size_limit(many_shards: Merge, ray_env: dict[str, str], without_ray: None, tmp_path: Path) -> None:
    """A write that fails half-way for a reason that any user can arrange: the process's own limit on file sizes."""
    for attempt in range(5):  # on a busy machine a merge may be through before its actor is seen
        out = tmp_path / str(attempt)
        process = many_shards.start(out, ray_env)
        (actor,) = wait_until(expert_actors, "the actor's start", [process])
        resource.prlimit(actor.pid, resource.RLIMIT_FSIZE, (3000, 3000))
        _, said = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "could not be written: File too large" in said
    check_unfinished(out, many_shards)
    assert raymoe("merge", many_shards.config, out, *FLAGS).returncode == 0
    assert hashes(out) == many_shards.files


def check_unfinished(out: Path, merge: Merge) -> None:
    """Whole shards, and nothing else but the journal; no part of a file anywhere."""
    for name, digest in hashes(out).items():
        if not name.startswith(".raymoe/"):
            assert name in merge.shards
            assert merge.files[name] == digest
    assert not (out / ".raymoe/parts").exists()


def test_source_changes_during_the_merge(
    zoo: Callable[..., Path], ray_env: dict[str, str], many_shards: Merge, tmp_path: Path
) -> None:
    """A source that is written to while it is merged would give a model that is half old, half new."""
    from tests.cli.commands import start, write_config
    from tests.pico import merge_config

    models = [Path(shutil.copytree(zoo("llama", seed=n, dtype="bfloat16"), tmp_path / str(n))) for n in range(3)]
    config = write_config(tmp_path / "config.yaml", merge_config(models[0], models[1:], mode="random"))
    out = tmp_path / "out"
    process = start("merge", config, out, *FLAGS, "--actors", "1", env=ray_env)
    wait_until(lambda: finished_shards(out), "the first shard", [process])
    os.utime(models[1] / "model.safetensors")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "source files changed while they were merged" in said and "--overwrite" in said
    assert not (out / "model.safetensors.index.json").exists()


def test_source_is_gone_in_mid_merge(zoo: Callable[..., Path], ray_merge: Any, tmp_path: Path) -> None:
    """Planned, and then removed: the actor's message names the file."""
    import raymoe
    from raymoe.config import MergeConfig
    from raymoe.errors import MergeFailed
    from raymoe.report.merge_description import MergeDescription
    from raymoe.runtime.coordinator import run_merge
    from raymoe.runtime.settings import RuntimeSettings
    from tests.pico import merge_config

    models = [Path(shutil.copytree(zoo("llama", seed=n), tmp_path / str(n))) for n in range(3)]
    config = MergeConfig.model_validate(merge_config(models[0], models[1:], mode="random"))
    plan = raymoe.plan(config)
    shutil.rmtree(models[2])
    settings = RuntimeSettings(verbosity=-1, actors=1)
    description = MergeDescription(plan=plan, config=config, hub=settings.hub)
    with pytest.raises(MergeFailed, match=r"/2/model.safetensors: the file is not there on this node"):
        run_merge(plan, description, tmp_path / "out", settings)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
