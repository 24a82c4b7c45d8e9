"""An HTTP proxy between an S3 client and an S3 server on loopback that counts bytes and, from a seed, breaks things.

    with FaultProxy("http://127.0.0.1:5000", seed=7, rates=FaultRates.spread(0.05)) as proxy:
        S3FileSystem(endpoint_url=proxy.url, ...)
        proxy.stats().request_body_bytes["UploadPart"]

    python tests/object_store/fault_proxy.py --target http://127.0.0.1:5000 --port 0 --seed 7 --rate 0.05 --stats FILE

**Relaying.** Heads and bodies go through byte for byte, Host included: the signature of a request covers the Host
header as the client sent it, and servers check it against the Host header they got. Each client connection has an own
connection to the server, kept open for as long as both sides keep theirs. Bodies are streamed in pieces of
`_PIECE_BYTES`; only their framing (Content-Length, HTTP chunks, end of connection) is looked at, so aws-chunked
uploads with trailing checksums pass as they are.

**Faults.** Requests are numbered as their heads arrive. `decide(seed, number, rates, eligible)` is pure: the same seed,
number and kind of request give the same fault in every run. A fault that ends in an error for the client is never
injected more than `max_consecutive` times in a row for one request (method, path, query, range), nor for one
invocation of an AWS SDK, so that a client with more attempts than that always gets through.

**Threads.** Everything happens on the event loop of one background thread, the counting too; `stats()` asks that loop,
so what a client has seen before it calls `stats()` is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import enum
import json
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

__all__ = ["KINDS", "Fault", "FaultProxy", "FaultRates", "InjectedFault", "ProxyStats", "decide", "operation_of"]

_PIECE_BYTES = 128 * 1024
_HEAD_BYTES_LIMIT = 64 * 1024
# Pieces relayed in one go before other connections get their turn: sockets that are always ready never suspend a task.
_PIECES_A_TURN = 8
# How long a client that asked for it waits for the server's 100 Continue before the proxy sends its own.
_CONTINUE_SECONDS = 1.0
# How long a connection that the proxy closes stays open for what the client still sends, and how long the server may
# go on reading a body that it has already answered.
_LINGER_SECONDS = 1.0
# Between the last byte sent and a reset, so that the reset doesn't overtake the bytes.
_BEFORE_RESET_SECONDS = 0.02
_TRICKLE_STEPS = 8
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_T = TypeVar("_T")


# ---- What can be injected ----


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """The probability of each kind of fault for a request that the kind applies to, in [0, 1].

    error_500             InternalError; the server never hears of the request
    slow_down_503         SlowDown; the server never hears of the request
    reset_before          the connection is reset once the head has arrived; the server never hears of the request
    reset_request_body    reset in the middle of the request's body; the server never hears of the request
    reset_mid_body        the server has done it; reset in the middle of the response's body
    truncate_body         the server has done it; the response's body ends early, by an orderly close
    slow                  a pause of `slow_seconds` before the request is forwarded, or spread over the response's body
    lost_complete_reply   CompleteMultipartUpload: the server has done it; the connection is closed without a reply
    lost_reply            the same for every other write
    conflict_409          ConditionalRequestConflict for a conditional write; the server never hears of it

    At most one fault is injected into a request, so the rates of the kinds that apply to one and the same request must
    not add up to more than 1: ValueError.
    """

    error_500: float = 0.0
    slow_down_503: float = 0.0
    reset_before: float = 0.0
    reset_request_body: float = 0.0
    reset_mid_body: float = 0.0
    truncate_body: float = 0.0
    slow: float = 0.0
    lost_complete_reply: float = 0.0
    lost_reply: float = 0.0
    conflict_409: float = 0.0
    slow_seconds: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not 0.0 <= getattr(self, kind) <= 1.0:
                raise ValueError(f"rate of {kind} is {getattr(self, kind)}, expected 0 to 1")
        common = sum(getattr(self, kind) for kind in _COMMON_KINDS)
        together = common + self.conflict_409 + max(self.lost_complete_reply, self.lost_reply)
        if together > 1.0 + 1e-9:
            raise ValueError(f"rates that apply to one request add up to {together:.3f}, expected at most 1")
        shortest, longest = self.slow_seconds
        if not 0.0 <= shortest <= longest:
            raise ValueError(f"slow_seconds is {self.slow_seconds}, expected (shortest, longest) with 0 <= shortest")

    @classmethod
    def spread(cls, rate: float, **others: Any) -> FaultRates:
        """Rates with which about `rate` of all requests suffer.

        The kinds that any request can suffer share `rate`. Lost replies and conflicts come on top with rate / 2 each,
        because few requests can suffer them, so `rate` is at most 0.5. `others` replaces single rates and slow_seconds.
        """
        rates: dict[str, Any] = {kind: rate / len(_COMMON_KINDS) for kind in _COMMON_KINDS}
        rates |= {kind: rate / 2 for kind in KINDS if kind not in _COMMON_KINDS}
        return cls(**(rates | others))


_COMMON_KINDS = (
    "error_500",
    "slow_down_503",
    "reset_before",
    "reset_request_body",
    "reset_mid_body",
    "truncate_body",
    "slow",
)
#: Every kind of fault, in the order in which `decide` tries them.
KINDS = (*_COMMON_KINDS, "lost_complete_reply", "lost_reply", "conflict_409")

_ERRORS = {
    "error_500": ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    "slow_down_503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "conflict_409": (
        "409 Conflict",
        "ConditionalRequestConflict",
        "A conflicting operation occurred during the request. Please try again.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is done to one request.

    `fraction` in [0, 1) is the share of a body that passes before it is cut, `delay_seconds` and `trickle` (spread
    over the response's body, or all of it before the request is forwarded) belong to the kind slow.
    """

    kind: str
    fraction: float
    delay_seconds: float
    trickle: bool


