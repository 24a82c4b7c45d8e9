"""Ray clusters of several nodes on one machine that do not see each other's folders.

    with Nodes(folder) as nodes:
        nodes.add("head"), nodes.add("a")     # `folder`/head is seen by the head and what runs beside it alone
        nodes.run("head", command)            # a process beside a node: it sees what the node sees

Each node has an address of its own on loopback and a mount namespace of its own, in which the other nodes' folders are
covered by empty file systems. That takes the right to mount (root in a container has it).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.processes import below, kill, titled

__all__ = ["Nodes", "can_hide_folders", "free_port"]

_START_S = 90


def can_hide_folders() -> bool:
    """Whether this user may make a mount namespace and mount in it."""
    words = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True, check=False).returncode == 0


class Nodes:
    """A cluster; the first node that is added is its head. A context manager.

    `variables` are put into the environment of all nodes, and of what runs beside them.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        # Sockets lie in this folder, and their paths may not be long.
        self._ray = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        (self._ray / "token").write_text(secrets.token_hex(32))
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._names: list[str] = []
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{self._ray}/token"}
        self.env |= {"RAY_ADDRESS": self.address, "RAY_DISABLE_IMPORT_WARNING": "1", **(variables or {})}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.remove(name)
        shutil.rmtree(self._ray, ignore_errors=True)

    def path(self, node: str) -> Path:
        """The folder that a node alone sees; to be made before any node is added."""
        folder = self.folder / node
        folder.mkdir(parents=True, exist_ok=True)
        if node not in self._names:
            self._names.append(node)
        return folder

    def add(self, name: str, *, cpus: int = 2, gpus: int = 0, store_bytes: int = 100_000_000) -> None:
        """Start a node (again); it is up when this returns."""
        self.path(name)
        address = f"127.0.0.{1 + self._names.index(name)}"
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
        words += [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={store_bytes}"]
        words += ["--disable-usage-stats", "--include-log-monitor=false", "--min-worker-port=0", "--max-worker-port=0"]
        words += [f"--dashboard-agent-listen-port={free_port()}"]
        env = {key: value for key, value in self.env.items() if key != "RAY_ADDRESS"}
        if not self.processes:
            words += ["--head", f"--port={self.address.split(':')[1]}", f"--temp-dir={self._ray}/ray"]
            words += ["--include-dashboard=false"]
            if importlib.util.find_spec("grpc"):  # what Ray Client needs: with it Ray opens a fixed port
                words += [f"--ray-client-server-port={free_port()}"]
        else:
            words += [f"--address={self.address}"]
        log = self._ray / f"{name}.log"
        with open(log, "wb") as output:
            self.processes[name] = self.run(name, words, env=env, stdout=output, stderr=output)
        self._wait(lambda: "Ray runtime started" in log.read_text(errors="replace"), self.processes[name], log)

    def remove(self, name: str) -> None:
        """Lose a node: all its processes are killed at once."""
        process = self.processes.pop(name)
        for each in (process, *below(process.pid)):
            kill(each)
        process.wait(30)

    def run(self, node: str, words: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
        """A process that sees what a node sees."""
        hidden = [self.folder / name for name in self._names if name != node]
        covers = [f"mount -t tmpfs -o size=64k none {shlex.quote(str(path))}" for path in hidden]
        script = " && ".join([*covers, f"exec {shlex.join(map(str, words))}"])
        options = {"env": self.env, "start_new_session": True, **options}
        return subprocess.Popen(["unshare", "-m", "sh", "-c", script], **options)

    def workers(self, node: str, title: str = "ray::") -> list[psutil.Process]:
        """The processes of Ray's tasks and actors on a node that are at work or have been, by what they are called."""
        return titled(below(self.processes[node].pid), title)

    def _wait(self, condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and process.poll() is None:
            if condition():
                return
            time.sleep(0.1)
        raise RuntimeError(f"a node did not start:\n{log.read_text(errors='replace')[-2000:]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
