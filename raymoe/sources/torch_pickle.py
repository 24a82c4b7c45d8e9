"""Indexes a PyTorch `.bin` file (a pickled state dict) without torch, and without running anything in it.

Since PyTorch 1.6 `torch.save` writes a zip archive, uncompressed:

    <prefix>/data.pkl    pickle of the state dict; a storage appears in it as a persistent id (..., type, key, ...)
    <prefix>/data/<key>  the raw bytes of one storage
    <prefix>/byteorder   'little' or 'big' (newer files only)

So a tensor is a byte range of the file itself: the start of its storage's zip record, plus its storage offset. A merge
needs no more, and the bytes are later copied like those of a safetensors file.

A pickle is a program. The unpickler here resolves a few names, each to an inert, immutable stand-in, and rejects every
other name: there is nothing that a malicious file could call. (`torch.load(weights_only=True)` works in a similar way,
but hides the position of a storage, and would make planning depend on torch.)

Its cost is bounded too. Tuples can share tuples: n of them can stand for 2 ** n elements when they are hashed or
printed, so only a few are allowed. Nested tuples are hashed by recursion, so only a few levels are allowed. If a file
chooses dictionary keys with equal hashes, the time grows with the square of their number. So keys may only be text and
small numbers: Python's hashes of text differ between processes. Records are read within limits of their own.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

from raymoe.errors import CheckpointError
from raymoe.sources.dtypes import DTYPE_BYTES, MAX_DIMENSIONS, MAX_NAME_CHARACTERS
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.folder_protocol import FileProblems, unusable_checkpoint

# A state dict takes about 200 bytes and 50 operations per tensor: enough for 100,000 of them in one file.
_MAX_PICKLE_BYTES, _MAX_OPERATIONS = 20_000_000, 5_000_000
_MAX_DIRECTORY_BYTES = 32_000_000
_MAX_BYTEORDER_BYTES = 16
# How often a tuple may be reused. torch.save never does: n of them make one of up to 2 ** n parts.
_MAX_SHARED_TUPLES = 16
# How deeply tuples may be nested: Python hashes a tuple by recursion in C, without checking the stack. torch.save nests
# them two deep.
_MAX_TUPLE_DEPTH = 64
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_TEXTS = frozenset(
    {
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    }
)
_NUMBERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"})
# Sizes and offsets are smaller. From this value on, different integers can have the same hash.
_TOO_LARGE = 2**61 - 1
# Optimizer states have parameters by number. Below this number, at most some hundred keys share a slot of a dictionary,
# however they are chosen.
_LARGEST_KEY = 2**20
# Operations that fill a dictionary -> index of the first key among the values that they take.
_KEYED: Mapping[str, int] = {"SETITEM": 1, "SETITEMS": 1, "DICT": 0}
# Kinds of values on the unpickler's stack: 0 for any other value, above 0 the depth of nested tuples.
_KEY = -1
# Operations that leave the filled object on the stack. (With nothing to fill in, that may be a tuple.)
_FILL_OPERATIONS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"})
_REFUSED_OPERATIONS = frozenset(
    {
        *("POP", "POP_MARK", "DUP", "EMPTY_SET", "FROZENSET", "ADDITEMS"),
        *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
    }
)
_repr = reprlib.Repr()
_repr.maxlevel = _repr.maxtuple = 3
_TO_SAFETENSORS = (
    "convert it where you trust it: load the model with transformers and save it with save_pretrained, "
    "which writes model.safetensors"
)
_DOWNLOAD_AGAIN = "download or save the file again"

_STORAGE_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "DoubleStorage": "F64",
        "FloatStorage": "F32",
        "HalfStorage": "F16",
        "BFloat16Storage": "BF16",
        "LongStorage": "I64",
        "IntStorage": "I32",
        "ShortStorage": "I16",
        "CharStorage": "I8",
        "ByteStorage": "U8",
        "BoolStorage": "BOOL",
    }
)


class _RefusedError(Exception):
    """The pickle requests something that a plain state dict does not need."""


# Results of unpickling. NamedTuples: a pickle can neither change them nor add attributes.
class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    changed_by: tuple[str, ...] = ()


class _Rebuild:
    """A name in the pickle that may be called. It has no `__dict__`, so a pickle can't set attributes on it."""

    __slots__ = ("_function",)
    _function: Callable[..., object]

    def __init__(self, function: Callable[..., object]):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> object:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise _RefusedError(f"an attribute {name!r} of a function")


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> _Tensor:
    """A stand-in for a tensor. `metadata` may hold bits of torch (`neg`, `conj`) that change the meaning of its
    bytes."""
    if metadata is not None and not isinstance(metadata, dict):
        raise _RefusedError("a tensor with metadata that is no dictionary")
    if metadata and len(metadata) > MAX_DIMENSIONS:
        raise _RefusedError(f"a tensor with {len(metadata)} entries of metadata")
    # Check before any copy: one long list may be the shape of many tensors.
    if any(isinstance(sizes, (list, tuple)) and len(sizes) > MAX_DIMENSIONS for sizes in (shape, stride)):
        raise _RefusedError(f"a tensor of {max(len(shape), len(stride))} dimensions")
    bits = tuple(str(key)[:20] for key, value in dict.items(metadata or {}) if value is not False)
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        raise _RefusedError("a tensor that is not described by a storage, an offset, a shape and strides")
    return _Tensor(storage, offset, tuple(shape), tuple(stride), bits)