def decide(seed: int, number: int, rates: FaultRates, eligible: Collection[str]) -> Fault | None:
    """The fault of request `number` that the kinds `eligible` apply to: a pure function of its arguments."""
    dice = random.Random(f"{seed}:{number}")
    drawn, fraction = dice.random(), dice.random()
    delay_seconds, trickle = dice.uniform(*rates.slow_seconds), dice.random() < 0.5
    for kind in KINDS:
        if kind in eligible:
            drawn -= getattr(rates, kind)
            if drawn < 0.0:
                return Fault(kind=kind, fraction=fraction, delay_seconds=delay_seconds, trickle=trickle)
    return None


# ---- What a request is ----

_OPERATIONS = (
    "GetObject",
    "HeadObject",
    "ListObjectsV2",
    "PutObject",
    "CopyObject",
    "CreateMultipartUpload",
    "UploadPart",
    "UploadPartCopy",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
    "DeleteObject",
    "DeleteObjects",
    "ListMultipartUploads",
    "ListParts",
    "ListObjects",
    "ListBuckets",
    "CreateBucket",
    "HeadBucket",
    "DeleteBucket",
    "Other",
)
_WRITES = {
    "PutObject",
    "CopyObject",
    "CreateMultipartUpload",
    "UploadPart",
    "UploadPartCopy",
    "AbortMultipartUpload",
    "DeleteObject",
    "DeleteObjects",
}
# Their successful replies have no body that could be cut.
_BODILESS_REPLIES = {
    "HeadObject",
    "HeadBucket",
    "PutObject",
    "UploadPart",
    "AbortMultipartUpload",
    "DeleteObject",
    "CreateBucket",
    "DeleteBucket",
}
_OF_OBJECT = {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}
_OF_UPLOAD = {"GET": "ListParts", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
_OF_BUCKET = {"GET": "ListObjects", "HEAD": "HeadBucket", "PUT": "CreateBucket", "DELETE": "DeleteBucket"}
# Query keys that leave an operation on an object or a bucket what it is.
_HARMLESS = {
    "x-id",
    "versionId",
    "partNumber",
    "prefix",
    "delimiter",
    "marker",
    "max-keys",
    "encoding-type",
    "key-marker",
    "upload-id-marker",
    "max-uploads",
    "part-number-marker",
    "max-parts",
    "continuation-token",
    "start-after",
    "fetch-owner",
}


def _query_of(target: str) -> list[tuple[str, str]]:
    """The query of a request target, without the parts of a presigned URL, which change with time."""
    pairs = parse_qsl(target.partition("?")[2], keep_blank_values=True)
    return [(name, value) for name, value in pairs if not name.lower().startswith("x-amz-")]


def operation_of(method: str, target: str, headers: Mapping[str, str]) -> str:
    """The S3 operation of a path-style request; `headers` by names in lower case. 'Other' for what isn't known here."""
    query = dict(_query_of(target))
    key = target.partition("?")[0][1:].partition("/")[2]
    bucket = target.partition("?")[0].strip("/")
    unknown = query.keys() - _HARMLESS - {name for name in query if name.startswith("response-")}
    if key and "uploadId" in query:
        if method == "PUT":
            return "UploadPartCopy" if "x-amz-copy-source" in headers else "UploadPart"
        return _OF_UPLOAD.get(method, "Other")
    if key:
        if method == "POST":
            return "CreateMultipartUpload" if "uploads" in query else "Other"
        if method == "PUT" and not unknown and "x-amz-copy-source" in headers:
            return "CopyObject"
        return "Other" if unknown else _OF_OBJECT.get(method, "Other")
    if not bucket:
        return "ListBuckets" if method == "GET" else "Other"
    if method == "POST":
        return "DeleteObjects" if "delete" in query else "Other"
    if method == "GET" and unknown == {"list-type"}:
        return "ListObjectsV2"
    if method == "GET" and unknown == {"uploads"}:
        return "ListMultipartUploads"
    return "Other" if unknown else _OF_BUCKET.get(method, "Other")


# The length of a body where no Content-Length gives it.
_CHUNKED = -1
_UNTIL_CLOSE = -2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The head of a request or a response: `raw` as received, with the empty line; `start` is its first line's words.

    `body_bytes` is the length of the body, or _CHUNKED or _UNTIL_CLOSE.
    """

    raw: bytes
    start: tuple[str, str, str]
    headers: Mapping[str, str]
    body_bytes: int

    @property
    def status(self) -> int:
        return int(self.start[1])

    def keeps_alive(self, version: str) -> bool:
        connection = self.headers.get("connection", "").lower()
        return "keep-alive" in connection if version == "HTTP/1.0" else "close" not in connection


def _parse_head(raw: bytes, default_body_bytes: int) -> _Head:
    """ValueError for what isn't HTTP/1.x."""
    lines = raw.decode("latin-1").split("\r\n")
    first, second, third = [*lines[0].split(" ", 2), "", ""][:3]
    if not (first.startswith("HTTP/1.") or third.startswith("HTTP/1.")):
        raise ValueError(f"not HTTP/1.x: {lines[0][:80]!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        if line:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
    body_bytes = default_body_bytes
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body_bytes = _CHUNKED
    elif "content-length" in headers:
        body_bytes = int(headers["content-length"])
    return _Head(raw=raw, start=(first, second, third), headers=headers, body_bytes=body_bytes)


def _eligible(request: _Head, operation: str) -> set[str]:
    """The kinds of fault that apply to a request."""
    kinds = {"error_500", "slow_down_503", "reset_before", "slow"}
    if request.body_bytes != 0:
        kinds.add("reset_request_body")
    if operation not in _BODILESS_REPLIES and request.start[0] != "HEAD":
        kinds |= {"reset_mid_body", "truncate_body"}
    if operation == "CompleteMultipartUpload":
        kinds.add("lost_complete_reply")
    elif operation in _WRITES:
        kinds.add("lost_reply")
    if request.start[0] in {"PUT", "POST"} and request.headers.keys() & {"if-match", "if-none-match"}:
        kinds.add("conflict_409")
    return kinds


# ---- Connections ----


class _Gone(Exception):
    """The other side of a connection closed or reset it: `wire` is that connection."""

    def __init__(self, wire: _Wire) -> None:
        super().__init__(wire)
        self.wire = wire


class _Wire:
    """One connected socket with what was received beyond the last head or line. Raises _Gone, never OSError."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read_until(self, end: bytes) -> bytes:
        """All bytes up to and including `end`."""
        searched = 0
        while (found := self._received.find(end, searched)) < 0:
            if len(self._received) > _HEAD_BYTES_LIMIT:
                raise ValueError(f"no {end!r} within {_HEAD_BYTES_LIMIT} bytes")
            searched = max(0, len(self._received) - len(end))
            piece = bytearray(16 * 1024)
            count = await self._receive_into(memoryview(piece))
            self._received += piece[:count]
        taken = bytes(self._received[: found + len(end)])
        del self._received[: found + len(end)]
        return taken

    async def read_into(self, view: memoryview) -> int:
        """At least one byte and at most len(view)."""
        if not self._received:
            return await self._receive_into(view)
        count = min(len(view), len(self._received))
        view[:count] = self._received[:count]
        del self._received[:count]
        return count

    async def _receive_into(self, view: memoryview) -> int:
        try:
            count = await self._loop.sock_recv_into(self._socket, view)
        except OSError as error:
            raise _Gone(self) from error
        if not count:
            raise _Gone(self)
        return count

    async def send(self, data: bytes | memoryview) -> None:
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            raise _Gone(self) from error

    def has_ended(self) -> bool:
        """Whether a connection that should be silent isn't fit for another request."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return bool(self._received)
        except OSError:
            pass
        return True

    def close(self) -> None:
        self._socket.close()

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    async def finish(self) -> None:
        """An orderly close: no reset destroys what was sent, even if the other side is still sending."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(asyncio.TimeoutError, _Gone):
                await asyncio.wait_for(self._drain(), _LINGER_SECONDS)
        self._socket.close()

    async def _drain(self) -> None:
        view = memoryview(bytearray(_PIECE_BYTES))
        while True:
            await self._receive_into(view)
            await asyncio.sleep(0)


class _Relay:
    """Moves the payload of bodies from a wire to another, or to nowhere, and counts it.

    `count(n)` is called for each n bytes of payload that were moved; the framing of HTTP chunks isn't payload.
    """

    def __init__(self, source: _Wire, sink: _Wire | None, count: Callable[[int], None]) -> None:
        self._source = source
        self._sink = sink
        self._count = count
        self._pieces = 0

    async def body(self, body_bytes: int) -> None:
        if body_bytes == _CHUNKED:
            await self._chunks()
        elif body_bytes == _UNTIL_CLOSE:
            await self._rest()
        else:
            await self.exactly(body_bytes)

    async def exactly(self, wanted_bytes: int) -> None:
        if wanted_bytes == 0:
            return
        view = memoryview(bytearray(min(wanted_bytes, _PIECE_BYTES)))
        left = wanted_bytes
        while left:
            left -= await self._piece(view[: min(left, len(view))])

    async def part(self, body_bytes: int, fraction: float) -> None:
        """Only the first `fraction` of a body, at least a byte of a body of two or more, and never all of it.

        Of a body of unknown length, at most one piece of its first chunk.
        """
        if body_bytes == _CHUNKED:
            body_bytes = min(await self._chunk_size(), _PIECE_BYTES)
        await self.exactly(min(max(1, int(body_bytes * fraction)), max(0, body_bytes - 1)))

    async def trickle(self, body_bytes: int, seconds: float) -> None:
        """The whole body with pauses that add up to `seconds`."""
        step_bytes = -(-body_bytes // _TRICKLE_STEPS) if body_bytes > 0 else 0
        for step in range(_TRICKLE_STEPS):
            await asyncio.sleep(seconds / _TRICKLE_STEPS)
            await self.exactly(max(0, min(step_bytes, body_bytes - step * step_bytes)))
        if body_bytes < 0:
            await self.body(body_bytes)

    async def _chunks(self) -> None:
        while size := await self._chunk_size():
            await self.exactly(size)
            await self._send(await self._source.read_until(b"\r\n"))
        # Trailers, if any, and the empty line that ends them.
        while (line := await self._source.read_until(b"\r\n")) != b"\r\n":
            await self._send(line)
        await self._send(line)

    async def _chunk_size(self) -> int:
        line = await self._source.read_until(b"\r\n")
        await self._send(line)
        return int(line.split(b";")[0].strip(), 16)

    async def _rest(self) -> None:
        view = memoryview(bytearray(_PIECE_BYTES))
        try:
            while True:
                await self._piece(view)
        except _Gone as gone:
            if gone.wire is not self._source:
                raise

    async def _piece(self, view: memoryview) -> int:
        count = await self._source.read_into(view)
        # Counted first: whoever has received the piece finds it counted.
        self._count(count)
        try:
            await self._send(view[:count])
        except _Gone:
            self._count(-count)
            raise
        self._pieces += 1
        if self._pieces % _PIECES_A_TURN == 0:
            await asyncio.sleep(0)
        return count

    async def _send(self, data: bytes | memoryview) -> None:
        if self._sink is not None:
            await self._sink.send(data)


# ---- What is counted ----


def _per_operation() -> dict[str, int]:
    return dict.fromkeys(_OPERATIONS, 0)


@dataclass(kw_only=True)
class ProxyStats:
    """What a proxy has seen. Bytes are those of bodies as sent, without heads and the framing of HTTP chunks.

    requests              requests whose head arrived, by operation, whatever became of them
    methods               the same by HTTP method
    faults                injected faults by kind
    faults_by_operation   the same by operation, then kind
    request_body_bytes    received from clients and forwarded to the server, by operation
    response_body_bytes   received from the server and sent to clients, by operation
    dropped_body_bytes    received from clients and not forwarded because of a fault
    target_failures       requests that the server didn't answer: not reachable, or hung up
    client_hangups        requests whose client hung up before it had its answer
    """

    requests: dict[str, int] = field(default_factory=_per_operation)
    methods: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    faults_by_operation: dict[str, dict[str, int]] = field(default_factory=dict)
    request_body_bytes: dict[str, int] = field(default_factory=_per_operation)
    response_body_bytes: dict[str, int] = field(default_factory=_per_operation)
    dropped_body_bytes: int = 0
    target_failures: int = 0
    client_hangups: int = 0

    @property
    def total_faults(self) -> int:
        return sum(self.faults.values())

    @property
    def total_body_bytes(self) -> int:
        """Body bytes that passed, in both directions together."""
        return sum(self.request_body_bytes.values()) + sum(self.response_body_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON, a deep copy."""
        return dataclasses.asdict(self)

    def copy(self) -> ProxyStats:
        return ProxyStats(**self.as_dict())


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectedFault:
    """One fault that was injected, for looking into a failed run."""

    number: int
    kind: str
    method: str
    target: str


class _Streaks:
    """How many faults in a row each request had. Only requests with faults are kept."""

    def __init__(self, max_consecutive: int) -> None:
        self._max_consecutive = max_consecutive
        self._faults: dict[tuple[str, ...], int] = {}

    def allow(self, keys: Collection[tuple[str, ...]]) -> bool:
        return all(self._faults.get(key, 0) < self._max_consecutive for key in keys)

    def add(self, keys: Collection[tuple[str, ...]]) -> None:
        for key in keys:
            self._faults[key] = self._faults.get(key, 0) + 1

    def end(self, keys: Collection[tuple[str, ...]]) -> None:
        for key in keys:
            self._faults.pop(key, None)


def _streak_keys(request: _Head) -> list[tuple[str, ...]]:
    method, target, _ = request.start
    query = sorted(f"{name}={value}" for name, value in _query_of(target))
    keys: list[tuple[str, ...]] = [(method, target.partition("?")[0], *query, request.headers.get("range", ""))]
    if invocation := request.headers.get("amz-sdk-invocation-id"):
        keys.append((invocation,))
    return keys


# ---- The proxy ----


class FaultProxy:
    """Serves from `start()` to `stop()`, or as a context. `rates` may be replaced while it runs.

    `target` is the server's URL, plain http. `max_consecutive` bounds the faults in a row for one and the same request.
    """

    def __init__(
        self,
        target: str,
        seed: int = 0,
        rates: FaultRates | None = None,
        *,
        max_consecutive: int = 3,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        parts = urlsplit(target)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"target is {target!r}, expected http://HOST:PORT")
        self.seed = seed
        self.rates = rates or FaultRates()
        self.max_consecutive = max_consecutive
        self._target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
        self._address = (host, port)
        self._stats = ProxyStats()
        self._recent: collections.deque[InjectedFault] = collections.deque(maxlen=1000)
        self._streaks = _Streaks(max_consecutive)
        self._number = 0
        self._is_holding, self._held = False, 0
        self._released: asyncio.Event | None = None
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """For endpoint_url; known from start() on."""
        assert self._listener is not None, "the proxy was not started"
        host, port = self._address
        return f"http://{host}:{port}"

    def start(self) -> FaultProxy:
        """Listens when it returns."""
        assert self._thread is None, "a proxy starts once"
        self._listener = socket.create_server(self._address, backlog=1024)
        self._listener.setblocking(False)
        self._address = self._listener.getsockname()[:2]
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="fault-proxy", daemon=True)
        self._thread.start()
        assert ready.wait(60), "the proxy's thread did not start"
        return self

    def stop(self) -> None:
        """Closes every connection. Stats stay readable. May be called again."""
        if self._thread is None or not self._thread.is_alive():
            return
        assert self._loop is not None and self._stopping is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(60)
        if self._thread.is_alive():
            raise RuntimeError("the proxy's thread did not end within 60 s")

    def __enter__(self) -> FaultProxy:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stats(self) -> ProxyStats:
        """A copy of what was counted until now."""
        return self._on_loop(self._stats.copy)

    def reset_stats(self) -> ProxyStats:
        """Counts from zero from now on; what was counted until now is returned. The numbering of requests goes on."""

        def swap() -> ProxyStats:
            counted, self._stats = self._stats, ProxyStats()
            return counted

        return self._on_loop(swap)

    def hold(self) -> None:
        """Keep back all requests that come from now on, until `let_go`, as a network does that is interrupted."""
        self._on_loop(lambda: self._set_holding(True))

    def let_go(self) -> None:
        """Forward what was kept back, and everything that comes later. May be called again."""
        self._on_loop(lambda: self._set_holding(False))

    @property
    def held(self) -> int:
        """How many requests are kept back now."""
        return self._on_loop(lambda: self._held)

    def recent_faults(self) -> tuple[InjectedFault, ...]:
        """The last thousand faults, oldest first."""
        return self._on_loop(lambda: tuple(self._recent))

    def _on_loop(self, function: Callable[[], _T]) -> _T:
        """`function()` between two steps of the loop; called directly where no loop runs any more."""
        answer: concurrent.futures.Future[_T] = concurrent.futures.Future()
        # RuntimeError: the loop is closed.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(lambda: answer.set_result(function()))
        while self._thread is not None and self._thread.is_alive():
            # The loop may end without having come to it.
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return answer.result(0.1)
        return answer.result() if answer.done() else function()

    async def _serve(self, ready: threading.Event) -> None:
        assert self._listener is not None
        self._loop, self._stopping, self._released = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()
        accepting = asyncio.create_task(self._accept(self._listener, connections))
        ready.set()
        try:
            await self._stopping.wait()
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            self._listener.close()
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, listener: socket.socket, connections: set[asyncio.Task[None]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, _ = await loop.sock_accept(listener)
            except OSError:
                # Out of file descriptors, or the client is gone already: both pass.
                await asyncio.sleep(0.05)
                continue
            task = asyncio.create_task(_Connection(self, _Wire(connected)).serve())
            connections.add(task)
            task.add_done_callback(connections.discard)

    # What follows is called by connections, on the loop.

    async def _connect(self) -> _Wire | None:
        family, kind, protocol, _, address = self._target
        connected = socket.socket(family, kind, protocol)
        connected.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connected, address)
        except BaseException as error:
            connected.close()
            if isinstance(error, OSError):
                return None
            raise
        return _Wire(connected)

    def _admit(self, request: _Head, operation: str) -> tuple[int, Fault | None]:
        """Numbers and counts a request and draws its fault, which is counted by `_injected` once it happens."""
        number = self._number
        self._number += 1
        method = request.start[0]
        self._stats.requests[operation] += 1
        self._stats.methods[method] = self._stats.methods.get(method, 0) + 1
        fault = decide(self.seed, number, self.rates, _eligible(request, operation))
        keys = _streak_keys(request)
        if fault is None or not self._streaks.allow(keys):
            self._streaks.end(keys)
            return number, None
        self._streaks.add(keys)
        return number, fault

    def _set_holding(self, is_holding: bool) -> None:
        self._is_holding = is_holding
        if self._released is not None:
            (self._released.clear if is_holding else self._released.set)()

    async def _when_let_go(self) -> None:
        if not self._is_holding:
            return
        assert self._released is not None
        self._held += 1
        try:
            await self._released.wait()
        finally:
            self._held -= 1

    def _injected(self, number: int, fault: Fault, request: _Head, operation: str) -> None:
        self._stats.faults[fault.kind] += 1
        of_operation = self._stats.faults_by_operation.setdefault(operation, {})
        of_operation[fault.kind] = of_operation.get(fault.kind, 0) + 1
        method, target, _ = request.start
        self._recent.append(InjectedFault(number=number, kind=fault.kind, method=method, target=target))

    def _count_request_bytes(self, operation: str, count: int) -> None:
        self._stats.request_body_bytes[operation] += count

    def _count_response_bytes(self, operation: str, count: int) -> None:
        self._stats.response_body_bytes[operation] += count

    def _count_dropped_bytes(self, count: int) -> None:
        self._stats.dropped_body_bytes += count

    def _count_hangup(self, of_client: bool) -> None:
        if of_client:
            self._stats.client_hangups += 1
        else:
            self._stats.target_failures += 1


class _Ending(enum.Enum):
    """What becomes of a client connection after an exchange."""

    KEEP = enum.auto()
    FINISH = enum.auto()
    RESET = enum.auto()


class _Connection:
    """One client connection and the server connection that belongs to it: one request after the other.

    Sockets are closed here only, when no task waits for them: asyncio confuses a closed socket with the next one that
    gets its number.
    """

    def __init__(self, proxy: FaultProxy, client: _Wire) -> None:
        self.proxy = proxy
        self.client = client
        self._server: _Wire | None = None

    async def serve(self) -> None:
        try:
            ending = _Ending.KEEP
            while ending is _Ending.KEEP:
                ending = await self._next_request()
            self._drop_server()
            if ending is _Ending.FINISH:
                await self.client.finish()
            else:
                self.client.reset()
        finally:
            self.client.close()
            self._drop_server()

    async def _next_request(self) -> _Ending:
        try:
            request = _parse_head(await self.client.read_until(b"\r\n\r\n"), 0)
        except _Gone:
            return _Ending.FINISH
        except ValueError:
            return _Ending.RESET
        try:
            return await _Exchange(self, request).run()
        except _Gone as gone:
            # What the server would see of a client that hangs up, and the client of a server that does.
            self.proxy._count_hangup(of_client=gone.wire is self.client)
            return _Ending.RESET
        except ValueError:
            # Framing that can't be followed.
            return _Ending.RESET

    async def server(self) -> _Wire:
        """The server connection, a new one if there is none or it has ended; _Gone where the server isn't there."""
        if self._server is not None and self._server.has_ended():
            self._drop_server()
        if self._server is None:
            self._server = await self.proxy._connect()
        if self._server is None:
            raise _Gone(_NOWHERE)
        return self._server

    def _drop_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


# Stands for the server connection that could not be made.
_NOWHERE: Any = object()


class _Exchange:
    """One request and its response."""

    def __init__(self, connection: _Connection, request: _Head) -> None:
        self._connection = connection
        self._client = connection.client
        self._proxy = connection.proxy
        self._request = request
        self._operation = operation_of(request.start[0], request.start[1], request.headers)
        self._number, self._fault = self._proxy._admit(request, self._operation)
        self._expects_continue = request.headers.get("expect", "").lower() == "100-continue"
        self._may_continue = asyncio.Event()

    async def run(self) -> _Ending:
        await self._proxy._when_let_go()
        fault = self._fault
        if fault is not None:
            if fault.kind in _ERRORS:
                return await self._answer_error(fault)
            if fault.kind == "reset_before":
                self._note(fault)
                return _Ending.RESET
            if fault.kind == "reset_request_body":
                return await self._reset_in_request(fault)
            if fault.kind == "slow":
                self._note(fault)
                if not fault.trickle:
                    await asyncio.sleep(fault.delay_seconds)
        server = await self._connection.server()
        await server.send(self._request.raw)
        if self._request.body_bytes == 0:
            return await self._answer(server, await self._read_final_head(server))
        reading = asyncio.create_task(self._read_final_head(server))
        try:
            return await self._upload(server, reading)
        finally:
            await _end(reading)

    async def _upload(self, server: _Wire, reading: asyncio.Task[_Head]) -> _Ending:
        """Relays the body while `reading` waits for the reply, which may come before the body's end."""
        if self._expects_continue and not await self._told_to_continue(reading):
            await self._answer(server, await reading)
            return _Ending.FINISH
        relay = _Relay(self._client, server, self._counted_request)
        sending = asyncio.create_task(relay.body(self._request.body_bytes))
        try:
            await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await self._sent(sending, reading)
            ending = await self._answer(server, await reading)
            if ending is _Ending.KEEP:
                await asyncio.wait({sending}, timeout=_LINGER_SECONDS)
                if not sending.done() or sending.exception() is not None:
                    # Answered before the body was read, as servers do with requests that they refuse.
                    return _Ending.FINISH
            return ending
        finally:
            await _end(sending)

    async def _sent(self, sending: asyncio.Task[None], reading: asyncio.Task[_Head]) -> None:
        try:
            await sending
        except _Gone as gone:
            # Where the server reads no further, what it has to say about that is on its way, if anything.
            if gone.wire is not self._client:
                await asyncio.wait({reading}, timeout=_LINGER_SECONDS)
            if not reading.done():
                raise

    async def _told_to_continue(self, reading: asyncio.Task[_Head]) -> bool:
        """Tells the client to send its body, unless the server has answered without it."""
        waiting = asyncio.create_task(self._may_continue.wait())
        try:
            await asyncio.wait({reading, waiting}, timeout=_CONTINUE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(waiting)
        if reading.done():
            return False
        await self._client.send(_CONTINUE)
        return True

    async def _read_final_head(self, server: _Wire) -> _Head:
        while True:
            head = _parse_head(await server.read_until(b"\r\n\r\n"), _UNTIL_CLOSE)
            if head.status >= 200:
                return head
            self._may_continue.set()

    # Faults that the server never hears of.

    async def _answer_error(self, fault: Fault) -> _Ending:
        self._note(fault)
        # A client that expects 100 Continue and gets this instead may send the body or not.
        keep_alive = self._request.keeps_alive(self._request.start[2]) and not self._expects_continue
        if not self._expects_continue:
            await _Relay(self._client, None, self._proxy._count_dropped_bytes).body(self._request.body_bytes)
        status, code, message = _ERRORS[fault.kind]
        request_id = f"FAULT{self._number:011d}"
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
            f"<RequestId>{request_id}</RequestId></Error>"
        ).encode()
        lines = (
            f"HTTP/1.1 {status}",
            "Content-Type: application/xml",
            f"x-amz-request-id: {request_id}",
            f"Content-Length: {len(body)}",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
        )
        head = "".join(f"{line}\r\n" for line in (*lines, "")).encode()
        await self._client.send(head if self._request.start[0] == "HEAD" else head + body)
        return _Ending.KEEP if keep_alive else _Ending.FINISH

    async def _reset_in_request(self, fault: Fault) -> _Ending:
        if self._expects_continue:
            await self._client.send(_CONTINUE)
        relay = _Relay(self._client, None, self._proxy._count_dropped_bytes)
        await relay.part(self._request.body_bytes, fault.fraction)
        self._note(fault)
        return _Ending.RESET

    # The response, and the faults that come after the server has done what it was asked.

    async def _answer(self, server: _Wire, reply: _Head) -> _Ending:
        bodiless = self._request.start[0] == "HEAD" or reply.status in (204, 304)
        body_bytes = 0 if bodiless else reply.body_bytes
        fault = self._fault
        if fault is not None and fault.kind in ("lost_reply", "lost_complete_reply"):
            # Read to the end: some servers answer while they are still at work.
            await _Relay(server, None, lambda _: None).body(body_bytes)
            self._note(fault)
            return _Ending.FINISH
        # A body that ends with the connection can't be cut so that a client could tell.
        if fault is not None and fault.kind in ("reset_mid_body", "truncate_body") and _can_be_cut(body_bytes):
            return await self._cut(server, reply, body_bytes, fault)
        relay = _Relay(server, self._client, self._counted_response)
        if fault is not None and fault.kind == "slow" and fault.trickle and body_bytes != 0:
            await self._client.send(reply.raw)
            await relay.trickle(body_bytes, fault.delay_seconds)
        else:
            if fault is not None and fault.kind == "slow" and fault.trickle:
                await asyncio.sleep(fault.delay_seconds)
            await self._client.send(reply.raw)
            await relay.body(body_bytes)
        keep_alive = (
            self._request.keeps_alive(self._request.start[2])
            and reply.keeps_alive(reply.start[0])
            and body_bytes != _UNTIL_CLOSE
        )
        return _Ending.KEEP if keep_alive else _Ending.FINISH

    async def _cut(self, server: _Wire, reply: _Head, body_bytes: int, fault: Fault) -> _Ending:
        await self._client.send(reply.raw)
        await _Relay(server, self._client, self._counted_response).part(body_bytes, fault.fraction)
        self._note(fault)
        if fault.kind == "truncate_body":
            return _Ending.FINISH
        await asyncio.sleep(_BEFORE_RESET_SECONDS)
        return _Ending.RESET

    def _counted_request(self, count: int) -> None:
        self._proxy._count_request_bytes(self._operation, count)

    def _counted_response(self, count: int) -> None:
        self._proxy._count_response_bytes(self._operation, count)

    def _note(self, fault: Fault) -> None:
        self._proxy._injected(self._number, fault, self._request, self._operation)


def _can_be_cut(body_bytes: int) -> bool:
    return body_bytes > 0 or body_bytes == _CHUNKED


async def _end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancels what still runs, and looks at the outcome so that asyncio doesn't report it."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


# ---- The program ----


def _write_stats(proxy: FaultProxy, path: Path) -> None:
    """Replaces the file, so that who reads it never sees half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(proxy.stats().as_dict(), indent=1))
    os.replace(unfinished, path)


def _one_rate(text: str) -> tuple[str, float]:
    kind, _, rate = text.partition("=")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{kind!r} is no kind of fault; there are {', '.join(KINDS)}")
    return kind, float(rate)


def main(arguments: list[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT. The first line of standard output is the URL."""
    parser = argparse.ArgumentParser(description="A proxy before an S3 server that injects faults and counts bytes.")
    parser.add_argument("--target", required=True, help="the server, http://HOST:PORT")
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0 takes a free one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="of all requests that suffer; see FaultRates.spread")
    parser.add_argument("--set", type=_one_rate, action="append", default=[], metavar="KIND=RATE", dest="single")
    parser.add_argument("--slow-seconds", type=float, nargs=2, default=(0.1, 2.0), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--max-consecutive", type=int, default=3, help="faults in a row for one and the same request")
    parser.add_argument("--stats", type=Path, help="JSON file for the counters, written every second and at the end")
    options = parser.parse_args(arguments)
    try:
        rates = FaultRates.spread(options.rate, slow_seconds=tuple(options.slow_seconds), **dict(options.single))
    except ValueError as error:
        parser.error(str(error))

    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_end.set())
    proxy = FaultProxy(
        options.target, options.seed, rates, max_consecutive=options.max_consecutive, port=options.port
    ).start()
    print(proxy.url, flush=True)
    try:
        while not asked_to_end.wait(1.0):
            if options.stats:
                _write_stats(proxy, options.stats)
    finally:
        proxy.stop()
        if options.stats:
            _write_stats(proxy, options.stats)


if __name__ == "__main__":
    main()
