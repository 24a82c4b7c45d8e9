"""Retry policy: which failures are transient, how long to back off, and how many requests to keep in flight.

    Retries.run(attempt) --> the result, or a Failure with the last error, which the caller explains

There is one `Retries` per store and process. Every attempt takes a slot of the pacer. A transient failure (5xx, a
reset, a timeout, a truncated body) is retried after a random time that grows from try to try, until the call's
deadline. A server that asks to slow down also halves the number of slots, which come back one by one as requests
succeed: additive increase, multiplicative decrease, as in TCP.

The client libraries' own retries are switched off, so that there is one policy, one deadline and one count.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from raymoe.object_store.protocol import StoreCounters

T = TypeVar("T")

_INITIAL_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 20.0
_MIN_ATTEMPT_S = 0.5  # less time is not enough for a reply: the error would be the short timeout itself
_SLOWER = 1.25  # if requests take this many times as long as at first, the server is at its limit
_THROTTLED_BACKOFF_S = 0.5  # the first wait after 'slow down'
_TRIES_AT_FIRST_CONTACT = 4  # an endpoint that never answered is more likely misspelt than overloaded

_THROTTLE_CODES = frozenset(
    {"SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "Throttling", "ThrottlingException"}
    | {"RequestLimitExceeded", "TooManyRequests", "BandwidthLimitExceeded", "RequestThrottled"}
)
# BadDigest and similar codes: the body was damaged in transfer.
_TRANSIENT_CODES = frozenset(
    {"InternalError", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody"}
    | {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
)
_TRANSIENT_STATUS = frozenset({408, 500, 502, 504})
_THROTTLE_STATUS = frozenset({429, 503})
# Names instead of classes: there are several HTTP libraries, and this module imports none. Base classes count too.
_TRANSIENT_ERRORS = frozenset(
    {"ClientPayloadError", "ClientConnectionError", "ServerDisconnectedError", "HttpProcessingError"}  # aiohttp
    | {"ConnectionClosedError", "ReadTimeoutError", "ConnectTimeoutError", "ResponseStreamingError"}  # botocore
    | {"EndpointConnectionError", "ProxyConnectionError", "ChecksumError", "ResponseParserError", "HTTPClientError"}
    | {"IncompleteRead", "IncompleteReadError", "TimeoutError", "ConnectionError"}
)
_PERMANENT_ERRORS = frozenset({"SSLError", "InvalidProxiesConfigError", "ClientSSLError", "InvalidURL"})
_CONNECT_ERRORS = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "HTTPClientError"}
    | {"ClientConnectorError", "ClientConnectorDNSError"}
)


class ShortRead(Exception):
    """Fewer bytes than requested or sent, or other ones."""


class Mismatch(Exception):
    """An object that is not the requested one: shorter, or with another ETag. Waiting does not help."""


class FailureKind(Enum):
    """What to do about a failure."""

    PERMANENT = "lasts"
    TRANSIENT = "passes"
    THROTTLED = "throttled"


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that was given up: after a permanent failure, or at its deadline."""

    error: Exception
    kind: FailureKind
    tries: int
    elapsed_s: float


def error_code(error: BaseException) -> str:
    """The code that an S3 server gave ('NoSuchKey'), or ''. For replies without a body, the code is the status."""
    return str(_error_response(error).get("Code", ""))


def error_status(error: BaseException) -> int | None:
    """The HTTP status of an error, if its class has one."""
    response = getattr(error, "response", None)
    meta = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    # The attribute's names in gcsfs, adlfs and aiohttp.
    for value in (meta.get("HTTPStatusCode"), getattr(error, "status", None), getattr(error, "code", None)):
        if str(value).isdigit():
            return int(str(value))
    return None


def classify_error(error: BaseException) -> FailureKind:
    """Whether waiting may help."""
    code, status = error_code(error), error_status(error)
    names = {cls.__name__ for cls in type(error).__mro__}
    if code in _THROTTLE_CODES or status in _THROTTLE_STATUS:
        return FailureKind.THROTTLED
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return FailureKind.TRANSIENT
    if status is not None or names & _PERMANENT_ERRORS:
        return FailureKind.PERMANENT
    is_transient = isinstance(error, ShortRead) or names & _TRANSIENT_ERRORS
    return FailureKind.TRANSIENT if is_transient else FailureKind.PERMANENT


