"""What is tried again, how often, how fast; and that every call ends."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from raymoe._version import __version__
from raymoe.object_store.errors import ObjectChanged, StorageError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import MIN_PART_BYTES
from raymoe.object_store.retry import Failure, FailureKind, Pacer, Retries, classify_error
from raymoe.object_store.s3_store import S3Store
from raymoe.object_store.urls import join_url
from tests.object_store.canned import Answer, canned
from tests.object_store.fault_proxy import KINDS, FaultProxy, FaultRates
from tests.object_store.servers import Server, environment

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "x" * 40, "AWS_REGION": "us-east-1"}
DATA = os.urandom(500_000)


@pytest.fixture
def keys() -> Iterator[None]:
    with environment(KEYS):
        yield


def store_at(url: str, **options: float) -> S3Store:
    return S3Store(StorageOptions(endpoint=url, **{"deadline_s": 20, "read_timeout_s": 2, **options}))  # type: ignore[arg-type]


# --- against servers, with faults between


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_overcome(server: Server, bucket: str, kind: str) -> None:
    rate = 0.9 if kind == "lost_complete_reply" else 0.4  # of which there is one request
    rates = FaultRates(**{kind: rate, "slow_seconds": (0.0, 0.3)})
    with FaultProxy(server.endpoint, seed=5, rates=rates, max_consecutive=2) as proxy:
        # Connections would wait 20 s for a body that ends early and stays open.
        store = S3Store(StorageOptions(endpoint=proxy.url, deadline_s=60, read_timeout_s=5))
        work(store, bucket)
        assert proxy.stats().faults[kind] > 0
        # aiohttp itself repeats a request whose connection was kept open and is closed.
        unseen = kind in ("slow", "reset_before", "reset_request_body")
        assert unseen or store.counters.retries > 0
    clean = S3Store(StorageOptions(endpoint=server.endpoint))
    # Only the reply to a create can't be made good: such uploads are found and aborted.
    left = [upload.url for upload in clean.list_uploads(bucket)]
    assert left == [] or kind in ("lost_reply", "reset_mid_body", "truncate_body")


def work(store: S3Store, bucket: str) -> None:
    """All calls, each with its outcome checked."""
    source, small, big = (join_url(bucket, name) for name in ("in/source", "out/index", "out/shard"))
    data = os.urandom(MIN_PART_BYTES + 1000)
    etag = store.put(source, data).etag
    assert store.put(small, DATA, only_if_absent=True).size == len(DATA)
    upload = store.create_upload(big, {"raymoe-run": "r"})
    parts = [
        store.upload_part(big, upload, 1, data),
        store.copy_part(big, upload, 2, source, 7, 7 + MIN_PART_BYTES, etag),
        store.upload_part(big, upload, 3, DATA),
    ]
    assert list(store.list_parts(big, upload)) == parts
    info = store.complete_upload(big, upload, parts, metadata={"raymoe-run": "r"})
    expected = data + data[7 : 7 + MIN_PART_BYTES] + DATA
    assert store.read_all(big) == expected
    for start in range(0, len(expected), 2_000_000):
        end = min(start + 2_000_000, len(expected))
        assert store.read(big, start, end, info.etag) == expected[start:end]
    assert [entry.name for entry in store.list(join_url(bucket, "out"))] == ["index", "shard"]
    dropped = store.create_upload(join_url(bucket, "dropped"))
    store.abort_upload(join_url(bucket, "dropped"), dropped)
    store.delete(source)
    assert store.stat(source) is None


def test_a_dead_server_is_given_up_at_the_deadline(server: Server, bucket: str) -> None:
    url = join_url(bucket, "object")
    with FaultProxy(server.endpoint) as proxy:
        S3Store(StorageOptions(endpoint=proxy.url, deadline_s=30)).put(url, DATA)
        store = S3Store(StorageOptions(endpoint=proxy.url, deadline_s=3))
        store.stat(url)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"can't be reached"):
        store.read_all(url)
    assert 1 < time.monotonic() - began < 20
    assert store.counters.retries > 2


def test_an_endpoint_that_never_answered_is_given_up_early(keys: None) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"http://127.0.0.1:9 can't be reached"):
        store_at("http://127.0.0.1:9", deadline_s=600).stat("s3://bucket/key")
    assert time.monotonic() - began < 60


# --- against canned answers

PASSING = [(500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable"), (429, "TooManyRequests")]
PASSING += [(502, ""), (504, ""), (400, "RequestTimeout"), (409, "OperationAborted"), (400, "BadDigest")]
LASTING = [(403, "AccessDenied"), (404, "NoSuchBucket"), (400, "ExpiredToken"), (403, "InvalidAccessKeyId")]
LASTING += [(403, "SignatureDoesNotMatch"), (412, "PreconditionFailed"), (403, "RequestTimeTooSkewed")]
LASTING += [(400, "InvalidArgument"), (501, "NotImplemented"), (400, "EntityTooLarge")]


@pytest.mark.parametrize(("status", "code"), PASSING)
@pytest.mark.s3
def test_what_passes_is_tried_again(keys: None, status: int, code: str) -> None:
    with canned(Answer(status, code=code), Answer(status, code=code), Answer(200, body=DATA)) as server:
        store = store_at(server.url)
        assert store.read_all("s3://bucket/key") == DATA
        assert len(server.requests) == 3
        assert store.counters.retries == 2
        assert store.counters.throttled == (2 if status in (429, 503) else 0)


@pytest.mark.parametrize(("status", "code"), LASTING)
@pytest.mark.s3
def test_what_lasts_is_not(keys: None, status: int, code: str) -> None:
    with canned(Answer(status, code=code)) as server:
        store = store_at(server.url)
        with pytest.raises(StorageError):
            store.read_all("s3://bucket/key")
        assert len(server.requests) == 1
        assert store.counters.retries == 0
        assert {agent.split(" ")[0] for agent in server.agents} == {f"raymoe/{__version__}"}


@pytest.mark.s3
def test_short_and_wrong_bodies_are_tried_again(keys: None) -> None:
    whole = Answer(206, body=DATA, headers={"Content-Range": f"bytes 10-{9 + len(DATA)}/9000000"})
    cut = Answer(206, body=DATA[:-1], headers=whole.headers, length=len(DATA))
    shorter = Answer(206, body=DATA[:-1], headers=whole.headers)
    longer = Answer(206, body=DATA + b"x", headers=whole.headers)
    elsewhere = Answer(206, body=DATA, headers={"Content-Range": f"bytes 0-{len(DATA) - 1}/9000000"})
    ignored = Answer(200, body=DATA)
    with canned(cut, shorter, longer, elsewhere, ignored, whole) as server:
        store = store_at(server.url)
        assert store.read("s3://bucket/key", 10, 10 + len(DATA)) == DATA
        assert store.counters.retries == 5


@pytest.mark.s3
def test_a_replaced_object_is_noticed_where_the_server_does_not_look(keys: None) -> None:
    """A server may ignore the condition that an object is still the same; its answer tells."""
    headers = {"ETag": '"another"', "Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}
    with canned(Answer(206, body=DATA, headers=headers)) as server:
        assert store_at(server.url).read("s3://bucket/key", 0, len(DATA), "another") == DATA
        with pytest.raises(ObjectChanged, match="its ETag is another"):
            store_at(server.url).read("s3://bucket/key", 0, len(DATA), "planned")


@pytest.mark.s3
def test_uploads_that_arrive_damaged_are_tried_again(keys: None) -> None:
    right = hashlib.md5(DATA).hexdigest()
    with canned(
        Answer(200, headers={"ETag": '"' + "0" * 32 + '"'}), Answer(200, headers={"ETag": f'"{right}"'})
    ) as server:
        store = store_at(server.url)
        assert store.upload_part("s3://bucket/key", "id", 1, DATA).etag == right
        assert store.counters.retries == 1
    # An ETag of a key of KMS, or of a kind of its own, says nothing.
    headers = {"ETag": '"' + "0" * 32 + '"', "x-amz-server-side-encryption": "aws:kms"}
    for answer in (Answer(200, headers=headers), Answer(200, headers={"ETag": '"0x8D4BCC2E4835CD0"'})):
        with canned(answer) as server:
            assert store_at(server.url).put("s3://bucket/key", DATA).size == len(DATA)


@pytest.mark.s3
def test_damage_that_stays_is_an_error(keys: None) -> None:
    wrong = Answer(200, headers={"ETag": '"' + "0" * 32 + '"'})
    with canned(wrong) as server, pytest.raises(StorageError, match="the store reports other bytes"):
        store_at(server.url, deadline_s=3).upload_part("s3://bucket/key", "id", 1, DATA)


@pytest.mark.s3
def test_an_error_in_an_answer_of_200_is_an_error(keys: None) -> None:
    """S3 keeps connections of long copies alive by answering 200 first."""
    failed = Answer(200, body=Answer(0, code="InternalError").content(bodiless=False))
    done = Answer(200, body=b"<CopyPartResult><ETag>&quot;abc&quot;</ETag></CopyPartResult>")
    with canned(failed, done) as server:
        store = store_at(server.url)
        assert store.copy_part("s3://bucket/key", "id", 1, "s3://bucket/source", 0, 100, "e").etag == "abc"
        assert store.counters.retries == 1


@pytest.mark.s3
def test_a_server_that_does_not_delete_many_at_once(keys: None) -> None:
    """It is asked once for that, and then for one object at a time."""
    urls = [f"s3://bucket/{number}" for number in range(3)]
    with canned(Answer(501, code="NotImplemented"), Answer(204)) as server:
        store = store_at(server.url)
        for _ in range(2):
            store.delete_all(urls)
        assert [method for method, _ in server.requests] == ["POST", *["DELETE"] * 6]


@pytest.mark.s3
def test_an_object_that_is_not_deleted_with_others_is_deleted_alone(keys: None) -> None:
    failed = b"<DeleteResult><Error><Key>1</Key><Code>InternalError</Code><Message>m</Message></Error></DeleteResult>"
    with canned(Answer(200, body=failed), Answer(204)) as server:
        store_at(server.url).delete_all([f"s3://bucket/{number}" for number in range(3)])
        assert [(method, path.partition("?")[0]) for method, path in server.requests] == [
            ("POST", "/bucket"),
            ("DELETE", "/bucket/1"),
        ]


@pytest.mark.s3
def test_a_silent_server_is_given_up(keys: None) -> None:
    with canned(Answer(200, body=DATA, seconds=30)) as server:
        began = time.monotonic()
        with pytest.raises(StorageError, match="gave up after"):
            store_at(server.url, read_timeout_s=0.5, deadline_s=2).read_all("s3://bucket/key")
        assert time.monotonic() - began < 20
        # Also where single reads may take longer than the whole call.
        with pytest.raises(StorageError, match="gave up after"):
            store_at(server.url, read_timeout_s=60, deadline_s=1).read_all("s3://bucket/key")
        assert time.monotonic() - began < 25


@pytest.mark.s3
def test_retry_after_is_respected(keys: None) -> None:
    with canned(Answer(503, code="SlowDown", headers={"Retry-After": "2"}), Answer(200, body=DATA)) as server:
        began = time.monotonic()
        store_at(server.url).read_all("s3://bucket/key")
        assert time.monotonic() - began >= 2


@pytest.mark.s3
def test_requests_at_once_are_bounded(keys: None) -> None:
    with canned(Answer(200, body=DATA, seconds=0.05)) as server:
        store = store_at(server.url, max_requests=3)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(store.read_all, ["s3://bucket/key"] * 24))
        assert 1 < server.most_at_once <= 3


# --- pacing


def test_the_pacer_halves_once_a_wave_and_recovers() -> None:
    pacer = Pacer(16)
    started = time.monotonic()
    for _ in range(16):
        pacer.throttled(started)
    assert pacer.slots == 8
    for expected in (4, 2, 1, 1):
        pacer.throttled(time.monotonic())
        assert pacer.slots == expected
    for _ in range(200):
        pacer.succeeded(1.0)
    assert pacer.slots == 16


@pytest.mark.parametrize(("later_s", "slots"), [(1.0, 32), (1.1, 32), (2.0, 16)])
def test_the_pacer_grows_while_requests_take_no_longer(later_s: float, slots: int) -> None:
    """A server that never says 'slow down' may still have enough to do."""
    pacer = Pacer(16, most=32)
    for _ in range(16):
        pacer.succeeded(1.0)
    assert pacer.slots == 16
    for _ in range(1000):
        pacer.succeeded(later_s)
    assert slots <= pacer.slots <= slots + 1
    for _ in range(1000):
        pacer.succeeded(1.0)
    assert pacer.slots == 32


def test_the_pacer_bounds_and_times_out() -> None:
    pacer, held, release = Pacer(2), threading.Semaphore(0), threading.Event()

    def hold() -> None:
        with pacer.slot(60):
            held.release()
            release.wait(60)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
        held.acquire(timeout=60)
    with pytest.raises(TimeoutError, match="no request slot"), pacer.slot(0.05):
        pass
    release.set()
    for thread in threads:
        thread.join(60)
    with pacer.slot(60):
        pass


class Clock:
    """Time that passes only while something sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_retries_wait_longer_and_longer_and_stop_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(), []
    monkeypatch.setattr("raymoe.object_store.retry.time", clock)

    def fail(_: float) -> None:
        times.append(clock.now)
        raise ConnectionResetError

    outcome = Retries(4, 3.0).run(fail)
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.TRANSIENT
    assert outcome.tries == len(times)
    assert outcome.elapsed_s < 3
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert 3 <= len(waits) <= 6
    assert waits[-1] > waits[0] * 2


