"""A request body that aiohttp can send any number of times, in pieces, without copying it as a whole."""

from __future__ import annotations

from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

_PIECE_BYTES = 1 << 18


class SentBody(Payload):
    """Bytes in memory."""

    _value: memoryview

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        self._size = data.nbytes

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for start in range(0, self._value.nbytes, _PIECE_BYTES):
            await writer.write(self._value[start : start + _PIECE_BYTES])
