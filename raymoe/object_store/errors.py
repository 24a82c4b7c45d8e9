"""The exceptions of object stores, and the messages of problems that the stores find themselves.

error_messages.py turns errors of client libraries into these. No message may hold a credential: normalized URLs have
none (urls.py), and every `Problem` is scrubbed (`raymoe.safe_text`).
"""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.errors import Problem, ProblemReport


class StorageError(ProblemReport):
    """An object store can't do a request, and retries did not help."""

    exit_code = 1


class ObjectMissing(StorageError):
    """There is no such object."""


class ObjectExists(StorageError):
    """An object exists where a new one was to be written."""


class ObjectChanged(StorageError):
    """An object is not the one that the merge was planned with."""


class UploadNotFound(StorageError):
    """A multipart upload was aborted, completed as something else, or never existed."""


class BucketMissing(StorageError):
    """There is no such bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """A request to a store. `operation` is the client's name of the call, as in `get_object`."""

    operation: str
    url: str
    source_url: str | None = None


def storage_problem(
    request: StoreRequest, what: str, remedy: str, kind: type[StorageError] = StorageError
) -> StorageError:
    """The error for one problem of a request."""
    return kind([Problem(where=request.url, what=what, remedy=remedy)])


def object_changed_error(request: StoreRequest, how: str) -> StorageError:
    """The error for an object (or the source of a copy) that is not the one that the merge was planned with."""
    which = f"the source {request.source_url}" if request.source_url else "the object"
    what = f"{which} is no longer what the merge was planned with: {how}"
    return storage_problem(request, what, "run the merge again when the object no longer changes", ObjectChanged)


def object_exists_error(url: str) -> StorageError:
    """The error for an existing object where a new one was to be written."""
    what, remedy = "there is an object of this name already", "choose another output, or allow overwriting"
    return ObjectExists([Problem(where=url, what=what, remedy=remedy)])


def object_replaced_error(url: str) -> StorageError:
    """The error for an object that was replaced right after it was written."""
    what = "the object was replaced as soon as it had been written, by another run or another program"
    remedy = "run the same command again, and nothing else that writes to this output"
    return StorageError([Problem(where=url, what=what, remedy=remedy)])


def wrong_size_error(url: str, size: int | None, expected: int) -> StorageError:
    """The error for an object with another size than the sum of its parts."""
    found = "it is not there" if size is None else f"it has {size} bytes"
    what = f"the object was assembled from {expected} bytes in parts, but {found}"
    remedy = "run the same command again when nothing else writes to this place; else don't use this store"
    return StorageError([Problem(where=url, what=what, remedy=remedy)])