@pytest.mark.parametrize("is_in_time", [True, False])
def test_what_is_asked_before_a_retry_ends_the_call(monkeypatch: pytest.MonkeyPatch, is_in_time: bool) -> None:
    """By an error of its own; and if it takes long, the call's own error is the result."""
    clock, tries, asked = Clock(), list[float](), list[float]()
    monkeypatch.setattr("raymoe.object_store.retry.time", clock)

    def fail(_: float) -> None:
        tries.append(clock.now)
        raise ConnectionResetError

    def ask() -> None:
        asked.append(clock.now)
        if len(asked) == 2 and is_in_time:
            raise ValueError("of no use any more")
        clock.now += 0 if is_in_time else 900

    retries = Retries(4, 900.0)
    if is_in_time:
        with pytest.raises(ValueError, match="of no use any more"):
            retries.run(fail, before_retry=ask)
        assert len(tries) == len(asked) == 2
    else:
        outcome = retries.run(fail, before_retry=ask)
        assert isinstance(outcome, Failure) and isinstance(outcome.error, ConnectionResetError)
        assert len(tries) == len(asked) == 1


def test_what_is_not_an_exception_passes_through() -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    retries = Retries(1, 10)
    for _ in range(2):  # the slot is given back
        with pytest.raises(KeyboardInterrupt):
            retries.run(interrupt)


