"""Reads ranges of source files on this node, wherever they are stored.

A `SourceReader` serves several threads. Files on this node (Hub files are first fetched into the Hub's cache) stay open
between reads, a limited number at once (see open_files.py). Objects are read in place by range requests, several at
once. Read methods:

    chunks      a long range as a stream, for bytes that are passed on; of an object, the next chunks are read ahead
    read_into   a range into the caller's buffer
    scattered   many short ranges, joined where they lie close together
    view        a whole tensor that is computed with

Nothing is memory-mapped: if a mapped file is truncated while it is read, SIGBUS ends the process without a message.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from raymoe.errors import CheckpointError, Problem
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.sources.bucket_folder import as_checkpoint_errors
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.hub import HubOptions, parse_location, partial_downloads
from raymoe.sources.local_folder import open_file, unreadable
from raymoe.sources.resolve import fetch_file
from raymoe.storage.open_files import OpenFiles
from raymoe.storage.read_cache import SHARDS, ReadCache
from raymoe.storage.value_checks import WeightFindings

CHUNK_BYTES = 8 << 20
# A chunk of a local file stays in the processor's cache between reading, checksum and writing: four times as fast as a
# chunk of 8 MiB (see file_writer.py).
LOCAL_CHUNK_BYTES = 256 << 10
_CHUNKS_AHEAD = 3
_REQUESTS_AT_ONCE = 8
# Ranges of an object that are closer than this become one request: reading the gap costs less than a round trip.
_JOIN_BYTES = 128 << 10
_JOINED_BYTES = 64 << 20
# Cache for tensors that were viewed one by one: enough for the LoRA factors of the tensors in progress.
_KEPT_BYTES = 64 << 20
_DOWNLOAD_POLL_S = 5.0
_MAX_READ_BYTES = 64 << 20  # per call for local files, so that a large tensor on a slow disk shows progress

_T = TypeVar("_T")
Heartbeat = Callable[[], None]


class MergedMatrices(Protocol):
    """Matrices of the backbone that were merged before: `routers.regmean` computes them layer by layer."""

    def rows_of(self, layer: int, name: str) -> npt.NDArray[np.uint8]:
        """A merged matrix, as the bytes of its rows in the output's dtype: (rows, bytes of a row). `name` is that of
        the base's tensor."""


def run_ahead(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], _T]], most: int) -> Iterator[_T]:
    """The results of calls in their order. Up to `most` calls run ahead of the consumer."""
    under_way = deque[Future[_T]]()
    try:
        for call in calls:
            under_way.append(pool.submit(call))
            if len(under_way) == most:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for left in under_way:
            left.cancel()


