"""A cluster that can't be had: exit status 2 within seconds, and nothing written."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import raymoe


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("how", ["--address", "RAY_ADDRESS"])
def test_nobody_listens(config: Callable[..., Path], tmp_path: Path, closed_port: int, how: str) -> None:
    address = f"127.0.0.1:{closed_port}"
    env, flags = dict(os.environ), []
    if how == "--address":
        flags = ["--address", address]
    else:
        env["RAY_ADDRESS"] = address
    done = raymoe("merge", config(), tmp_path / "out", *flags, env=env)
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