def test_kinds_of_errors() -> None:
    import asyncio

    import aiohttp
    from botocore import exceptions

    passing = [ConnectionResetError(), BrokenPipeError(), TimeoutError(), asyncio.TimeoutError()]
    passing += [aiohttp.ClientPayloadError(), aiohttp.ServerDisconnectedError(), asyncio.IncompleteReadError(b"", 1)]
    passing += [exceptions.ReadTimeoutError(endpoint_url=""), exceptions.EndpointConnectionError(endpoint_url="")]
    assert [classify_error(error) for error in passing] == [FailureKind.TRANSIENT] * len(passing)
    lasting = [PermissionError(), FileNotFoundError(), ValueError(), exceptions.NoCredentialsError()]
    lasting += [exceptions.SSLError(endpoint_url="", error="")]
    assert [classify_error(error) for error in lasting] == [FailureKind.PERMANENT] * len(lasting)


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [
        (FailureKind.THROTTLED, (429, 503)),
        (FailureKind.TRANSIENT, (408, 500, 502, 504)),
        (FailureKind.PERMANENT, (301, 400, 403, 404, 412, 416, 501)),
    ],
)
def test_kinds_of_answers_without_a_code(kind: FailureKind, statuses: tuple[int, ...]) -> None:
    """As proxies and load balancers give them."""

    class Answered(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    assert {status: classify_error(Answered(status)) for status in statuses} == dict.fromkeys(statuses, kind)
