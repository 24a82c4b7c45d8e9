"""Where actors have GPUs and there are cores to spare, others move the bytes (the GPU here is one in name only)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import raymoe, write_config
from tests.pico import merge_config


@pytest.mark.soak  # what the scheduler does where actors have GPUs has tests in test_scheduler.py
@pytest.mark.parametrize("mode", ["hidden", "ridge"])
@pytest.mark.processes
def test_prompts_are_read_by_the_actor_with_a_gpu(
    mode: str, zoo: Callable[..., Path], ray_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor that runs a model has torch, and more than 350 MB; one that only copies has 150."""
    from ray.cluster_utils import Cluster

    base, *experts = (zoo("llama", seed=seed) for seed in range(4))
    config = write_config(tmp_path / "config.yaml", merge_config(base, experts, mode=mode))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # the user's own word reaches all actors
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would start nine workers beside the three actors. On few cores the one with the GPU may then be so late that
    # the others do not wait for it any more (STARTUP_GRACE_S).
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")
    cluster = Cluster(head_node_args={"num_cpus": 9, "num_gpus": 1, "include_dashboard": False}, initialize_head=True)
    try:
        env = {**os.environ, "RAY_ADDRESS": cluster.address}
        done = raymoe("merge", config, tmp_path / "out", "-v", "--out-shard-size", "100000", env=env)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak memory: driver .*, actors (.*)", done.stderr)
    assert found is not None, done.stderr
    sizes = [float(size) * {"MB": 1, "GB": 1000}[unit] for size, unit in re.findall(r"([\d.]+) (MB|GB)", found[1])]
    assert len(sizes) == 3 and sizes[0] > 350 and max(sizes[1:]) < 250, done.stderr
    one = raymoe("merge", config, tmp_path / "one", "--out-shard-size", "100000", "--actors", "1", env=ray_env)
    assert one.returncode == 0, one.stderr
    for shard in (tmp_path / "one").glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
