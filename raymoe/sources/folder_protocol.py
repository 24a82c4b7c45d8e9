"""The protocol of a checkpoint's folder, independent of where it is. Indexing uses only this protocol.

`LocalFolder` (local_folder.py), `HubFolder` (hub.py) and `BucketFolder` (bucket_folder.py) implement it;
`weight_index.py` and `resolve.py` use only the protocol. Every method raises CheckpointError, and no other exception,
for problems that a user can solve. Names are relative to the folder, with '/'.
"""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from raymoe.errors import CheckpointError, Problem
from raymoe.sources.facts import SideFile, SourceFile
from raymoe.untrusted_files import check_size, read_json

# Every tokenizer has one of these files.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
# What turns images, videos and sounds into a model's inputs.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Files that belong to a model besides its weights and config: never weights, and code only if the tokenizer names it
# (see tokenizer_files.py).
SIDE_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*.jinja",
    "generation_config.json",
    *PROCESSOR_FILES,
)

_MAX_PROBLEMS = 5  # per file


class Folder(Protocol):
    """Read access to one folder of files."""

    @property
    def label(self) -> str:
        """The folder's name in messages: an absolute path, `org/name@<commit>`, or a URL."""

    @property
    def revision(self) -> str | None:
        """The commit, for a Hub repository."""

    @property
    def names(self) -> Sequence[str]:
        """Sorted names of the files at the top and in `chat_templates/`."""

    @property
    def bin_warning(self) -> str | None:
        """The warning to give if `.bin` files of this folder have to be indexed."""

    def find(self, name: str) -> SourceFile | None:
        """The file of that name (also in a subfolder), or None."""

    def read(self, file: SourceFile) -> bytes:
        """A whole small file."""

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""

    def local_path(self, file: SourceFile) -> Path:
        """A path to read the whole file from; a remote file is downloaded first."""

    def missing_remedy(self, name: str) -> str:
        """The remedy for a file that should be here and is missing."""


def unusable_checkpoint(where: str, what: str, remedy: str = "") -> CheckpointError:
    """A CheckpointError with one problem; the caller raises it."""
    return CheckpointError([Problem(where=where, what=what, remedy=remedy)])


class FileProblems:
    """The first problems of one file, with one remedy. More are only counted: all its tensors may have the same one."""

    def __init__(self, where: str, remedy: str):
        self._where, self._remedy = where, remedy
        self._kept: list[Problem] = []
        self.count = 0

    def add(self, what: str) -> None:
        self.count += 1
        if self.count <= _MAX_PROBLEMS:
            self._kept.append(Problem(where=self._where, what=what, remedy=self._remedy))

    def raise_any(self) -> None:
        """Raise CheckpointError if there are problems."""
        if self.count > _MAX_PROBLEMS:
            what = f"and {self.count - _MAX_PROBLEMS} more problems of this kind in the file"
            self._kept.append(Problem(where=self._where, what=what))
        if self._kept:
            raise CheckpointError(self._kept)


def read_json_object(folder: Folder, name: str) -> dict[str, Any]:
    """A small JSON file that holds an object. Raises CheckpointError if it is missing or is anything else."""
    file = folder.find(name)
    if file is None:
        raise unusable_checkpoint(folder.label, f"{name} is missing", folder.missing_remedy(name))
    where = f"{folder.label}/{name}"
    try:
        check_size(file.size)
        value = read_json(folder.read(file))
    except ValueError as error:
        raise unusable_checkpoint(where, f"not valid JSON: {error}", "download or save the file again") from error
    if not isinstance(value, dict):
        raise unusable_checkpoint(
            where, f"expected a JSON object, found {type(value).__name__}", "download or save the file again"
        )
    return value


def side_files(folder: Folder, patterns: Sequence[str] = SIDE_FILES) -> tuple[SideFile, ...]:
    """The small files that belong to a model (or files that match other patterns), sorted by name."""
    names = sorted(name for name in folder.names if matches(name, patterns) and is_inside(name))
    return tuple(SideFile(name=name, file=file) for name in names if (file := folder.find(name)) is not None)


def has_vocabulary(files: Sequence[SideFile]) -> bool:
    """Whether a model's side files hold a tokenizer."""
    return any(matches(file.name, _VOCABULARIES) for file in files)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name relative to a folder matches one of the patterns. `*` does not match '/'."""
    return any(fnmatch.fnmatchcase(name, p) for p in patterns if name.count("/") == p.count("/"))


def is_inside(name: str) -> bool:
    """Whether a file name from an index file stays inside its folder."""
    if not name or not name.isprintable() or "\\" in name or name.startswith(("/", "~")):
        return False
    # A drive letter makes a path absolute on Windows.
    return posixpath.normpath(name) == name and name.split("/")[0] not in ("", ".", "..") and ":" not in name
