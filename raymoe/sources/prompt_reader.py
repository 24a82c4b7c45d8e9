"""Reads the prompts of one file in order: lines of text, lines of JSON or a column of Parquet.

    path or URL --> bytes (--gunzip) --> lines --> texts
                    or a Parquet column, batch by batch

Only the current line or batch is in memory. Problems of a line go to `Faults`, which ends reading after too many; a
problem of the whole file ends it at once.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, BinaryIO, NoReturn, cast

from raymoe.config.prompt_sources import PromptFile, file_format, is_compressed
from raymoe.config.source_positions import short_text, yaml_kind
from raymoe.errors import Problem, ProblemReport, install_remedy
from raymoe.formatting import short_list
from raymoe.object_store.location import Location
from raymoe.object_store.object_file import ObjectFile
from raymoe.object_store.options import StorageOptions
from raymoe.untrusted_files import read_json

_MAX_FAULTS = 5  # per file; one wrong field makes every line wrong in the same way
_MAX_LINE_BYTES = 16 * 2**20
_READ_BYTES = 4 * 2**20
_BATCH_ROWS = 256
_SHOWN_FIELDS = 12
# For Parquet, where one text can stand for any number of rows, and a page of zeros takes no space: the maximum ratio of
# texts to the file's size (that of gzip), unless the texts are small, and the maximum ratio of a row group's expanded
# pages to their bytes in the file, unless they are small.
_MAX_RATIO, _MIN_BYTE_LIMIT, _BYTES_PER_ROW = 1000, 2**30, 64
_MAX_COMPRESSED_RATIO, _LARGEST_CHUNK = 100, 64 * 2**20
_LARGE_CHARACTERS, _DICTIONARY_PAGE = 2**16, 2
_TEXT_TYPES = ("string", "large_string", "string_view")


class Faults:
    """The problems of one file; `owner` is the key of the config that names it."""

    def __init__(self, file: str, owner: str) -> None:
        self._file, self._owner = short_text(file, 400), owner
        self.problems: list[Problem] = []

    def add(self, what: str, remedy: str, at: str = "") -> None:
        """Note a problem at a line (':12') or row. Raises ProblemReport if there are too many to continue."""
        self.problems.append(Problem(where=f"{self._file}{at}: {self._owner}", what=what, remedy=remedy))
        if len(self.problems) == _MAX_FAULTS:
            # otherwise it is one mistake, and is reported as one
            if len({problem.what for problem in self.problems}) > 1:
                what = f"stopped reading after {_MAX_FAULTS} problems"
                self.problems.append(Problem(where=f"{self._file}: {self._owner}", what=what))
            raise ProblemReport(self.problems)

    def end(self, what: str, remedy: str, at: str = "") -> NoReturn:
        """Note a problem that prevents further reading, and raise ProblemReport."""
        self.add(what, remedy, at)
        raise ProblemReport(self.problems)


def prompt_values(file: PromptFile, storage: StorageOptions, faults: Faults) -> Iterator[str]:
    """All prompts of the file that are not blank, in order. Raises ProblemReport, StorageError."""
    raw = _open(file.location, storage, faults)
    with raw:
        if file_format(file.file) == "parquet":
            yield from filter(str.strip, _column(raw, file.field, faults))
            return
        packed = is_compressed(file.file)
        lines = _lines(cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb")) if packed else raw, faults)
        if file_format(file.file) == "jsonl":
            lines = _fields(lines, file.field, faults)
        for _, text in lines:
            if text.strip():
                yield text


def _open(location: Location, storage: StorageOptions, faults: Faults) -> BinaryIO:
    path = location.text
    if location.kind.is_object:
        return cast(BinaryIO, io.BufferedReader(ObjectFile(path, storage), _READ_BYTES))
    if os.path.isdir(path):
        faults.end("this is a folder, not a file", "name the file in it")
    if not os.path.exists(path):
        faults.end(f"there is no file {path} here", "correct the path; it is relative to the working directory")
    try:
        return open(path, "rb")
    except OSError as error:
        faults.end(f"the file can't be read: {error.strerror}", "check its permissions")


def _lines(stream: BinaryIO, faults: Faults) -> Iterator[tuple[int, str]]:
    """The lines by number, without line ends."""
    for number, raw in _raw_lines(stream, faults):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 text (byte 0x{raw[error.start]:02x})"
            faults.add(what, "save the file as UTF-8", f":{number}")
        else:
            yield number, text.removesuffix("\n").removesuffix("\r")


def _raw_lines(stream: BinaryIO, faults: Faults) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(_MAX_LINE_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            faults.end(f"the gzip data is damaged: {error}", "make the file again", f":{number}")
        except OSError as error:
            faults.end(f"the file can't be read: {error.strerror or error}", "check the disk it is on", f":{number}")
        if not line:
            return
        if len(line) > _MAX_LINE_BYTES:
            what = f"the line has more than {_MAX_LINE_BYTES >> 20} MiB"
            faults.end(what, "write one prompt per line", f":{number}")
        yield number, line


def _fields(lines: Iterator[tuple[int, str]], field: str, faults: Faults) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if line.strip() and (text := _field(line, field, faults, f":{number}")) is not None:
            yield number, text


def _field(line: str, field: str, faults: Faults, at: str) -> str | None:
    try:
        found: Any = read_json(line)
    except json.JSONDecodeError as error:
        faults.add(f"not valid JSON: {error.msg} (column {error.colno})", "write one JSON object per line", at)
        return None
    except ValueError:
        faults.add("not a JSON value that can be read", "write one JSON object per line", at)
        return None
    if not isinstance(found, dict):
        faults.add(f"expected a JSON object, got {yaml_kind(found)}", f'write {{"{short_text(field)}": "..."}}', at)
        return None
    if field not in found:
        faults.add(*_missing_field("key", field, list(found)), at)
        return None
    return _text(found[field], field, faults, at)


def _missing_field(kind: str, field: str, names: list[str]) -> tuple[str, str]:
    there = short_list([short_text(name) for name in names], most=_SHOWN_FIELDS) or "none"
    near = get_close_matches(field, names, n=1)
    remedy = f"did you mean field: {short_text(near[0])}?" if near else f"set field to the {kind} that holds the prompt"
    return f"there is no {kind} '{short_text(field)}'; {kind}s here: {there}", remedy


def _text(value: Any, field: str, faults: Faults, at: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        what = f"'{short_text(field)}' is {yaml_kind(value)}, not text"
        faults.add(what, "set field to what holds the prompt as text", at)
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        what = f"'{short_text(field)}' is not valid Unicode text"
        faults.add(what, "remove the lone surrogate (\\uD800-\\uDFFF)", at)
        return None
    return value


def _column(raw: BinaryIO, field: str, faults: Faults) -> Iterator[str]:
    """The texts of one column; the other columns are not read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        remedy = f"{install_remedy('parquet')}, or save the prompts as .jsonl"
        faults.end("reading Parquet needs pyarrow, which is not installed", remedy)
    try:
        # By default pyarrow reads a whole row group's column ahead.
        options: Any = {"buffer_size": _READ_BYTES, "pre_buffer": False}
        opened = parquet.ParquetFile(raw, **options)
        names = opened.schema_arrow.names
        if field not in names:
            faults.end(*_missing_field("column", field, names))
        kind = opened.schema_arrow.field(names.index(field)).type
        kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
        if str(kind) not in (*_TEXT_TYPES, "null"):
            faults.end(
                f"the column '{short_text(field)}' holds {short_text(str(kind))}, not text", "name a column of text"
            )
        if str(kind) == "null":
            return
        _check_chunks(opened.metadata, field, faults)
        most = max(_MIN_BYTE_LIMIT, _MAX_RATIO * raw.seek(0, io.SEEK_END))
        row = nbytes = 0
        large = _TextCache()
        for group in range(opened.metadata.num_row_groups):
            rows = _batch_rows(raw, opened.metadata, group, field, faults)
            for batch in opened.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = _cell(value, faults, f" row {row}")
                    nbytes += _BYTES_PER_ROW + len(text or "")
                    if nbytes > most:
                        what = f"its texts have more than {_MAX_RATIO} times the bytes of the file, and over 1 GiB"
                        faults.end(what, "write each prompt once", f" row {row}")
                    if text is not None:
                        yield large.intern(text)
    except (ArrowException, OSError, ValueError) as error:
        faults.end(f"the Parquet file can't be read: {short_text(str(error), 200)}", "make the file again")


