"""A cluster that can't be had: exit status 2 within seconds, and nothing written."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import raymoe

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_nobody_listens(config: Callable[..., Path], tmp_path: Path, closed_port: int) -> None:
    address = f"127.0.0.1:{closed_port}"
    done = raymoe("merge", config(), tmp_path / "out", env={**os.environ, "RAY_ADDRESS": address})
    assert done.returncode == 2
    assert f"Ray at {address}: no cluster could be reached: Connection refused" in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_such_address(config: Callable[..., Path], tmp_path: Path) -> None:
    done = raymoe("merge", config(), tmp_path / "out", "--address", "not an address")
    assert done.returncode == 2
    assert "no cluster could be reached: Invalid address format" in done.stderr


def test_no_token(config: Callable[..., Path], ray_env: dict[str, str], tmp_path: Path) -> None:
    """A cluster with token authentication, and a token file that is not there."""
    env = {**ray_env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    env.pop("RAY_AUTH_TOKEN", None)
    done = raymoe("merge", config(), tmp_path / "out", env=env)
    assert done.returncode == 2
    assert "no cluster could be reached: RAY_AUTH_TOKEN_PATH is set but" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_address_of_a_job_server(config: Callable[..., Path], tmp_path: Path) -> None:
    """What `raymoe submit` takes. test_start_errors.py has the words for other addresses."""
    done = raymoe("merge", config(), tmp_path / "out", "--address", "https://user:pw@head.example/ray")
    assert done.returncode == 2
    assert "error: --address: this is the address of a cluster's job server" in done.stderr
    assert "pw" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["long", "file", "home"])
def test_ray_can_not_be_started_here(config: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """The temporary folder of a batch system, a file in the place of a folder, a home folder that can't be written."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    file = tmp_path / "file"
    file.touch()
    long = tmp_path / "/".join(["a-folder-of-a-batch-system"] * 4)
    env |= {
        "long": {"RAY_TMPDIR": str(long)},
        "file": {"RAY_TMPDIR": str(file)},
        "home": {"HOME": str(file)},
    }[kind]
    done = raymoe("merge", config(), tmp_path / "out", env=env)
    assert done.returncode == 2
    what, remedy = {
        "long": (f"the path of its folder is too long for a socket: {long}/ray", "set RAY_TMPDIR to a short folder"),
        "file": (f"{file}/ray: Not a directory", "set RAY_TMPDIR to a short folder that you may write to"),
        "home": (f"{file}/.ray", "set HOME to a folder that you may write to"),
    }[kind]
    assert f"error: Ray on this machine: no cluster could be started: {what}" in done.stderr
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
