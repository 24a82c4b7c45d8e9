"""Reads and checks the header of one safetensors file. A function reads its bytes, from a disk or a server.

    [8 bytes: header length N, little-endian u64] [N bytes: JSON] [tensor bytes, without holes, to the end]

Source of the format: https://huggingface.co/docs/safetensors/index#format. Planning reads only the header, and all
later code trusts it. So it is checked completely here, against the size of the file too, which finds interrupted
downloads before a merge starts. Bytes are read through a function, so that local files and HTTP range requests share
this code.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

from raymoe.sources.dtypes import DTYPE_BITS, MAX_DIMENSIONS, MAX_NAME_CHARACTERS, tensor_nbytes
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.folder_protocol import FileProblems, unusable_checkpoint
from raymoe.untrusted_files import read_json

# read(start, end) -> exactly the bytes [start, end) of the file (fewer only if the file ends before `end`)
ReadRange = Callable[[int, int], bytes]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
PREFIX_BYTES = 64 * 1024  # read first: holds the header of nearly every shard, so that one request is enough

_DOWNLOAD_AGAIN = "download or save the file again"
_MAX_KNOWN = 64  # headers that are kept, as many as the files of a large model
_MAX_KNOWN_BYTES = 1 << 20  # of one of them


def parse_header(read: ReadRange, file: SourceFile, where: str = "") -> tuple[TensorEntry, ...]:
    """The tensors of one safetensors file, in the order of their bytes.

    `where` is the file's name in messages (default: its location). Raises CheckpointError with one or more problems;
    exceptions of `read` pass through.
    """
    where = where or file.location
    raw, data_start = _header_bytes(read, file, where)
    if (known := _checked_headers.find(raw, file.size)) is not None:
        return tuple(_of_file(entry, file) for entry in known)
    items = _decode(raw, where)
    problems = FileProblems(where, _DOWNLOAD_AGAIN)
    entries: list[TensorEntry] = []
    for name, info in items:
        if name == "__metadata__":
            continue  # the writer's metadata, free text
        try:
            entries.append(_entry(name, info, file, data_start))
        except ValueError as error:
            problems.add(str(error))
    if not problems.count:
        entries.sort(key=lambda entry: (entry.start, entry.end))
        _check_layout(entries, file, data_start, problems)
    problems.raise_any()
    _checked_headers.add(raw, file.size, found := tuple(entries))
    return found


class _CheckedHeaders:
    """The last headers without a problem, by their bytes and the file's size: the same bytes say the same tensors. Many
    fine-tunes of one model have equal headers. Thread-safe."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[bytes, int], tuple[TensorEntry, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, raw: bytes, size: int) -> tuple[TensorEntry, ...] | None:
        """The tensors, in another file of that header."""
        with self._lock:
            if (raw, size) in self._entries:
                self._entries.move_to_end((raw, size))
            return self._entries.get((raw, size))

    def add(self, raw: bytes, size: int, entries: tuple[TensorEntry, ...]) -> None:
        if len(raw) > _MAX_KNOWN_BYTES:
            return
        with self._lock:
            self._entries[raw, size] = entries
            if len(self._entries) > _MAX_KNOWN:
                self._entries.popitem(last=False)


_checked_headers = _CheckedHeaders()


def _of_file(entry: TensorEntry, file: SourceFile) -> TensorEntry:
    """The same tensor in another file."""
    return TensorEntry(
        name=entry.name, dtype=entry.dtype, shape=entry.shape, file=file, start=entry.start, end=entry.end
    )


