"""Checks an S3 server's replies before a call counts as done; computes ETags.

Replies are botocore's mappings. retry.py decides about the exceptions: a ShortRead is retried, a Mismatch is permanent.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from raymoe.object_store.protocol import ObjectInfo, UploadedPart
from raymoe.object_store.retry import Mismatch, ShortRead

S3Response = Mapping[str, Any]

_CHUNK_BYTES = 1 << 18
_HEX_DIGITS = frozenset("0123456789abcdef")


async def read_body(response: S3Response, buffer: memoryview) -> None:
    """Fill the buffer exactly. Raises ShortRead."""
    body, done = response["Body"], 0
    try:
        async for chunk in body.iter_chunks(_CHUNK_BYTES):
            if done + len(chunk) > len(buffer):
                raise ShortRead(f"the store sent more than the {len(buffer)} bytes asked for")
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
    finally:
        body.close()
    if done < len(buffer):
        raise ShortRead(f"the store sent {done} bytes, but {len(buffer)} were requested")


def check_response(response: S3Response, start: int, end: int, etag: str | None) -> None:
    """Raise if the body that follows is not the requested range."""
    try:
        if etag is not None and unquote_etag(response.get("ETag")) != etag:
            raise Mismatch("its ETag is another")
        content_range = response.get("ContentRange")
        if content_range is None:  # a server without range support
            if start != 0 or response["ContentLength"] != end:
                raise ShortRead("the store ignores the range asked for")
            return
        sent, _, total = content_range.removeprefix("bytes ").partition("/")
        if total.isdigit() and int(total) < end:
            raise Mismatch(f"it has {total} bytes, and at least {end} were expected")
        if sent != f"{start}-{end - 1}":
            raise ShortRead(f"the store sent bytes {sent}, but {start}-{end - 1} were requested")
    except Exception:
        response["Body"].close()
        raise


def upload_check(data: bytes | bytearray) -> tuple[Callable[[S3Response], Awaitable[S3Response]], str]:
    """The function that checks the reply to an upload of `data`, and the Content-MD5 to send with it."""
    digest = hashlib.md5(data, usedforsecurity=False)

    async def check(response: S3Response) -> S3Response:
        etag = str(unquote_etag(response.get("ETag")))
        encrypted = "kms" in response.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in response
        if not encrypted and is_md5(etag) and etag != digest.hexdigest():
            raise ShortRead(f"the store reports other bytes (MD5 {etag}) than were sent ({digest.hexdigest()})")
        return response

    return check, base64.b64encode(digest.digest()).decode()


def matches_parts(info: ObjectInfo, parts: Sequence[UploadedPart], metadata: Mapping[str, str] | None) -> bool:
    """Whether an object is the result of an upload of these parts, begun with this metadata.

    Where ETags are S3's, the object's ETag shows it. With KMS keys, or in stores with their own ETags, size and
    metadata have to be enough. Some stores keep no metadata (the JuiceFS gateway).
    """
    if info.size != sum(part.size for part in parts):
        return False
    known = dict(metadata or {})
    made_for_us = bool(known) and all(info.metadata.get(name.lower()) == value for name, value in known.items())
    return made_for_us or (info.etag is not None and info.etag == multipart_etag(parts))


def multipart_etag(parts: Sequence[UploadedPart]) -> str | None:
    """S3's ETag for an object made of these parts, unless they are encrypted with a KMS key."""
    if not all(is_md5(part.etag) for part in parts):
        return None
    joined = b"".join(bytes.fromhex(part.etag) for part in parts)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"


def is_md5(etag: str) -> bool:
    return len(etag) == 32 and set(etag) <= _HEX_DIGITS


def unquote_etag(etag: str | None) -> str | None:
    return etag.strip('"') if etag else None


def quote_etag(etag: str) -> str:
    return f'"{etag}"'
