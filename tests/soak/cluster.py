"""A Ray cluster that outlives the drivers of a soak: attaching costs less than a second. Its nodes are real ones, each
with processes of its own, all on this machine; they can be added and lost.

Every cluster wants its own token, and takes ports that are free.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.cli.job_head import asks_for_token
from tests.processes import below, send

__all__ = ["Cluster", "ray_cluster"]

_START_S = 90
_STORE_BYTES = 200_000_000


@dataclass(kw_only=True)
class Cluster:
    """`environment` is what drivers need; `job_server` the URL to submit to, if there is one. `workers` are the nodes
    that are up beside the head."""

    folder: Path
    address: str
    environment: Mapping[str, str]
    head: subprocess.Popen[bytes]
    job_server: str | None
    _env: Mapping[str, str]
    _log: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def pids(self) -> list[int]:
        """The processes that all others of the nodes descend from."""
        return [node.pid for node in (self.head, *self.workers)]

    @property
    def temp(self) -> Path:
        """Ray's folder for logs, sockets and what is spilled."""
        return self.folder / "ray"

    def add_worker(self, cpus: int) -> None:
        """Add a node, and wait until it is up."""
        log = self._log.with_suffix(f".{len(list(self._log.parent.glob('*.worker')))}.worker")
        words = [f"--address={self.address}", f"--num-cpus={cpus}", *_common_words()]
        self.workers.append(_start(words, self._env, log))
        _wait_for("Ray runtime started", self.workers[-1], log)

    def lose_worker(self, number: int) -> None:
        """A node goes without a word, with all its processes."""
        _end(self.workers.pop(number))

    def cut_off_worker(self, number: int) -> None:
        """All processes of a node stand still: to others it looks as if its network were gone."""
        _signal_all(self.workers[number], signal.SIGSTOP)

    def bring_back_worker(self, number: int) -> None:
        """They go on as if nothing had been; Ray lets none of them in again that it took for dead."""
        _signal_all(self.workers[number], signal.SIGCONT)


@contextmanager
def ray_cluster(
    variables: Mapping[str, str],
    log: Path,
    cpus: int,
    *,
    job_server: bool = False,
    store_bytes: int = _STORE_BYTES,
    spill: Path | None = None,
) -> Iterator[Cluster]:
    """Start a head with `variables` in its environment (actors get theirs from it). `store_bytes`: of the object store;
    `spill`: the folder for objects that find no room in it, else one of Ray's own.

    The logs of worker nodes lie beside `log`.
    """
    # Sockets lie in this folder, and their paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    gcs, dashboard = _free_port(), _free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    env = {**os.environ, **variables, **token, "RAY_DISABLE_IMPORT_WARNING": "1"}
    env.pop("RAY_ADDRESS", None)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # 'python' of a job is this one
    words = ["--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--num-cpus={cpus}", f"--temp-dir={folder}/ray"]
    words += [f"--include-dashboard={str(job_server).lower()}", f"--dashboard-port={dashboard}"]
    words += ["--include-log-monitor=false", *_common_words(store_bytes)]
    if spill is not None:
        words.append(f"--object-spilling-directory={spill}")
    if importlib.util.find_spec("grpc"):  # what Ray Client needs: with it Ray opens a fixed port, without it takes none
        words += [f"--ray-client-server-port={_free_port()}"]
    address, url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}" if job_server else None
    cluster = Cluster(
        folder=folder,
        address=address,
        environment={**token, "RAY_ADDRESS": address},
        head=_start(words, env, log),
        job_server=url,
        _env=env,
        _log=log,
    )
    try:
        _wait_for("Ray runtime started", cluster.head, log)
        while url is not None and not asks_for_token(url):
            time.sleep(0.2)
        yield cluster
    finally:
        for node in (*cluster.workers, cluster.head):
            _end(node)
        shutil.rmtree(folder, ignore_errors=True)


def _common_words(store_bytes: int = _STORE_BYTES) -> list[str]:
    """Arguments of every node."""
    return [
        "--block",
        "--disable-usage-stats",
        f"--object-store-memory={store_bytes}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={_free_port()}",
        f"--metrics-export-port={_free_port()}",
    ]


def _start(words: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
    with open(log, "wb") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)


def _wait_for(words: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if words in log.read_text(errors="replace"):
            return
        time.sleep(0.1)
    raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal_all(process, signal.SIGKILL)
    process.wait(30)


def _signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To a process first, so that it can't see what becomes of the others, then to all that descend from it."""
    for pid in (process.pid, *(child.pid for child in below(process.pid))):
        send(pid, number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
