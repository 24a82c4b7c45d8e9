"""What `make` tells pip: an index that can't be reached is not named to it, which would warn of it again and again."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import HttpServer
from tests.pico import REPOSITORY

pytestmark = pytest.mark.processes


class _Index(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    with HttpServer(("127.0.0.1", 0), _Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def closed() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def torch_command(index: str, tmp_path: Path) -> str:
    """The line of `make install` that installs torch, where there is no NVIDIA driver."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "sed", "touch"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    done = subprocess.run(
        ["/usr/bin/make", "-n", "install", f"CPU_INDEX={index}", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}"],
        cwd=REPOSITORY,
        env={"PATH": f"{tmp_path}/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not done.stderr
    (line,) = [line for line in done.stdout.splitlines() if '"torch==' in line]
    return line


@pytest.mark.skipif(not Path("/usr/bin/make").exists(), reason="needs make")
def test_the_index_of_cpu_builds_is_named_where_it_answers(index: str, tmp_path: Path) -> None:
    assert f" --extra-index-url {index}/cpu " in torch_command(f"{index}/cpu", tmp_path)


@pytest.mark.skipif(not Path("/usr/bin/make").exists(), reason="needs make")
@pytest.mark.parametrize("kind", ["refused", "not there", "no host"])
def test_it_is_not_named_elsewhere(kind: str, index: str, closed: str, tmp_path: Path) -> None:
    url = {"refused": closed, "not there": f"{index}/other", "no host": "http://no-such-host.invalid"}[kind]
    assert "--extra-index-url" not in torch_command(url, tmp_path)
