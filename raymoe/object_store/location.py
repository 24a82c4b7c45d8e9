"""Kinds of locations. A location's text is parsed here, once; all other code compares kinds.

text that a user gives --Location.parse--> Location(text, kind)      outputs, results, checkpoints
SourceFile.location    --LocationKind.of--> SourceFile.kind          when the file is found

/absolute/path, file:///absolute/path   LOCAL
s3://, s3a://                           S3: copies ranges of its objects itself
gs://, memory://, https://, ...         OTHER_STORE: whatever fsspec reaches
hf://org/name@<commit>/file             HUB: a file of a Hub repository, read from the Hub's cache
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from raymoe.object_store.urls import check_spelling, is_s3, is_url, local_path, normalize_url, split_url


class LocationKind(Enum):
    """The kind of a location, which decides how it is read and written."""

    LOCAL = "local"
    S3 = "s3"
    OTHER_STORE = "other store"
    HUB = "hub"

    @classmethod
    def of(cls, text: str) -> LocationKind:
        """The kind of a path or URL, also of one that is not in normal form. Never raises."""
        if is_s3(text):
            return cls.S3
        if is_url(text):
            return cls.OTHER_STORE if local_path(text) is None else cls.LOCAL
        return cls.HUB if split_url(text)[0] else cls.LOCAL

    @property
    def is_local(self) -> bool:
        """Whether it is a path of a machine."""
        return self is LocationKind.LOCAL

    @property
    def is_object(self) -> bool:
        """Whether it is in an object store, S3 or another; `open_store` reads and writes it."""
        return self in (LocationKind.S3, LocationKind.OTHER_STORE)


@dataclass(frozen=True, slots=True)
class Location:
    """A location that a user names: an absolute path, or a URL in normal form, which holds no credentials."""

    text: str
    kind: LocationKind

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str | Path) -> Location:
        """Parse a location as a user writes it. A file:// URL becomes its path.

        Args:
            text: a path, relative to the working directory or with '~' for the home folder, or a URL.

        Returns:
            The location. Nothing is looked for there.

        Raises:
            ValueError: a URL that is misspelt or holds credentials, with a message for the user.

        Example:
            >>> Location.parse("s3a://bucket/folder/")
            Location(text='s3://bucket/folder', kind=<LocationKind.S3: 's3'>)
        """
        name = str(text)
        check_spelling(name)
        if is_url(name):
            return cls.of(normalize_url(name))
        kind = LocationKind.of(name)
        return cls(str(Path(text).expanduser().absolute()) if kind.is_local else name.strip(), kind)

    @classmethod
    def of(cls, name: str) -> Location:
        """The same for an absolute path or a URL in normal form, which is not checked again."""
        return cls(local_path(name) or name, LocationKind.of(name))

    @property
    def is_web_address(self) -> bool:
        """Whether it is read by HTTP, and so can't be written to."""
        return split_url(self.text)[0] in ("http", "https")

    def join(self, name: str) -> Location:
        """The location of a file in this folder; `name` has '/' for subfolders."""
        return Location(f"{self.text.rstrip('/')}/{name}", self.kind)


def is_relative(text: str) -> bool:
    """Whether a location as a user writes it depends on the working directory or the home folder."""
    return not is_url(text) and not Path(text).is_absolute()
