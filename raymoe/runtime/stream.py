"""A shard's way from the node that has its sources to the node that has the output, where these are two.

    sender, an expert actor                     receiver, the writer beside the output (writer.py)
    shard_chunks -> pieces_of --Ray's store--> arrivals -> LocalOutput.write: part, checksum, fsync, rename, journal

The receiver pulls. The sender stands still while `PIECES_AHEAD` pieces wait to be taken, so that neither side holds
more than a few pieces a shard, however large it is. Pieces are numpy arrays: Ray copies each into its store once, and
the receiver reads it there in place. Everything that is computed (casts, LoRA, noise) is computed by the sender.
Whichever side dies, the half-written part goes, and the shard is done again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.storage.output import ShardJob
from raymoe.storage.reader import CHUNK_BYTES, LOCAL_CHUNK_BYTES

__all__ = ["PIECES_AHEAD", "PIECE_BYTES", "SenderLost", "arrivals", "pieces_of"]

PIECE_BYTES = CHUNK_BYTES
PIECES_AHEAD = 4  # of a shard: made, and not yet taken by the receiver
_TAKEN_AHEAD = 2  # taken by the receiver, and on their way to its node while one before them is written


class SenderLost(Exception):
    """The actor that sent a shard died, or its node did; the receiver is well."""


def pieces_of(chunks: Iterable[memoryview], size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """A stream of `size` bytes in pieces of `PIECE_BYTES`. A piece is valid until the next one is asked for."""
    buffer = np.empty(min(PIECE_BYTES, size), np.uint8)
    filled = 0
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            count = min(len(chunk) - at, len(buffer) - filled)
            buffer[filled : filled + count] = np.frombuffer(chunk, np.uint8, count, at)
            at, filled = at + count, filled + count
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def arrivals(sender: Any, job: ShardJob) -> Iterator[memoryview]:
    """The bytes of a shard as `sender` sends them, in chunks that stay in the processor's cache while they are written.

    Raises what went wrong at the sender, or SenderLost.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    stream = sender.send_shard.options(name=f"send {job.shard.file_name}").remote(job)
    try:
        for reference in _taken_ahead(stream):
            piece = memoryview(ray.get(reference))
            for start in range(0, len(piece), LOCAL_CHUNK_BYTES):
                yield piece[start : start + LOCAL_CHUNK_BYTES]
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, (RaymoeError, RayError)):  # the latter where the store is full, say
            raise cause from None
        raise MergeFailed(f"{job.shard.file_name}: {type(cause).__name__}: {cause}") from error
    except RayError as error:
        raise SenderLost(str(error).splitlines()[0]) from error
    finally:
        # Ray ends a sender that stands still when it is told so; one whose stream is just dropped would run to its end.
        ray.cancel(stream)


def _taken_ahead(stream: Any) -> Iterator[Any]:
    """The references of a stream in order; those that come next are being fetched to this node meanwhile."""
    import ray

    taken: deque[Any] = deque()
    for reference in stream:
        ray.wait([reference], timeout=0, fetch_local=True)
        taken.append(reference)
        if len(taken) > _TAKEN_AHEAD:
            yield taken.popleft()
    while taken:
        yield taken.popleft()