def _ordered_dict(*pairs: Any) -> collections.OrderedDict[Any, Any]:
    """An empty one, which operations fill later: `_check_operations` does not see the keys of `pairs`."""
    if pairs:
        raise _RefusedError("an OrderedDict of pairs")
    return collections.OrderedDict()


def _parameter(data: Any, *_: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise _RefusedError("a parameter that is no tensor")
    return data


_CALLABLE: Mapping[tuple[str, str], object] = MappingProxyType(
    {
        ("collections", "OrderedDict"): _Rebuild(_ordered_dict),
        ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(_tensor),
        ("torch._utils", "_rebuild_parameter"): _Rebuild(_parameter),
    }
)


class _StateDictUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if (module, name) in _CALLABLE:
            return _CALLABLE[module, name]
        raise _RefusedError(f"the name '{module}.{name}'")

    def persistent_load(self, pid: Any) -> _Storage:
        # ('storage', type, key of the record, device, number of elements)
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise _RefusedError(f"the storage {_short_repr(pid)}")
        if not isinstance(pid[2], str) or not isinstance(pid[4], int):
            raise _RefusedError(f"the storage {_short_repr(pid)}")
        return _Storage(pid[1].dtype, pid[2])


def parse_pickled(path: Path, file: SourceFile, where: str = "") -> tuple[TensorEntry, ...]:
    """The tensors of one `.bin` file at the local `path`, in the order of the state dict.

    `file` is the file of the entries (the same bytes, perhaps on the Hub), `where` its name in messages. Raises
    CheckpointError; nothing in the file is executed, whatever it holds.
    """
    where = where or file.location
    try:
        with open(path, "rb") as handle:
            return _parse(handle, file, where)
    except OSError as error:
        raise unusable_checkpoint(
            where, f"can't be read: {error.strerror or error}", "check its permissions"
        ) from error


def _parse(handle: BinaryIO, file: SourceFile, where: str) -> tuple[TensorEntry, ...]:
    records, pickled = _read_archive(handle, where)
    tensors = _unpickle(pickled, where)
    entries: list[TensorEntry] = []
    problems = FileProblems(where, _TO_SAFETENSORS)
    for name, value in dict.items(tensors):  # a pickle may replace an OrderedDict's `items`
        try:
            entries.append(_entry(name, value, records, handle, file))
        except ValueError as error:
            problems.add(str(error))
    problems.raise_any()
    return tuple(entries)


def _read_archive(handle: BinaryIO, where: str) -> tuple[dict[str, zipfile.ZipInfo], bytes]:
    """The records of storages by key, and the pickle."""
    start = handle.read(4)
    try:
        bounded = _BoundedFile(handle, where)
        archive = zipfile.ZipFile(cast(BinaryIO, bounded))
        bounded.most = _MAX_PICKLE_BYTES
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) < len(archive.infolist()):
            raise unusable_checkpoint(where, "the zip archive holds a record twice", _DOWNLOAD_AGAIN)
        pickle_name = next((name for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if pickle_name is None:
            raise unusable_checkpoint(
                where, "a zip archive, but not one that torch.save wrote (no data.pkl)", _TO_SAFETENSORS
            )
        prefix = pickle_name.removesuffix("data.pkl")
        if prefix + "constants.pkl" in infos:
            raise unusable_checkpoint(where, "a TorchScript program, not a state dict", _TO_SAFETENSORS)
        if infos[pickle_name].file_size > _MAX_PICKLE_BYTES:
            raise unusable_checkpoint(
                where, f"data.pkl has {infos[pickle_name].file_size} bytes: not a state dict", _TO_SAFETENSORS
            )
        order = infos.get(prefix + "byteorder")
        # zipfile expands a compressed record as a whole, whatever its declared size: a few bytes can become gigabytes.
        if any(_is_compressed(info) for info in (infos[pickle_name], order) if info is not None):
            what = "data.pkl or byteorder is compressed or encrypted, which torch.save never does"
            raise unusable_checkpoint(where, what, _TO_SAFETENSORS)
        if order is not None and (order.file_size > _MAX_BYTEORDER_BYTES or archive.read(order) != b"little"):
            raise unusable_checkpoint(where, "the tensors are big-endian", _TO_SAFETENSORS)
        records = {name[len(prefix) + 5 :]: i for name, i in infos.items() if name.startswith(prefix + "data/")}
        return records, archive.read(pickle_name)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # for a damaged directory: BadZipFile, struct.error, ValueError, ...
        if start == b"PK\x03\x04":
            raise unusable_checkpoint(
                where, f"the zip archive is damaged or truncated ({error})", _DOWNLOAD_AGAIN
            ) from error
        if start.startswith(b"vers"):
            raise unusable_checkpoint(
                where, "this is a Git LFS pointer, not the file itself", "fetch the files with `git lfs pull`"
            ) from error
        raise unusable_checkpoint(
            where,
            "not in the zip format of torch.save (a legacy file of PyTorch before 1.6?)",
            _TO_SAFETENSORS,
        ) from error


class _BoundedFile:
    """Limits reads of zipfile, which reads the list of records at once, with whatever length the archive's end
    declares."""

    def __init__(self, handle: BinaryIO, where: str):
        self._handle, self._where, self.most = handle, where, _MAX_DIRECTORY_BYTES
        self.seek, self.tell, self.seekable = handle.seek, handle.tell, handle.seekable

    def read(self, size: int = -1) -> bytes:
        at = self._handle.tell()
        left = self._handle.seek(0, io.SEEK_END) - at
        self._handle.seek(at)
        size = min(size, left) if size >= 0 else left
        if size > self.most:
            what = "the zip archive names too many records: not a state dict"
            raise unusable_checkpoint(self._where, what, _TO_SAFETENSORS)
        return self._handle.read(size)


def _is_compressed(record: zipfile.ZipInfo) -> bool:
    is_stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    return not is_stored or bool(record.flag_bits & 0x1)


def _unpickle(pickled: bytes, where: str) -> dict[str, Any]:
    try:
        _check_operations(pickled)
        value = _StateDictUnpickler(io.BytesIO(pickled)).load()
    except _RefusedError as error:
        what = f"the pickle asks for {error}, which a plain state dict does not need; nothing of it was run"
        raise unusable_checkpoint(where, what, f"don't load it unless you trust it; {_TO_SAFETENSORS}") from error
    except Exception as error:
        # A damaged pickle can fail in any operation of the unpickler: each failure is the file's fault.
        raise unusable_checkpoint(
            where, f"the pickle is damaged ({type(error).__name__}: {error})", _DOWNLOAD_AGAIN
        ) from error
    if not isinstance(value, dict):
        raise unusable_checkpoint(
            where,
            f"holds a {type(value).__name__} where a state dict (name -> tensor) is expected",
            _TO_SAFETENSORS,
        )
    return value


def _check_operations(pickled: bytes) -> None:
    """Raise _RefusedError or UnpicklingError for a pickle with a cost out of proportion to its size."""
    # The unpickler's stack, marks and memo, with one number per value: `_KEY`, or how deep its tuples are nested.
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    shared = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        name = opcode.name
        if count > _MAX_OPERATIONS:
            raise _RefusedError(f"more than {_MAX_OPERATIONS:,} operations")
        if name in _REFUSED_OPERATIONS:
            raise _RefusedError(f"the operation {name}")
        if name in _NUMBERS and isinstance(argument, int) and abs(argument) >= _TOO_LARGE:
            raise _RefusedError(f"an integer of {argument.bit_length()} bits")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if name == "MEMOIZE" else int(str(argument))
            # The unpickler allocates its memo up to the largest index: a huge one would exhaust memory.
            if number > len(pickled) or not stack:
                raise pickle.UnpicklingError("memo index out of range, or nothing to note")
            memo[number] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(str(argument)), 0))
            if stack[-1] > 0:
                shared += 1
            if shared > _MAX_SHARED_TUPLES:
                raise _RefusedError("tuples that hold each other many times")
        else:
            taken = _take(stack, marks, opcode)
            if name in _KEYED and any(key != _KEY for key in taken[_KEYED[name] :: 2]):
                raise _RefusedError("a dictionary whose keys are neither text nor small numbers")
            depth = 1 + max([0, *taken]) if name in _TUPLES else taken[0] if name in _FILL_OPERATIONS else 0
            if depth > _MAX_TUPLE_DEPTH:
                raise _RefusedError(f"tuples nested more than {_MAX_TUPLE_DEPTH} deep")
            stack += [_KEY if _may_be_key(name, argument) else depth] * len(opcode.stack_after)


