"""Sends requests to S3: one client per process, used from many threads.

    thread of the caller --run_coroutine_threadsafe--> fsspec's event loop --aiobotocore client--> endpoint

s3fs builds the client (profiles, endpoints, roles, shutdown at exit) and owns the event loop. Requests are sent through
the client itself, because s3fs adds behavior that must be controlled here (own retries, errors without codes, cached
listings). An `S3Client` may be kept across a fork: the child builds its own client.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from raymoe._version import __version__
from raymoe.object_store.error_messages import storage_error
from raymoe.object_store.errors import StoreRequest
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import BeforeRetry
from raymoe.object_store.retry import Failure, Pacer, Retries

_CONNECT_TIMEOUT_S = 10

_T = TypeVar("_T")
ResponseHandler = Callable[[Any], Awaitable[_T]]


class S3Client:
    """Sends requests, with retries and pacing. Thread-safe."""

    def __init__(self, options: StorageOptions):
        self.options = options
        self.retries = Retries(options.max_requests, options.deadline_s)
        self.copy_pacer = Pacer(*options.copy_slots)
        self._lock = threading.Lock()
        self._filesystem_cache: tuple[int, Any] | None = None  # (process id, S3FileSystem)

    def call(
        self,
        store_request: StoreRequest,
        handle: ResponseHandler[_T],
        *,
        before_retry: BeforeRetry | None = None,
        **arguments: Any,
    ) -> _T:
        """The result of one request. Raises StorageError, and what `before_retry` raises."""
        outcome = self.send(store_request, handle, before_retry=before_retry, **arguments)
        if isinstance(outcome, Failure):
            raise storage_error(outcome, store_request, self.options)
        return outcome

    def send(
        self,
        store_request: StoreRequest,
        handle: ResponseHandler[_T],
        *,
        before_retry: BeforeRetry | None = None,
        **arguments: Any,
    ) -> _T | Failure:
        """Send `store_request.operation` until it succeeds or fails permanently, or `before_retry` raises.

        `handle` makes the result from the reply, in the event loop; an exception from it counts as a failure of the
        request. Server-side copies, during which this process only waits, have their own slots.
        """

        def attempt(seconds: float) -> _T:
            filesystem = self._filesystem()
            request = _request(filesystem, store_request.operation, handle, arguments)
            future = asyncio.run_coroutine_threadsafe(request, filesystem.loop)
            try:
                return future.result(seconds)
            finally:
                future.cancel()  # no effect if it is done

        pacer = self.copy_pacer if store_request.operation == "upload_part_copy" else None
        return self.retries.run(attempt, pacer=pacer, before_retry=before_retry)

    def _filesystem(self) -> Any:
        with self._lock:
            if self._filesystem_cache is None or self._filesystem_cache[0] != os.getpid():
                self._filesystem_cache = (os.getpid(), _make_filesystem(self.options))
            return self._filesystem_cache[1]


def _make_filesystem(options: StorageOptions) -> Any:
    from s3fs import S3FileSystem

    region = options.region or os.environ.get("AWS_REGION")  # botocore knows only AWS_DEFAULT_REGION
    return S3FileSystem(
        anon=options.anonymous,
        endpoint_url=options.endpoint,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            # botocore's own text about its parts is made anew for every request, and took a tenth of a request's time.
            "user_agent": f"raymoe/{__version__}",
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": options.max_requests + options.copy_slots[1] + 4,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": options.read_timeout_s,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        **({"profile": options.profile} if options.profile else {}),
    )


async def _request(filesystem: Any, operation: str, handle: ResponseHandler[_T], arguments: Mapping[str, Any]) -> _T:
    client = await filesystem.set_session()
    client.meta.events.register_last("before-send.s3", _can_be_sent_again, unique_id="raymoe")
    return await handle(await getattr(client, operation)(**arguments))


def _can_be_sent_again(request: Any, **_: Any) -> None:
    """Give aiohttp a body that it can send twice.

    If a kept connection is lost before the reply, aiohttp sends a PUT again by itself. Some versions (tested: 3.12.15
    and 3.14.3) continue reading the body where the first attempt ended, and send nothing: then both sides wait until
    `read_timeout_s` is over.
    """
    if isinstance(request.body, io.BytesIO):
        from raymoe.object_store.request_body import SentBody

        request.body = SentBody(memoryview(request.body.getvalue()))  # without a copy
