"""Lists the files of an output, decides which of them form a checkpoint, and what prevents a merge into it.

The rules are the same for a folder and for an object store. A back end lists, reads and removes files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from raymoe.errors import Problem
from raymoe.object_store.errors import ObjectMissing
from raymoe.object_store.protocol import ObjectInfo, ObjectStore
from raymoe.object_store.urls import join_url
from raymoe.storage.base_journal import BaseJournal
from raymoe.storage.file_names import (
    INDEX_NAME,
    JOURNAL,
    MAX_RESULT_BYTES,
    RECORD_NAME,
    RESULT_NAME,
    FinishedMerge,
    is_part_of_a_model,
    is_recorded_file,
    is_result,
    json_object,
)
from raymoe.untrusted_files import MAX_JSON_BYTES

_Answer = TypeVar("_Answer")
_SWEEPS = 3
_TEMPLATES = "chat_templates"  # the only folder in which readers look for a part of a model


class OutputFiles(ABC):
    """The files of one output. `noun` and `here` name the output and its location in messages."""

    noun, here = "output", "here"

    def __init__(self, location: str) -> None:
        self.location = location

    @abstractmethod
    def entries(self) -> Mapping[str, int | None]:
        """The sizes of the files here, by name, without the journal; None for entries that are not files."""

    @abstractmethod
    def size_of(self) -> Callable[[str], int | None]:
        """A function that gives a file's size by its name; None if there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file; None if it does not exist or can't be read."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file."""

    @abstractmethod
    def place(self, name: str) -> str:
        """The path or URL of a file."""

    @abstractmethod
    def _is_removable(self, name: str, entries: Mapping[str, int | None]) -> bool:
        """Whether there is a file (or a link) of that name in this output."""

    def record(self) -> dict[str, Any]:
        """The record of the merge that is here; empty if there is none."""
        return json_object(self.read(RECORD_NAME) or b"")

    def recorded_files(self) -> list[str]:
        """Names of the files that an earlier merge wrote, if its record can be read."""
        files = self.record().get("files")
        names = files if isinstance(files, (dict, list)) else ()
        return [name for name in names if is_recorded_file(name)]

    def finished_merge(self, journal: BaseJournal) -> FinishedMerge | None:
        """The finished merge that is here, by its record; None if there is none, or if a merge has begun to replace
        it."""
        is_journal_there = journal.exists
        found = FinishedMerge.of(self.record())
        if found is not None and is_journal_there and (journal.digest() != found.digest or journal.is_clearing):
            return None
        return found

    def visible_files(self) -> list[str]:
        """Names of all files but the journal's. Empty if there are only results of earlier runs."""
        entries = self.entries()
        return [] if all(self._is_result(name, size) for name, size in entries.items()) else [*entries]

    def other_model_files(self, own: Container[str]) -> list[str]:
        """Files that readers would take for a part of the model here and that are not among `own`. The index is not
        included: an earlier run of the same merge may have written it."""
        names = (name for name, size in self.entries().items() if size is not None and name != INDEX_NAME)
        return sorted(name for name in names if is_part_of_a_model(name) and name not in own)

    def problems(self, journal: BaseJournal, finished: FinishedMerge | None, digest: str | None) -> list[Problem]:
        """The reasons that prevent a merge into this output. Only an unfinished run of this very plan may resume; a
        finished merge of this very plan is complete, unless its files have changed. `finished` is
        `finished_merge(journal)`. `digest` None: the plan has problems."""
        if finished is not None and finished.digest == digest:
            return finished.problems(self.location, self.size_of())
        if journal.exists:
            return self._unfinished_problems(journal, digest)
        names = self.visible_files()
        if not names:
            return []
        what = f"the {self.noun} holds a finished merge" if RECORD_NAME in names else f"the {self.noun} is not empty"
        return [self._problem(what, "use --overwrite to replace it, or choose another output")]

    def _unfinished_problems(self, journal: BaseJournal, digest: str | None) -> list[Problem]:
        there = journal.digest()
        if digest is None:
            return []
        if there == digest:
            return self._foreign_record_problems(journal)
        what = f"an unfinished merge of another plan (other config, sources, seed or shard size) is {self.here}"
        if there is None:
            what = f"an unfinished merge of another version of raymoe is {self.here}, or its journal is damaged"
        return [self._problem(what, "use --overwrite to discard it, or choose another output")]

    def _foreign_record_problems(self, journal: BaseJournal) -> list[Problem]:
        """The problem of another plan's record next to an unfinished merge, for outputs without a lock."""
        return []

    def _problem(self, what: str, remedy: str) -> Problem:
        return Problem(where=self.location, what=what, remedy=remedy)

    def remove_checkpoint(self, check: Callable[[], object] = lambda: None) -> None:
        """Remove the files that --overwrite replaces, record and index first, so that the rest never looks complete.
        Other files belong to other programs, and stay.

        `check` is called before each removal, and raises if another run has taken over. Files that an older run was
        just making visible may appear meanwhile, so the files are listed again.
        """
        for _ in range(_SWEEPS):
            names = self._checkpoint_files()
            for name in names:
                check()
                self.remove(name)
            if not names:
                return

    def _checkpoint_files(self) -> list[str]:
        entries = self.entries()
        result = [RESULT_NAME] if self._is_result(RESULT_NAME, entries.get(RESULT_NAME)) else []
        recorded = [name for name in self.recorded_files() if name != RESULT_NAME]  # other result files are the user's
        names = dict.fromkeys((RECORD_NAME, INDEX_NAME, *result, *recorded, *filter(is_part_of_a_model, entries)))
        return [name for name in names if self._is_removable(name, entries)]

    def _is_result(self, name: str, size: int | None) -> bool:
        if size is None or size > MAX_RESULT_BYTES or "/" in name or is_part_of_a_model(name):
            return False
        return is_result(self.read(name) or b"")


