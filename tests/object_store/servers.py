"""Real S3 servers on loopback: moto's, the gateway of JuiceFS (derived from MinIO), and SeaweedFS. The first two are
wrong in ways of their own; SeaweedFS keeps the conditions of writes and copies, and takes seconds to start.

    with start_moto(folder) as server: ...          # or start_juicefs(folder), start_seaweedfs(folder)
        server.endpoint, server.environment         # to be put into os.environ, or given to a subprocess
        server.client()                             # a plain botocore client: the other party in tests
    running_server("moto")                          # the same, one a process, until its end

A server dies with the process that started it, however that ends: the kernel signals it (PR_SET_PDEATHSIG). Ports are
found by binding to 0; credentials are random.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTERS = ("moto", "juicefs")
"""The servers that tests run against, one after the other."""
Keys = tuple[str, str]
_PR_SET_PDEATHSIG = 1
_START_S, _STARTS = 60, 3


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server. `kind` is its name for `start_server`."""

    kind: str
    endpoint: str
    key: str
    secret: str
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.endpoint.rsplit(":", 1)[1])

    @property
    def environment(self) -> dict[str, str]:
        """The usual variables, and nothing of this machine's own configuration."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A botocore client, independent of the package. Threads may share it."""
        return _client(self.endpoint, self.key, self.secret)


@functools.cache
def _client(endpoint: str, key: str, secret: str) -> Any:
    import botocore.config
    import botocore.session

    read_service_files_once()
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=botocore.config.Config(s3={"addressing_style": "path"}),
    )


@functools.cache
def read_service_files_once() -> None:
    """Let all clients of this process share what botocore reads of its own files, a megabyte of JSON."""
    import botocore.session

    botocore.session.create_loader = functools.cache(botocore.session.create_loader)


def new_keys() -> Keys:
    """An access key and a secret."""
    return f"KEY{secrets.token_hex(8)}", f"SECRET{secrets.token_hex(16)}"


@functools.cache
def running_server(kind: str) -> Server:
    """The server of a kind that all tests of this process share; stopped when the process ends."""
    read_service_files_once()
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"raymoe-test-{kind}-"))
    return stack.enter_context(start_server(kind, Path(folder)))


@contextmanager
def start_server(kind: str, folder: Path, keys: Keys | None = None) -> Iterator[Server]:
    """The server of a kind, with its files in `folder` (which is made), until the context ends.

    A port that was free may be taken when the server opens it: then another one is started.
    """
    starter = {"moto": start_moto, "juicefs": start_juicefs, "seaweedfs": start_seaweedfs}[kind]
    with contextlib.ExitStack() as stack:
        for number in range(_STARTS):
            here = folder / str(number)
            here.mkdir(parents=True, exist_ok=True)
            try:
                server = stack.enter_context(starter(here, keys or new_keys()))
            except RuntimeError:
                if number == _STARTS - 1:
                    raise
            else:
                break
        yield server


@contextmanager
def start_moto(folder: Path, keys: Keys | None = None) -> Iterator[Server]:
    """moto's server. Takes any credentials, and keeps its objects in memory (large ones in the temporary folder)."""
    port, (key, secret) = _free_port(), keys or new_keys()
    command = [_program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder, {}) as process:
        _wait_until_up(f"http://127.0.0.1:{port}/moto-api/", process, folder)
        yield Server(kind="moto", endpoint=f"http://127.0.0.1:{port}", key=key, secret=secret, process=process)


@contextmanager
def start_juicefs(folder: Path, keys: Keys | None = None) -> Iterator[Server]:
    """The S3 gateway of JuiceFS over a local folder. Needs its own credentials (190 MB of memory)."""
    port, (key, secret) = _free_port(), keys or new_keys()
    meta = f"sqlite3://{folder}/meta.db"
    log = open(folder / "format.log", "wb")  # noqa: SIM115
    with log:
        subprocess.run(
            [_program("juicefs"), "format", "--storage", "file", "--bucket", f"{folder}/data/", meta, "test"],
            check=True,
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": str(folder)},
        )
    command = [_program("juicefs"), "gateway", "--multi-buckets", "--keep-etag", "--no-usage-report"]
    command += ["--cache-dir", f"{folder}/cache", "--metrics", "127.0.0.1:0", meta, f"127.0.0.1:{port}"]
    environment = {"MINIO_ROOT_USER": key, "MINIO_ROOT_PASSWORD": secret, "HOME": str(folder)}
    with _running(command, folder, environment) as process:
        _wait_until_up(f"http://127.0.0.1:{port}/minio/health/live", process, folder)
        yield Server(kind="juicefs", endpoint=f"http://127.0.0.1:{port}", key=key, secret=secret, process=process)


@contextmanager
def start_seaweedfs(folder: Path, keys: Keys | None = None) -> Iterator[Server]:
    """SeaweedFS in one process, over a local folder. Needs its own credentials (200 MB of memory)."""
    key, secret = keys or new_keys()
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    owner = {"name": "test", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [owner]}))
    (folder / "data").mkdir(exist_ok=True)
    command = [_program("weed"), "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-master.volumeSizeLimitMB=256", "-master.telemetry=false", "-volume.max=0"]
    command += ["-filer", "-s3", f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    ports = {name: _free_port() for part in _SEAWEEDFS for name in (f"{part}.port", f"{part}.port.grpc")}
    command += [f"-{name}={port}" for name, port in ports.items()]
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        with _running(command, folder, {"HOME": str(folder), "TMPDIR": str(folder)}) as process:
            _wait_until_up(f"{endpoint}/healthz", process, folder)
            yield Server(kind="seaweedfs", endpoint=endpoint, key=key, secret=secret, process=process)
    finally:
        for port in ports.values():  # it puts sockets there, whatever TMPDIR says
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


_SEAWEEDFS = ("master", "volume", "filer", "s3")


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """os.environ with `variables` and without other AWS_* ones (but for certificates), for a while."""
    others = [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]
    before = {name: os.environ.pop(name, None) for name in {*others, *variables}}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():  # and nothing else: Ray puts variables of its own there
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _running(command: list[str], folder: Path, variables: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={**os.environ, **variables},
            start_new_session=True,  # Ctrl-C is for the tests, which stop the server themselves
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def _die_with_parent() -> None:
    # The 'parent' is the thread that starts the server: start servers in one that lasts, such as the main thread.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + _START_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with opener.open(url, timeout=30):
                return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.05)
    log = (folder / "server.log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the server of {folder} is not up after {_START_S} s:\n{log}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return found
