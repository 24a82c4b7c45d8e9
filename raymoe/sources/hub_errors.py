"""What huggingface_hub raises, as problems for the user: what happened to which repository, and what to do.

The library's own error classes are the same from 0.30 to 2, but the HTTP library below it is not (requests,
httpx, httpx2), and neither is a dependency of ours: network errors are told by the module that they come
from.
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
    """Turn what the library raises for a repository (and a file of it) into a CheckpointError."""
    try:
        yield
    except Exception as error:
        problem = _problem(error, repo, revision, name)
        if problem is None:
            raise
        raise CheckpointError([problem]) from error


def _problem(error: Exception, repo: str, revision: str | None, name: str) -> Problem | None:
    """What a person has to know of an error of the library; None for one that is not about the Hub."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)) or status == 401:
        return _repository_problem(error, repo, revision)  # of all its files alike
    where = f"{repo}@{revision}" if revision else repo
    where = f"{where}/{name}" if name else where
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        # Why it could not be fetched.
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

    # Order matters: the library derives 'gated' from 'not found'.
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
    """Whether an error is one of a connection, and not an answer of the Hub."""
    # requests' errors are OSErrors and httpx's are not.
    known = isinstance(error, (ConnectionError, TimeoutError))
    return known or type(error).__module__.split(".")[0] in _HTTP_MODULES


def is_xet_error(error: BaseException) -> bool:
    """Whether an error is one of hf_xet, which moves the bytes of what the Hub keeps in its Xet storage.

    Its two own types are OSErrors (of a token, of an object that is not there), so this is asked before those. All
    else that goes wrong there is a plain RuntimeError or ConnectionError, and only the text tells where from
    (`CAS Client Error: ...`). Errors of the system, whose paths may have any name in them, have a number.
    """
    kind = type(error)
    if kind.__module__.split(".")[0] == "hf_xet" or kind.__name__.startswith("Xet"):
        return True
    is_plain = isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None)
    return is_plain and kind.__module__ == "builtins" and _XET_WORDS.search(str(error)) is not None


def error_reason(error: BaseException) -> str:
    """The operating system's own words where they are at the bottom of it; else the first line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
