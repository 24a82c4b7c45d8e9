"""A Ray cluster of one node that outlives the drivers of a soak: attaching costs less than a second."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ray_cluster"]

_START_S = 90


@contextmanager
def ray_cluster(variables: Mapping[str, str], log: Path, cpus: int) -> Iterator[dict[str, str]]:
    """Start a node with `variables` in its environment (actors get theirs from it); what drivers need is yielded."""
    # Sockets lie in this folder, and their paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    address = f"127.0.0.1:{_free_port()}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    env = {**os.environ, **variables, **token, "RAY_DISABLE_IMPORT_WARNING": "1"}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    words += [f"--port={address.split(':')[1]}", f"--num-cpus={cpus}", f"--temp-dir={folder}/ray"]
    words += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=200000000"]
    words += ["--include-log-monitor=false", "--min-worker-port=0", "--max-worker-port=0"]
    words += [f"--dashboard-agent-listen-port={_free_port()}"]
    if importlib.util.find_spec("grpc"):  # what Ray Client needs: with it Ray opens a fixed port, without it takes none
        words += [f"--ray-client-server-port={_free_port()}"]
    with open(log, "wb") as output:
        process = subprocess.Popen(words, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait_for(address, process, log)
        yield {**token, "RAY_ADDRESS": address}
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, port = address.split(":")
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if "Ray runtime started" in log.read_text(errors="replace"):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
                return
        time.sleep(0.2)
    raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
