"""What object stores raise: errors for people, and the words of those that the stores themselves find.

Errors of client libraries become these in error_messages.py. No message may hold a credential: URLs have none by their
normal form (urls.py), and every `Problem` is scrubbed (`raymoe.safe_text`).
"""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.errors import Problem, ProblemReport

__all__ = [
    "Asked",
    "BucketMissing",
    "ObjectChanged",
    "ObjectExists",
    "ObjectMissing",
    "StorageError",
    "UploadGone",
    "assembled_wrong",
    "object_changed",
    "object_exists",
    "object_replaced",
    "problem_at",
]


class StorageError(ProblemReport):
    """An object store can't do what it was asked for, and waiting did not help."""

    exit_code = 1


class ObjectMissing(StorageError):
    """There is no such object."""


class ObjectExists(StorageError):
    """There is an object where none was to be."""


class ObjectChanged(StorageError):
    """An object is not the one that was planned with."""


class UploadGone(StorageError):
    """A multipart upload was aborted, or completed as something else, or never was."""


class BucketMissing(StorageError):
    """There is no such bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a store was asked for. `operation` is the client's name of the call, as in `get_object`."""

    operation: str
    url: str
    source_url: str | None = None
    only_if_absent: bool = False


def problem_at(asked: Asked, what: str, remedy: str, kind: type[StorageError] = StorageError) -> StorageError:
    """The error of one problem of what was asked."""
    return kind([Problem(where=asked.url, what=what, remedy=remedy)])


def object_changed(asked: Asked, how: str) -> StorageError:
    """The error for an object (the source of a copy, where there is one) that is another than was planned with."""
    which = f"the source {asked.source_url}" if asked.source_url else "the object"
    what = f"{which} is no longer what was planned with: {how}"
    return problem_at(asked, what, "run the merge again when the object no longer changes", ObjectChanged)


def object_exists(url: str) -> StorageError:
    """The error for something in the way of an object that was to be new."""
    what, remedy = "there is an object of this name already", "choose another output, or allow overwriting"
    return ObjectExists([Problem(where=url, what=what, remedy=remedy)])


def object_replaced(url: str) -> StorageError:
    """The error for an object that is another a moment after it was written."""
    what = "the object was replaced as soon as it had been written, by another run or another program"
    remedy = "run the same command again, and nothing else that writes to this output"
    return StorageError([Problem(where=url, what=what, remedy=remedy)])


def assembled_wrong(url: str, size: int | None, expected: int) -> StorageError:
    """The error for an object that is not the sum of its parts."""
    found = "it is not there" if size is None else f"it has {size} bytes"
    what = f"the object was assembled from {expected} bytes in parts, but {found}"
    remedy = "run the same command again when nothing else writes to this place; else don't use this store"
    return StorageError([Problem(where=url, what=what, remedy=remedy)])