def _may_be_key(operation: str, argument: Any) -> bool:
    """Whether an operation leaves text or a small number on the stack. `INT` may leave booleans too."""
    if operation in _NUMBERS:
        return isinstance(argument, int) and not isinstance(argument, bool) and abs(argument) < _LARGEST_KEY
    return operation in _TEXTS


def _take(stack: list[int], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Remove an operation's arguments from the stack, and return them."""
    wanted = opcode.stack_before
    if not wanted:
        return []
    start = len(stack) - len(wanted)
    if wanted[-1] is pickletools.stackslice:  # the last of: the filled object, the mark, all after the mark
        if not marks:
            raise pickle.UnpicklingError("no mark")
        start = marks.pop() - (len(wanted) - 2)
    if start < 0:
        raise pickle.UnpicklingError("the stack is empty")
    taken = stack[start:]
    del stack[start:]
    return taken


def _short_repr(value: object) -> str:
    """The start of a pickled value's repr for a message, however large the value is."""
    return _repr.repr(value)[:80]


def _entry(
    name: Any, value: Any, records: Mapping[str, zipfile.ZipInfo], handle: BinaryIO, file: SourceFile
) -> TensorEntry:
    """One tensor. Raises ValueError with what is wrong with it."""
    if isinstance(name, str) and len(name) > MAX_NAME_CHARACTERS:
        raise ValueError(f"the name {_short_repr(name)} has {len(name)} characters (at most {MAX_NAME_CHARACTERS})")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"the name {_short_repr(name)} is not the name of a tensor")
    if not isinstance(value, _Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__.lstrip('_')}, not a tensor: not a plain state dict")
    if value.changed_by:
        bits = ", ".join(value.changed_by)
        raise ValueError(f"tensor {name!r} has torch's {bits} bit set: its values are not the bytes in the file")
    if not _is_contiguous(value.shape, value.stride):
        raise ValueError(f"tensor {name!r} is not contiguous: shape {value.shape}, strides {value.stride}")
    item_bytes = DTYPE_BYTES[value.storage.dtype]
    record = records.get(value.storage.key)
    if record is None:
        raise ValueError(f"tensor {name!r}: its storage {value.storage.key!r} is missing in the archive")
    if _is_compressed(record):
        raise ValueError(f"tensor {name!r}: its storage is compressed or encrypted, which torch.save never does")
    start_in_record = value.offset * item_bytes
    nbytes = math.prod(value.shape) * item_bytes
    if start_in_record + nbytes > record.file_size:
        raise ValueError(
            f"tensor {name!r} of {nbytes} bytes reaches beyond its storage of {record.file_size} (truncated)"
        )
    if not 0 <= record.header_offset < file.size:
        raise ValueError(f"record {record.filename!r} lies outside the file (damaged archive)")
    start = _record_start(handle, record) + start_in_record
    if start + nbytes > file.size:
        raise ValueError(f"tensor {name!r} ends at byte {start + nbytes} of a file of {file.size} (truncated)")
    return TensorEntry(
        name=name, dtype=value.storage.dtype, shape=value.shape, file=file, start=start, end=start + nbytes
    )


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor is row-major without gaps; strides of sizes 0 and 1 do not matter."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return 0 in shape
        expected *= size
    return True


def _record_start(handle: BinaryIO, record: zipfile.ZipInfo) -> int:
    """The position of a record's bytes: after its local header, which has an extra field (padding) of variable length.

    Source: APPNOTE.TXT 4.3.7, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
    """
    handle.seek(record.header_offset)
    header = handle.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"record {record.filename!r} has no local header (damaged or truncated archive)")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return record.header_offset + 30 + name_bytes + extra_bytes
