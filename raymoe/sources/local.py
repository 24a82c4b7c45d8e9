"""A checkpoint in a local folder (also one of the Hub cache's snapshot folders, whose files are symlinks)."""

from __future__ import annotations

import os
from pathlib import Path

from raymoe.sources.folder import unusable
from raymoe.sources.types import SourceFile

__all__ = ["LocalFolder", "stat_file"]


class LocalFolder:
    """Implements `Folder` on the file system. Locations are absolute paths; symlinks are kept as they are."""

    def __init__(self, path: str):
        self._path = os.path.abspath(os.path.expanduser(path))
        self.label = self._path
        self.revision: str | None = None
        self.bin_warning: str | None = None
        try:
            self.names: list[str] = sorted(self._list(""))
        except OSError as error:
            raise unusable(
                self.label, f"the folder can't be read: {error.strerror}", "check its permissions"
            ) from error

    def _list(self, prefix: str) -> list[str]:
        names: list[str] = []
        with os.scandir(os.path.join(self._path, prefix)) as entries:
            for entry in entries:
                if entry.is_file():  # follows symlinks; a broken one counts as missing
                    names.append(prefix + entry.name)
                elif not prefix and entry.name == "chat_templates" and entry.is_dir():
                    names.extend(self._list("chat_templates/"))
        return names

    def find(self, name: str) -> SourceFile | None:
        return stat_file(os.path.join(self._path, name))

    def read(self, file: SourceFile) -> bytes:
        return self.read_range(file, 0, file.size)

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        try:
            with open(file.location, "rb") as handle:
                handle.seek(start)
                return handle.read(end - start)
        except OSError as error:
            raise unusable(file.location, f"can't be read: {error.strerror}", "check its permissions") from error

    def local_path(self, file: SourceFile) -> Path:
        return Path(file.location)

    def missing_remedy(self, name: str) -> str:
        if os.path.islink(os.path.join(self._path, name)):
            return f"{name} is a symlink to nothing; download or copy the model again"
        return "complete the folder (download or copy the model again)"


def stat_file(path: str) -> SourceFile | None:
    """The regular file at an absolute path, or None."""
    if not os.path.isfile(path):
        return None
    return SourceFile(location=path, size=os.stat(path).st_size)