def _header_bytes(read: ReadRange, file: SourceFile, where: str) -> tuple[bytes, int]:
    """The JSON bytes, and the position in the file where the tensor bytes begin."""
    if file.size < 8:
        _refuse(where, f"the file has {file.size} bytes, too few for a safetensors file (at least 8)")
    prefix = read(0, min(PREFIX_BYTES, file.size))
    if len(prefix) < 8:
        _refuse(where, f"the file has {file.size} bytes, but reading its start gave only {len(prefix)}")
    if prefix.startswith(b"version https://git-lfs"):
        _refuse(where, "this is a Git LFS pointer, not the file itself", "fetch the files with `git lfs pull`")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(where, f"header length {length} is over the format's {MAX_HEADER_BYTES}: not a safetensors file")
    if 8 + length > file.size:
        _refuse(where, f"the header should end at byte {8 + length}, but the file has only {file.size} (truncated)")
    raw = prefix[8 : 8 + length]
    if len(raw) < length:
        raw += read(8 + len(raw), 8 + length)
    if len(raw) != length:
        _refuse(where, f"the header should have {length} bytes, but reading it gave {len(raw)}")
    return raw, 8 + length


def header_bytes_in(data: bytes, start: int) -> bytes | None:
    """The header's bytes in a range that `parse_header` has read, from `start`; None if it reads no such range."""
    if start == 0:
        return data[: 8 + int.from_bytes(data[:8], "little")]
    return data if start == PREFIX_BYTES else None


def _decode(raw: bytes, where: str) -> list[tuple[str, Any]]:
    """The top-level (name, value) pairs of the header, in the order of the file."""
    try:
        # The format requires '{' first; spaces after the JSON are padding.
        parsed = read_json(raw, pairs=_pairs) if raw[:1] == b"{" else None
    except ValueError as error:
        _refuse(where, f"the header is not valid JSON: {error}")
    if not isinstance(parsed, dict):
        _refuse(where, "the header is not a JSON object")
    return list(parsed.items())


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {double!r} occurs twice")
    return result


def _entry(name: str, info: Any, file: SourceFile, data_start: int) -> TensorEntry:
    """One tensor of the header. Raises ValueError with what is wrong with this tensor alone."""
    if len(name) > MAX_NAME_CHARACTERS:
        raise ValueError(f"tensor name {name[:40]!r}... has {len(name)} characters (at most {MAX_NAME_CHARACTERS})")
    if not name or not name.isprintable():  # lone surrogates too, which can't be written to a file
        raise ValueError(f"tensor name {name!r} is empty or has unprintable characters")
    if not isinstance(info, dict):
        raise ValueError(f"tensor {name!r}: expected an object with dtype, shape and data_offsets, got {info!r:.80}")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r}: unknown dtype {dtype!r:.80}; known: {', '.join(DTYPE_BITS)}")
    if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions (at most {MAX_DIMENSIONS})")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise ValueError(f"tensor {name!r}: shape {shape!r:.80} is not a list of sizes from 0 up")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ValueError(f"tensor {name!r}: data_offsets {offsets!r:.80} are not two offsets from 0 up")
    start, end = offsets
    nbytes = tensor_nbytes(dtype, shape)
    if end - start != nbytes:
        raise ValueError(f"tensor {name!r}: data_offsets span {end - start} bytes, but {dtype} {shape} takes {nbytes}")
    # The files of a merge repeat the same names many times, so they are interned.
    return TensorEntry(
        name=sys.intern(name),
        dtype=sys.intern(dtype),
        shape=tuple(shape),
        file=file,
        start=data_start + start,
        end=data_start + end,
    )


def _is_size(value: object) -> bool:
    # 2**63: larger sizes are nonsense, and formatting arbitrarily large integers can itself fail.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_layout(entries: list[TensorEntry], file: SourceFile, data_start: int, problems: FileProblems) -> None:
    """Report gaps, overlaps and a wrong end, over all tensors in the order of their bytes."""
    position, before = data_start, "the header"
    for entry in entries:
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a gap after"
            what = f"tensor {entry.name!r} (from byte {entry.start}) {kind} {before}, which ends at {position}"
            problems.add(what)
        position, before = max(position, entry.end), f"tensor {entry.name!r}"
    if position != file.size:
        kind = "truncated" if position > file.size else f"{file.size - position} bytes are left over at the end"
        what = f"the header describes a file of {position} bytes, but it has {file.size} ({kind})"
        problems.add(what)


def _refuse(where: str, what: str, remedy: str = _DOWNLOAD_AGAIN) -> NoReturn:
    raise unusable_checkpoint(where, what, remedy)
