"""Ctrl-C and SIGTERM: one line, exit status 1, nothing that looks finished, no actors left; then the merge goes on."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import finished_shards, hashes, start, wait_until
from tests.processes import mentioning
from tests.runtime.conftest import OPTIONS, Merge, expert_actors

Run = Callable[..., Any]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_mid_merge(
    many_shards: Merge, ray_env: dict[str, str], merge_in_process: Run, tmp_path: Path, sent: signal.Signals
) -> None:
    import ray

    out = tmp_path / "out"
    process = many_shards.start(out, ray_env)
    wait_until(lambda: len(finished_shards(out)) > 4, "the fifth shard", [process])
    process.send_signal(sent)
    said, err = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last == "stopped; a merge that had begun goes on from here when its command is run again"
    wait_until(lambda: not expert_actors(), "the end of the actors")
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "raymoe" in actor["name"]]
    left = {path.name for path in out.iterdir()} - {".raymoe"}
    assert left < many_shards.shards
    for name in left:
        assert hashes(out)[name] == many_shards.files[name]
    assert not (out / ".raymoe/parts").exists()
    result = merge_in_process(many_shards.config, out, OPTIONS)
    assert result.bytes_kept > 0
    assert hashes(out) == many_shards.files


# Of the two, Ray has a handler of its own for SIGTERM while it starts.
@pytest.mark.processes
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGTERM])
def test_stopped_while_ray_starts(many_shards: Merge, tmp_path: Path, sent: signal.Signals) -> None:
    """No cluster: the command starts its own, and is stopped at that. Nothing of Ray stays behind."""
    # A short path, for sockets.
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        process = start("merge", many_shards.config, tmp_path / "out", env=env)
        # glob and not rglob: Ray makes and removes folders there meanwhile.
        wait_until(
            lambda: any(Path(folder).glob("ray/session_*/logs/gcs_server.out")), "the first Ray process", [process]
        )
        process.send_signal(sent)
        said, err = process.communicate(timeout=60)
        assert (process.returncode, said) == (1, "")
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("stopped")
        assert not (tmp_path / "out").exists()
        wait_until(lambda: not mentioning(folder), "the end of Ray's processes")


def test_an_impatient_user(many_shards: Merge, ray_env: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C again and again: still no traceback."""
    out = tmp_path / "out"
    process = many_shards.start(out, ray_env)
    wait_until(lambda: finished_shards(out), "the first shard", [process])
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert not (out / "model.safetensors.index.json").exists()
    wait_until(lambda: not expert_actors(), "the end of the actors")
