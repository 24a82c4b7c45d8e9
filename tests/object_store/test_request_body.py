"""The body of a request is sent whole, also when aiohttp sends it a second time by itself."""

from __future__ import annotations

import asyncio

import pytest

from raymoe.object_store.options import StorageOptions
from raymoe.object_store.request_body import SentBody
from raymoe.object_store.s3_store import S3Store
from tests.object_store.fault_proxy import FaultProxy, FaultRates
from tests.object_store.servers import Server


class Writer:
    """Keeps what a body writes."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    async def write(self, piece: memoryview) -> None:
        self.pieces.append(bytes(piece))


@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 19) + 7])
def test_each_time_from_its_beginning(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    body = SentBody(memoryview(data)[:size])
    assert body.size == size
    for _ in range(2):
        writer = Writer()
        asyncio.run(body.write(writer))  # type: ignore[arg-type]
        assert b"".join(writer.pieces) == data[:size]
        assert all(len(piece) <= 1 << 18 for piece in writer.pieces)


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_replies_that_are_lost_cost_no_timeout(server: Server, bucket: str) -> None:
    """Some versions of aiohttp send no body the second time: the store waits for it, and the client for the answer."""
    with FaultProxy(server.endpoint, 1, FaultRates(lost_reply=0.3)) as proxy:
        store = S3Store(StorageOptions(endpoint=proxy.url, read_timeout_s=300, deadline_s=100))
        for number in range(40):
            store.put(f"{bucket}/{number}.json", b"x" * 300)
        assert proxy.stats().faults["lost_reply"] > 5
