"""Translates errors of huggingface_hub into problems for the user: what happened to which repository, and what to do.

The library's own error classes are the same from 0.30 to 2, but its HTTP library is not (requests, httpx, httpx2), and
raymoe depends on neither. So network errors are recognized by the module of their class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from raymoe.errors import CheckpointError, Problem

_XET_WORDS = re.compile(r"\bCAS\b|(?i:xet|reconstruction)")
_HTTP_MODULES = frozenset({"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"})


@contextmanager
def hub_errors(repo: str, revision: str | None, name: str = "") -> Iterator[None]:
    """Turn the library's errors about a repository (and a file of it) into a CheckpointError."""
    try:
        yield
    except Exception as error:
        problem = _problem(error, repo, revision, name)
        if problem is None:
            raise
        raise CheckpointError([problem]) from error


def _problem(error: Exception, repo: str, revision: str | None, name: str) -> Problem | None:
    """The problem that an error of the library stands for; None for an error that is not about the Hub."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)) or status == 401:
        return _repository_problem(error, repo, revision)  # the same for all its files
    where = f"{repo}@{revision}" if revision else repo
    where = f"{where}/{name}" if name else where
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # The reason why it could not be fetched.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        remedy = f"fetch it once online: `hf download {repo}`, or unset HF_HUB_OFFLINE"
        return Problem(where=where, what="offline, and the file is not in the Hub cache", remedy=remedy)
    if isinstance(error, errors.EntryNotFoundError):
        what, remedy = "the repository has no such file", "name another revision or model"
        return Problem(where=where, what=what, remedy=remedy)
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return Problem(where=where, what=f"the Hub answered {error_reason(error)}", remedy=_advice(status))
    if is_xet_error(error):
        remedy = "check the network, and the space of the Hub cache (HF_HOME); HF_HUB_DISABLE_XET=1 takes the older way"
        return Problem(where=where, what=f"the download from Xet storage failed ({first_line(error)})", remedy=remedy)
    if is_network_error(error):
        remedy = "check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 works with what is in the cache"
        return Problem(where=repo, what=f"the Hub can't be reached ({error_reason(error)})", remedy=remedy)
    if isinstance(error, OSError):
        remedy = "check the space and the permissions of the Hub cache (HF_HOME)"
        return Problem(where=where, what=f"the file can't be stored ({error_reason(error)})", remedy=remedy)
    return None


def _repository_problem(error: Exception, repo: str, revision: str | None) -> Problem:
    from huggingface_hub import constants, errors

    # Order matters: in the library, 'gated' is a subclass of 'not found'.
    if isinstance(error, errors.GatedRepoError):
        what = "the model is gated: its owner has to grant access"
        remedy = f"ask for access on its page ({constants.ENDPOINT}/{repo}), and use {_token()}"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"the model is on the Hub, but has no revision {revision!r}"
        remedy = "name one of its branches, tags or commits"
    elif "Invalid credentials" in str(error):
        what, remedy = "the Hub refuses the token", f"correct {_token()}"
    else:
        what = f"no folder {repo!r} here, and no such model on the Hub (or it is private)"
        remedy = f"check the spelling; a private model needs {_token()}"
    return Problem(where=repo, what=what, remedy=remedy)


def _token() -> str:
    from huggingface_hub import get_token

    return "the token in use (HF_TOKEN, or `hf auth login`)" if get_token() else "a token: set HF_TOKEN"


def _advice(status: int) -> str:
    if status == 403:
        return f"access needs {_token()}"
    return "the rate limit is reached: wait, or use a token" if status == 429 else "try again later"


def is_network_error(error: BaseException) -> bool:
    """Whether it is an error of a connection, not a reply of the Hub."""
    # requests' errors are OSErrors, httpx's are not.
    known = isinstance(error, (ConnectionError, TimeoutError))
    return known or type(error).__module__.split(".")[0] in _HTTP_MODULES


def is_xet_error(error: BaseException) -> bool:
    """Whether it is an error of hf_xet, which transfers files in the Hub's Xet storage.

    Its two own types are OSErrors (for a token, for a missing object), so call this before checks for those. Its other
    errors are plain RuntimeErrors or ConnectionErrors, and only the text shows their origin (`CAS Client Error: ...`).
    Errors of the operating system, which may contain any path, are recognized by their errno.
    """
    kind = type(error)
    if kind.__module__.split(".")[0] == "hf_xet" or kind.__name__.startswith("Xet"):
        return True
    is_plain = isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None)
    return is_plain and kind.__module__ == "builtins" and _XET_WORDS.search(str(error)) is not None


def error_reason(error: BaseException) -> str:
    """The operating system's message if it is the root cause; else the first line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