class _TextCache:
    """Keeps equal large texts once: all rows may have the same one from a Parquet file's dictionary."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._characters = 0

    def intern(self, text: str) -> str:
        if len(text) < _LARGE_CHARACTERS:
            return text
        if text not in self._texts:
            if self._characters + len(text) > _LARGEST_CHUNK:
                self._texts.clear()
                self._characters = 0
            self._characters += len(text)
        return self._texts.setdefault(text, text)


def _check_chunks(metadata: Any, field: str, faults: Faults) -> None:
    """Report pages that are far larger than their bytes in the file: pyarrow expands a page as a whole."""
    for group in range(metadata.num_row_groups):
        chunk = _chunk(metadata, group, field)
        expanded, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
        if expanded > max(_LARGEST_CHUNK, _MAX_COMPRESSED_RATIO * stored):
            what = f"row group {group} has {expanded:,} bytes of '{short_text(field)}' in {stored:,} compressed ones"
            faults.end(what, "write the prompts as .jsonl or .jsonl.gz")


def _chunk(metadata: Any, group: int, field: str) -> Any:
    schema = metadata.schema
    return metadata.row_group(group).column(
        next(number for number in range(metadata.num_columns) if schema.column(number).path == field)
    )


def _batch_rows(raw: BinaryIO, metadata: Any, group: int, field: str, faults: Faults) -> int:
    """How many rows to read at once. Each row may be as large as the dictionary, whose size is in its page's header.

    Source: PageHeader in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift. Its first
    fields are the kind of page and its expanded size, each a byte and a number with 7 bits per byte.
    """
    chunk = _chunk(metadata, group, field)
    starts = [start for start in (chunk.data_page_offset, chunk.dictionary_page_offset) if start]
    raw.seek(min(starts, default=0))
    header = raw.read(16)
    numbers = re.match(rb"\x15([\x80-\xff]*[\x00-\x7f])\x15([\x80-\xff]*[\x00-\x7f])", header, re.DOTALL)
    if numbers is None:
        return _BATCH_ROWS  # a damaged file, which pyarrow will report
    kind, nbytes = (sum((byte & 0x7F) << 7 * n for n, byte in enumerate(number)) >> 1 for number in numbers.groups())
    if kind != _DICTIONARY_PAGE:
        return _BATCH_ROWS
    if nbytes > _MAX_LINE_BYTES + _READ_BYTES:
        what = f"row group {group} has a dictionary of {nbytes:,} bytes for '{short_text(field)}'"
        faults.end(what, f"write it with texts of at most {_MAX_LINE_BYTES >> 20} MiB, or without a dictionary")
    return max(1, min(_BATCH_ROWS, _LARGEST_CHUNK // max(int(nbytes), 1)))


def _cell(value: Any, faults: Faults, at: str) -> str | None:
    if not value.is_valid:
        return None
    value = getattr(value, "value", value)  # if the column has a dictionary
    buffer = value.as_buffer()
    if buffer.size > _MAX_LINE_BYTES:
        faults.end(f"the text has more than {_MAX_LINE_BYTES >> 20} MiB", "write one prompt per row", at)
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError:
        faults.add("not UTF-8 text", "write the column as UTF-8", at)
        return None
    return text