class SourceReader:
    """Open source files of one process. Thread-safe. `close()` when done, or use it as a context manager."""

    def __init__(
        self,
        hub: HubOptions,
        storage: StorageOptions | None = None,
        *,
        read_cache: ReadCache | None = None,
        name: str = SHARDS,
        findings: WeightFindings | None = None,
        heartbeat: Heartbeat | None = None,
        matrices: MergedMatrices | None = None,
    ) -> None:
        """With a `read_cache`, where it is the reader `name`, shared object bytes are fetched once. `findings` collects
        problems in the weights that are read. `heartbeat` is called from any thread after each read. `matrices` are
        those of the backbone that are merged before they are read (`regmean`)."""
        self.matrices = matrices
        self.findings = findings or WeightFindings()
        self._hub, self._storage = hub, storage or StorageOptions()
        self._read_cache, self._name = read_cache, name
        self.heartbeat: Heartbeat = heartbeat or (lambda: None)
        self._lock = threading.Lock()
        self._files = OpenFiles(self._open)
        self._pool: ThreadPoolExecutor | None = None
        self._read_tensors: dict[TensorEntry, memoryview] = {}

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises CheckpointError if a file was written while it was read, unless an exception is already being
        raised."""
        try:
            if kind is None:
                self.check_unchanged()
        finally:
            self.close()

    def path(self, file: SourceFile) -> Path:
        """The file's path on this node. Raises CheckpointError if it is missing, or has changed size."""
        if (location := parse_location(file.location)) is None:
            return fetch_file(file, self._hub, self._storage)
        with _heartbeat_while_growing(partial(partial_downloads, location.repo, self._hub), self.heartbeat):
            return fetch_file(file, self._hub, self._storage)

    def open_descriptor(self, file: SourceFile) -> AbstractContextManager[int]:
        """A descriptor of a file on this node, valid in the context. Raises CheckpointError."""
        return self._files.use(file)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file on this node has been written since this reader opened it."""
        self._files.check()

    def read_into(self, file: SourceFile, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `start` on. Raises CheckpointError on a short read."""
        if file.kind.is_object:
            with as_checkpoint_errors():
                if self._read_cache is None:
                    self._fetch(file, start, buffer)
                else:
                    self._read_cache.read_into(self._name, file, start, buffer, partial(self._fetch, file))
        else:
            self._read_local(file, start, buffer)

    def chunks(self, file: SourceFile, start: int, end: int) -> Iterator[memoryview]:
        """Bytes [start, end) in order. A chunk is valid until the next one is requested."""
        if file.kind.is_object:
            yield from self._chunks_ahead(
                file, [(at, min(at + CHUNK_BYTES, end)) for at in range(start, end, CHUNK_BYTES)]
            )
            return
        buffer = memoryview(bytearray(min(LOCAL_CHUNK_BYTES, end - start)))
        for low in range(start, end, LOCAL_CHUNK_BYTES):
            chunk = buffer[: end - low]
            self._read_local(file, low, chunk)
            yield chunk

    def read_ranges(self, file: SourceFile, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of many short ranges, in the order given."""
        if not file.kind.is_object:
            return [self._read(file, start, end) for start, end in ranges]
        found = self._read_joined(file, ranges)
        return [found[span] for span in ranges]

    def load(self, entries: Sequence[TensorEntry]) -> None:
        """Prefetch tensors of objects that will be viewed, adjacent ones together; local ones are left to `view`."""
        remote = [entry for entry in entries if entry.file.kind.is_object and entry.nbytes]
        for file in dict.fromkeys(entry.file for entry in remote):
            members = [entry for entry in remote if entry.file == file]
            found = self._read_joined(file, [(entry.start, entry.end) for entry in members])
            with self._lock:
                self._read_tensors |= {entry: found[entry.start, entry.end] for entry in members}

    def view(self, entry: TensorEntry) -> memoryview:
        """The bytes of a tensor, in memory of its own. Small tensors are cached for the next call, since LoRA factors
        are requested once per block."""
        if entry.nbytes == 0:
            return memoryview(bytearray())
        content = self._read_tensors.get(entry)
        if content is None:
            if entry.file.kind.is_object:
                content = self._read_joined(entry.file, [(entry.start, entry.end)])[entry.start, entry.end]
            else:
                content = self._read(entry.file, entry.start, entry.end)
            self._keep(entry, content)
        return content

    def release(self) -> None:
        """Drop the cached tensors: memory is freed as soon as the last view is gone."""
        with self._lock:
            self._read_tensors.clear()

    def close(self) -> None:
        self.release()
        self._files.close()
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None

    def _open(self, file: SourceFile) -> int:
        return open_file(file, None if file.kind.is_local else self.path(file))

    def _keep(self, entry: TensorEntry, content: memoryview) -> None:
        """Cache a tensor, and drop the oldest ones: a shard may need more of them than fit in memory."""
        if len(content) > _KEPT_BYTES:
            return
        with self._lock:
            kept = sum(map(len, self._read_tensors.values())) + len(content)
            for oldest in list(self._read_tensors):
                if kept <= _KEPT_BYTES:
                    break
                kept -= len(self._read_tensors.pop(oldest))
            self._read_tensors[entry] = content

    def _fetch(self, file: SourceFile, start: int, buffer: memoryview) -> None:
        open_store(file.location, self._storage).read_into(file.location, start, buffer, file.etag)
        self.heartbeat()

    def _read(self, file: SourceFile, start: int, end: int) -> memoryview:
        buffer = memoryview(bytearray(end - start))
        self.read_into(file, start, buffer)
        return buffer

    def _read_local(self, file: SourceFile, start: int, buffer: memoryview) -> None:
        with self._files.use(file) as descriptor:
            done = 0
            while done < len(buffer):
                try:
                    count = os.preadv(descriptor, [buffer[done : done + _MAX_READ_BYTES]], start + done)
                except OSError as error:
                    raise unreadable(file, error) from error
                if count == 0:
                    what = f"ends at byte {start + done}, expected at least {start + len(buffer)}"
                    remedy = "the file changed while it was read; run the merge again"
                    raise CheckpointError([Problem(where=file.location, what=what, remedy=remedy)])
                done += count
                self.heartbeat()

    def _chunks_ahead(self, file: SourceFile, spans: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """Chunks of an object; a few requests run ahead of the consumer."""
        yield from run_ahead(self._requests(), (partial(self._read, file, *span) for span in spans), _CHUNKS_AHEAD)

    def _read_joined(self, file: SourceFile, ranges: Sequence[tuple[int, int]]) -> dict[tuple[int, int], memoryview]:
        """Ranges of an object: close ranges share one buffer, which several requests fill at once."""
        groups: list[list[tuple[int, int]]] = []
        for span in sorted(set(ranges)):
            if groups and span[0] - groups[-1][-1][1] <= _JOIN_BYTES and span[1] - groups[-1][0][0] <= _JOINED_BYTES:
                groups[-1].append(span)
            else:
                groups.append([span])
        found: dict[tuple[int, int], memoryview] = {}
        reads = []
        for group in groups:
            first = group[0][0]
            buffer = memoryview(bytearray(group[-1][1] - first))
            for at in range(0, len(buffer), CHUNK_BYTES):
                reads.append(self._requests().submit(self.read_into, file, first + at, buffer[at : at + CHUNK_BYTES]))
            found |= {(start, end): buffer[start - first : end - first] for start, end in group}
        for read in reads:
            read.result()
        return found

    def _requests(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="read")
            return self._pool


@contextmanager
def _heartbeat_while_growing(
    sizes: Callable[[], Mapping[str, tuple[int, int]]], heartbeat: Heartbeat
) -> Iterator[None]:
    """Call `heartbeat` at the start, and then every few seconds if one of the `sizes` has grown or a file is new.

    The downloading library reports no progress. It may also wait for the cache's lock, which a hanging process can
    hold, so elapsed time alone is no sign of progress.
    """
    stop, seen = threading.Event(), sizes()

    def tick() -> None:
        nonlocal seen
        while not stop.wait(_DOWNLOAD_POLL_S):
            now = sizes()
            if any(size > seen.get(name, (-1, -1)) for name, size in now.items()):
                heartbeat()
            seen = now

    heartbeat()
    thread = threading.Thread(target=tick, daemon=True, name="download-moves")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
