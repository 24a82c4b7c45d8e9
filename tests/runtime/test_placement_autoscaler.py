"""A cluster that has no room yet, and an autoscaler that makes some: Ray's own, with nodes that are processes here.

The cluster is a head without CPUs, as in the files of `cluster/`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.commands import hashes, raymoe, wait_until, write_config
from tests.pico import merge_config
from tests.processes import kill, mentioning
from tests.runtime.conftest import FLAGS
from tests.runtime.nodes import free_port

pytestmark = [pytest.mark.ray, pytest.mark.soak]

_UNUSED: dict[str, object] = {
    **{key: {} for key in ["auth", "docker", "file_mounts"]},
    **{key: [] for key in ["rsync_exclude", "rsync_filter", "cluster_synced_files", "initialization_commands"]},
    **{key: [] for key in ["setup_commands", "head_setup_commands", "worker_setup_commands"]},
    **{key: [] for key in ["head_start_ray_commands", "worker_start_ray_commands"]},
    "file_mounts_sync_continuously": False,
}


def cluster_config(address: str) -> dict[str, object]:
    """What a cluster launcher's file says, for nodes that are processes of this machine."""
    store = {"object_store_memory": 100_000_000}
    return {
        "cluster_name": "grows",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "provider": {"type": "fake_multinode", "gcs_address": address, "head_node_id": f"{'f' * 51}00000"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, **store}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        **_UNUSED,
    }


@pytest.fixture
def growing() -> Iterator[dict[str, str]]:
    """The environment of commands that use such a cluster."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="grows-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    (folder / "cluster.json").write_text(json.dumps(cluster_config(address)))
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
    start = {**env, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    words += [f"--port={address.rpartition(':')[2]}", f"--node-ip-address={address.rpartition(':')[0]}"]
    words += [f"--temp-dir={folder}/ray", f"--autoscaling-config={folder}/cluster.json", "--include-dashboard=false"]
    words += ["--disable-usage-stats", "--include-log-monitor=false", "--object-store-memory=100000000"]
    words += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    words += [f"--ray-client-server-port={free_port()}"]
    with open(folder / "log", "wb") as log:
        head = subprocess.Popen(words, env=start, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: "Ray runtime started" in (folder / "log").read_text(errors="replace"), "the head's start")
        yield {**env, "RAY_ADDRESS": address}
    finally:
        head.kill()
        head.wait()
        for process in mentioning(str(folder)):  # nodes that the autoscaler started are nobody's children
            kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_merge_waits_for_the_first_node(
    zoo: Callable[..., Path], growing: dict[str, str], ray_env: dict[str, str], tmp_path: Path
) -> None:
    models = [zoo("llama", seed=seed, dtype="bfloat16") for seed in range(3)]
    config = write_config(tmp_path / "config.yaml", merge_config(models[0], models[1:], mode="random"))
    done = raymoe("merge", config, tmp_path / "out", *FLAGS, env=growing)
    assert done.returncode == 0, done.stderr
    assert "waiting for the cluster's autoscaler: 2 actors of 1 CPU and 0 GPU want room" in done.stderr
    assert raymoe("merge", config, tmp_path / "alone", *FLAGS, env=ray_env).returncode == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
