"""The head of a real Ray cluster with a job server and token authentication, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.cli.commands import wait_until

__all__ = ["MISSING", "JobHead", "asks_for_token", "job_head"]

MISSING = [
    name for name in ("aiohttp_cors", "opencensus", "prometheus_client", "virtualenv") if find_spec(name) is None
]
"""What of ray[default] is not installed."""


@dataclass(frozen=True)
class JobHead:
    """`env` is the environment of a command that may submit to it."""

    url: str
    metrics_url: str
    env: dict[str, str]

    def metrics(self) -> str:
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            return str(answer.read().decode())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def job_head(folder: Path) -> Iterator[JobHead]:
    """`folder` holds the token and the head's log."""
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    # The path of a socket has to be short.
    session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    bin_folder = str(Path(sys.executable).parent)  # 'python' of a job is this one
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{bin_folder}{os.pathsep}{env['PATH']}"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--temp-dir={session}"]
    command += ["--disable-usage-stats", "--object-store-memory=200000000"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env=env | {"RAY_AUTH_MODE": "token"}, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(lambda: asks_for_token(url), "an answer of the job server", [])
        yield JobHead(url, f"http://127.0.0.1:{metrics}/metrics", {**env, "RAY_ADDRESS": url})
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def asks_for_token(url: str) -> bool:
    """Whether a job server is up there. Fails if it is and wants no token."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    raise AssertionError("the job server asks for no token")
