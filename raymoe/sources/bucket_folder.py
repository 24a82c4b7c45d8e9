"""Reads models in object stores in place: planning lists a folder and reads small files and headers.

    s3://bucket/folder --list--> names, sizes, ETags    one request, one more for chat templates
    JSON files, headers --ranged GET, If-Match--> memory
    weights             --read_range--> the actors, later: the same objects, or an error

An object can be replaced at any time. So the plan keeps its ETag (`SourceFile.etag`), and every later read is made for
that ETag only. Headers and JSON files that an earlier run of the merge has read are not read again (kept_reads.py).
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from raymoe.errors import CheckpointError
from raymoe.object_store.errors import StorageError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url
from raymoe.sources.facts import SourceFile
from raymoe.sources.folder_protocol import unusable_checkpoint
from raymoe.sources.kept_reads import KeptReads

_RANGE_BYTES = 16 * 2**20
_RANGES_AT_ONCE = 4
_CHAT_TEMPLATES = "chat_templates"  # the one subfolder that has files of a model
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)")

# Copies of objects, by location and ETag; the folder is removed when the process exits.
_copies_dir: tempfile.TemporaryDirectory[str] | None = None
_copies_lock = threading.Lock()


class BucketFolder:
    """Implements `Folder` on the objects below a URL."""

    def __init__(self, url: str, files: dict[str, SourceFile], options: StorageOptions, kept: KeptReads | None):
        self._files, self._options, self._kept = files, options, kept
        self._store = open_store(url, options)
        self.label = url
        self.revision: str | None = None
        self.names: list[str] = sorted(files)
        self.bin_warning: str | None = (
            f"{url} has .bin weights only: to be indexed they are downloaded whole, into {tempfile.gettempdir()}"
        )

    def find(self, name: str) -> SourceFile | None:
        if name in self._files or "/" not in name:
            return self._files.get(name)
        url = join_url(self.label, name)
        with as_checkpoint_errors():
            info = self._store.stat(url)
        return SourceFile(location=url, size=info.size, etag=info.etag) if info else None

    def read(self, file: SourceFile) -> bytes:
        return self.read_range(file, 0, file.size)

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        if self._kept is not None and (found := self._kept.find(file, start, end)) is not None:
            return found
        with as_checkpoint_errors():
            data = self._store.read(file.location, start, end, file.etag)
        if self._kept is not None:
            self._kept.add(file, start, end, data)
        return data

    def local_path(self, file: SourceFile) -> Path:
        return fetch_object(file, self._options)

    def missing_remedy(self, name: str) -> str:
        return "complete the folder (upload the model again), or correct the URL"


def open_object_folder(url: str, role: str, options: StorageOptions, kept: KeptReads | None = None) -> BucketFolder:
    """List the folder at a normalized URL; its small files may be in `kept`. Raises CheckpointError if nothing is
    there."""
    with as_checkpoint_errors():
        store = open_store(url, options)
        listing = store.list_folder(url)
        entries = {entry.name: entry for entry in listing.objects}
        if listing.folders is None or _CHAT_TEMPLATES in listing.folders:
            templates = store.list_folder(join_url(url, _CHAT_TEMPLATES)).objects
            entries |= {f"{_CHAT_TEMPLATES}/{entry.name}": entry for entry in templates}
        files = {
            name: SourceFile(location=join_url(url, name), size=entry.size, etag=entry.etag)
            for name, entry in entries.items()
        }
        is_object = not files and url.count("/") > 2 and store.stat(url) is not None
    if is_object:
        raise unusable_checkpoint(
            url, f"this is a file; a {role} is named by its folder", "name the folder that holds it"
        )
    if not files:
        remedy = f"correct the URL of the {role}"
        if (match := _HUB_PAGE.match(url)) is not None:
            remedy = f"a model of the Hub is named by its id: {match[1]}"
        raise unusable_checkpoint(url, "there are no files under this URL", remedy)
    return BucketFolder(url, files, options, kept)


def read_range(file: SourceFile, start: int, end: int, options: StorageOptions | None = None) -> bytes:
    """Exactly the bytes [start, end) of an object, as planned. Raises CheckpointError. Thread-safe."""
    with as_checkpoint_errors():
        return open_store(file.location, options).read(file.location, start, end, file.etag)


def fetch_object(file: SourceFile, options: StorageOptions | None = None) -> Path:
    """A temporary local copy of an object, made once per process. Raises CheckpointError."""
    folder = _copies_folder() / sha256(f"{file.location} {file.etag} {file.size}".encode()).hexdigest()[:32]
    path = folder / file.name
    if not path.exists():
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
                _download(file, part.fileno(), options)
            os.replace(part.name, path)  # atomic: another thread or process may make the same copy
        except OSError as error:
            what = f"it can't be copied to {folder}: {error.strerror or error}"
            raise unusable_checkpoint(file.location, what, "set TMPDIR to a folder with enough space") from error
    return path


def _download(file: SourceFile, descriptor: int, options: StorageOptions | None) -> None:
    def fetch(start: int) -> None:
        data = memoryview(read_range(file, start, min(start + _RANGE_BYTES, file.size), options))
        while data:
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written

    with ThreadPoolExecutor(max_workers=_RANGES_AT_ONCE) as pool:
        list(pool.map(fetch, range(0, file.size, _RANGE_BYTES)))


def _copies_folder() -> Path:
    global _copies_dir
    with _copies_lock:
        if _copies_dir is None:
            _copies_dir = tempfile.TemporaryDirectory(prefix="raymoe-objects-")
        return Path(_copies_dir.name)


@contextmanager
def as_checkpoint_errors() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise CheckpointError(error.problems) from None