class Pacer:
    """Slots for concurrent requests: `slots` at first, and up to `most` while requests take no longer than the first
    ones did. Thread-safe."""

    def __init__(self, slots: int, most: int | None = None):
        self._first, self._most, self._slots = float(slots), float(most or slots), float(slots)
        self._in_use, self._slowed_at = 0, 0.0
        self._successes, self._usual_s, self._recent_s = 0, 0.0, 0.0
        self._changed = threading.Condition()

    @property
    def slots(self) -> int:
        return max(1, int(self._slots))

    @contextmanager
    def slot(self, timeout_s: float) -> Iterator[None]:
        """Wait for a free slot and hold it. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._in_use < self.slots, timeout=timeout_s):
                raise TimeoutError(f"no request slot came free within {timeout_s:.0f} s")
            self._in_use += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_use -= 1
                self._changed.notify_all()

    def succeeded(self, seconds: float) -> None:
        """Report a request that took so long. After as many successes as there are slots, one slot is added."""
        with self._changed:
            self._note_time(seconds)
            limit = self._most if self._recent_s <= _SLOWER * self._usual_s else max(self._first, self._slots)
            self._slots = min(limit, self._slots + 1 / self._slots)
            self._changed.notify_all()

    def _note_time(self, seconds: float) -> None:
        """Note the duration of early and of current requests: a server may be overloaded without saying so."""
        self._successes += 1
        weight = max(1 / self._successes, 1 / self._first)
        self._recent_s += weight * (seconds - self._recent_s)
        if self._successes <= self._first:
            self._usual_s = self._recent_s

    def throttled(self, started_at: float) -> None:
        """Halve the slots: once for all requests that were in flight together."""
        with self._changed:
            if started_at > self._slowed_at:
                self._slots = max(1.0, self._slots / 2)
                self._slowed_at = time.monotonic()


class Retries:
    """Runs attempts until one succeeds, and counts. Thread-safe."""

    def __init__(self, max_requests: int, deadline_s: float):
        self.pacer = Pacer(max_requests)
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._hosts_reached: set[str] = set()  # hosts
        self._counts = StoreCounters()

    @property
    def counters(self) -> StoreCounters:
        """Totals so far."""
        with self._lock:
            return self._counts

    def count(self, **more: int) -> None:
        """Add to the counters of these names."""
        with self._lock:
            self._counts = replace(self._counts, **{k: getattr(self._counts, k) + n for k, n in more.items()})

    def run(
        self,
        attempt: Callable[[float], T],
        host: str = "",
        *,
        pacer: Pacer | None = None,
        before_retry: Callable[[], object] | None = None,
    ) -> T | Failure:
        """The first result of `attempt(seconds left)`. Other exceptions than Exception pass through.

        `host` is the server's name, if a store has several: one that never answered is given up soon. `pacer`: for
        requests that do not share the slots of the others. `before_retry` is called before every further attempt; what
        it raises ends the call.
        """
        pacer = pacer or self.pacer
        began, tries = time.monotonic(), 0
        while True:
            left = self._deadline_s - (time.monotonic() - began)
            tries += 1
            error = self._try(attempt, left, host, pacer, again=tries > 1)
            if not isinstance(error, _Error):
                return error
            kind = classify_error(error.error)
            if kind is not FailureKind.PERMANENT and host not in self._hosts_reached and _is_connect_error(error.error):
                kind = kind if tries < _TRIES_AT_FIRST_CONTACT else FailureKind.PERMANENT
            wait = _backoff_s(tries, kind, error.error)
            elapsed = time.monotonic() - began
            if kind is FailureKind.PERMANENT or elapsed + wait + _MIN_ATTEMPT_S >= self._deadline_s:
                return Failure(error.error, kind, tries, elapsed)
            time.sleep(wait)
            if before_retry is not None:
                before_retry()
                elapsed = time.monotonic() - began
                if elapsed + _MIN_ATTEMPT_S >= self._deadline_s:
                    return Failure(error.error, kind, tries, elapsed)

    def _try(self, attempt: Callable[[float], T], left: float, host: str, pacer: Pacer, *, again: bool) -> T | _Error:
        started = time.monotonic()
        try:
            with pacer.slot(left):
                self.count(requests=1, retries=int(again))
                started = time.monotonic()
                result = attempt(left)
        except Exception as error:
            if classify_error(error) is FailureKind.THROTTLED:
                pacer.throttled(started)
                self.count(throttled=1)
            if error_status(error) is not None:
                self._hosts_reached.add(host)
            # The error must not become the context of the final exception: errors of client libraries carry whole
            # replies, and a reply about an expired token carries the token.
            return _Error(error)
        pacer.succeeded(time.monotonic() - started)
        self._hosts_reached.add(host)
        return result


@dataclass(frozen=True, slots=True)
class _Error:
    """Marks an error among results."""

    error: Exception


def _is_connect_error(error: BaseException) -> bool:
    return bool({cls.__name__ for cls in type(error).__mro__[:1]} & _CONNECT_ERRORS)


def _backoff_s(tries: int, kind: FailureKind, error: BaseException) -> float:
    first = _THROTTLED_BACKOFF_S if kind is FailureKind.THROTTLED else _INITIAL_BACKOFF_S
    longest = min(_MAX_BACKOFF_S, first * 2 ** min(tries - 1, 20))
    # From half of the wait on: without a minimum the backoff would be useless, with equal waits all would retry at
    # once.
    return max(_retry_after_s(error), random.uniform(longest / 2, longest))


def _retry_after_s(error: BaseException) -> float:
    response = getattr(error, "response", None)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(response, dict) else {}
    value = str(headers.get("retry-after", ""))
    return min(float(value), 60.0) if value.isdigit() else 0.0


def _error_response(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)
    answer = response.get("Error") if isinstance(response, dict) else None
    return answer if isinstance(answer, dict) else {}
