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
from tests.processes import kill, mentioning

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
        with urllib.request.urlopen(self.metrics_url, timeout=60) as answer:
            return str(answer.read().decode())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# Ray gives its own processes half a minute to come up, which may be too short on a busy machine.
_STARTED, _TOO_LATE = "Ray runtime started", "timed out during startup"
_STARTS = 3


@contextlib.contextmanager
def job_head(folder: Path) -> Iterator[JobHead]:
    """`folder` holds the token and the head's log."""
    for _ in range(_STARTS):
        with _started(folder) as head:
            if head is not None:
                yield head
                return
    raise AssertionError(f"Ray did not come up: {(folder / 'head.log').read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[JobHead | None]:
    """None if the machine was too busy for Ray to start."""
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
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=env | {"RAY_AUTH_MODE": "token"}, stdout=output, stderr=output, start_new_session=True
        )

    def is_up_or_gone() -> bool:
        return head.poll() is not None or (_STARTED in log.read_text(errors="replace") and asks_for_token(url))

    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(is_up_or_gone, "an answer of the job server", [])
        said = log.read_text(errors="replace")
        assert head.poll() is None or _TOO_LATE in said, said[-2000:]
        is_up = head.poll() is None
        yield JobHead(url, f"http://127.0.0.1:{metrics}/metrics", {**env, "RAY_ADDRESS": url}) if is_up else None
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        for process in mentioning(session):  # what a start that failed leaves behind
            kill(process)
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