class FolderFiles(OutputFiles):
    """The files of a local folder. Targets of links are never changed."""

    noun, here = "output folder", "in this folder"

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self._root = root

    def entries(self) -> Mapping[str, int | None]:
        there = [*self._root.iterdir()] if self._root.is_dir() else []
        there += (self._root / _TEMPLATES).glob("*")
        names = {path.relative_to(self._root).as_posix(): path for path in there if path.name != JOURNAL}
        return {name: 0 if _is_odd_link(path) else file_size(path) for name, path in sorted(names.items())}

    def size_of(self) -> Callable[[str], int | None]:
        return lambda name: file_size(self._root / name)

    def read(self, name: str) -> bytes | None:
        path = self._root / name
        try:
            return path.read_bytes() if path.stat().st_size <= MAX_JSON_BYTES else None
        except OSError:
            return None

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def place(self, name: str) -> str:
        return str(self._root / name)

    def _checkpoint_files(self) -> list[str]:
        templates = [_TEMPLATES] if (self._root / _TEMPLATES).is_symlink() else []
        return [*super()._checkpoint_files(), *templates]

    def _is_removable(self, name: str, entries: Mapping[str, int | None]) -> bool:
        path = self._root / name
        between = [parent for parent in path.parents if parent.is_relative_to(self._root) and parent != self._root]
        if any(parent.is_symlink() or not parent.is_dir() for parent in between):
            return False
        return path.is_symlink() or (path.exists() and not path.is_dir())


class StoreFiles(OutputFiles):
    """The objects under a prefix of an object store."""

    def __init__(self, store: ObjectStore, location: str) -> None:
        super().__init__(location)
        self.store = store
        self._seen: dict[tuple[Callable[[str], Any], str], Any] | None = None

    @contextmanager
    def one_look(self) -> Iterator[None]:
        """What is asked for in this context is asked for once. For checks that are about one moment."""
        self._seen = {}
        try:
            yield
        finally:
            self._seen = None

    def _ask(self, request: Callable[[str], _Answer], url: str) -> _Answer:
        if self._seen is None:
            return request(url)
        if (request, url) not in self._seen:
            self._seen[request, url] = request(url)
        answer: _Answer = self._seen[request, url]
        return answer

    def entries(self) -> Mapping[str, int | None]:
        found = self._ask(self.store.list, self.location)
        return {entry.name: entry.size for entry in found if not entry.name.startswith(f"{JOURNAL}/")}

    def stat(self, name: str) -> ObjectInfo | None:
        """A file's size and ETag; None if there is none."""
        return self._ask(self.store.stat, self.place(name))

    def size_of(self) -> Callable[[str], int | None]:
        return self.entries().get

    def read(self, name: str) -> bytes | None:
        return self._ask(self._read, self.place(name))

    def _read(self, url: str) -> bytes | None:
        try:
            return self.store.read_all(url)
        except ObjectMissing:
            return None

    def remove(self, name: str) -> None:
        self.store.delete(self.place(name))

    def place(self, name: str) -> str:
        return join_url(self.location, name)

    def _is_removable(self, name: str, entries: Mapping[str, int | None]) -> bool:
        return name in entries

    def _foreign_record_problems(self, journal: BaseJournal) -> list[Problem]:
        """As in the base class. A run that ends normally leaves no such record."""
        if self.stat(RECORD_NAME) is None or journal.is_clearing:
            return []
        what = "a merge of another plan has ended here over the unfinished one of this plan; files of both may be here"
        return [self._problem(what, "use --overwrite to discard both, or choose another output")]


def file_size(path: Path) -> int | None:
    """Size of a file; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _is_odd_link(path: Path) -> bool:
    """Whether it is a link without a target file, at the name of a file of the model."""
    return path.is_symlink() and not path.is_file()
