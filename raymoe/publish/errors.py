"""Turns errors of the Hub into messages: a ProblemReport before anything is sent, and `PushFailed` afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raymoe.errors import CheckpointError, Problem, ProblemReport, RaymoeError
from raymoe.sources.hub_errors import error_reason, first_line, is_network_error, is_xet_error

TOKEN_REMEDY = "run `hf auth login`, or set HF_TOKEN; a token with write access is made on {endpoint}/settings/tokens"


class PushFailed(RaymoeError):
    """A push that had begun could not be finished; the message says what happened, and that it can be resumed."""


@contextmanager
def translate_preflight_errors(where: str) -> Iterator[None]:
    """Turn errors of the library into a ProblemReport about `where`; nothing has been sent."""
    try:
        yield
    except RaymoeError:
        raise
    except Exception as error:
        if (described := _describe(error)) is None:
            raise
        what, remedy = described
        raise ProblemReport([Problem(where=where, what=what, remedy=remedy)]) from error


@contextmanager
def translate_upload_errors(where: str, progress: Callable[[], str]) -> Iterator[None]:
    """Turn errors of the library into PushFailed; `progress` says what has been sent so far."""
    try:
        yield
    except CheckpointError as error:  # a file of the output that can't be read, or has changed
        problem = error.problems[0]
        text = f"{where}: {problem.where}: {problem.what}; {progress()}"
        raise PushFailed(f"{text}\n    -> {problem.remedy}" if problem.remedy else text) from error
    except RaymoeError:
        raise
    except Exception as error:
        if (described := _describe(error)) is None:
            raise
        what, remedy = described
        raise PushFailed(f"{where}: {what}; {progress()}\n    -> {remedy}") from error


def _describe(error: BaseException) -> tuple[str, str] | None:
    """What happened and what to do, from the first error in the chain that is about the Hub; None if there is none."""
    again = "run the same command again to resume"
    for cause in _chain(error):
        if described := _library_error(cause, again):
            return described
        if is_xet_error(cause):
            remedy = f"{again}; HF_HUB_DISABLE_XET=1 uses the older protocol, for servers without Xet storage"
            return f"the upload to Xet storage failed ({first_line(cause)})", remedy
        if is_network_error(cause):
            return (
                f"the Hub can't be reached ({error_reason(cause)})",
                f"check the network and HF_ENDPOINT, then {again}",
            )
        if isinstance(cause, OSError):
            # An error of writing to an open file has no name.
            place = f"{cause.filename}: " if cause.filename else ""
            return f"{place}{cause.strerror or first_line(cause)}", again
    return None


def _library_error(error: BaseException, again: str) -> tuple[str, str] | None:
    from huggingface_hub import constants, errors

    token = TOKEN_REMEDY.format(endpoint=constants.ENDPOINT)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no token for the Hub was found", token
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be sent", "unset HF_HUB_OFFLINE"
    if isinstance(error, errors.HFValidationError):
        return first_line(error), "name the repository as org/name"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such branch", "name a branch; a missing branch is created from main"
    if status is None:  # not all HTTP errors have the library's own type
        return None
    text = f" ({message})" if (message := _server_message(error)) else ""
    if status == 401:
        return f"the Hub refuses the token{text}", token
    if status in (402, 403):
        return f"the Hub does not allow it{text}", f"use a token with write access: {token}"
    if status == 412:
        return "another commit changed the repository meanwhile", "look at its history; " + again
    if status == 429:
        return f"the rate limit of the Hub is reached{text}", f"wait, then {again}"
    return f"the Hub answered {status}{text}", again if status >= 500 else f"correct that, then {again}"


def _server_message(error: BaseException) -> str:
    """The Hub's own message on one line; empty if it has none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    message = headers.get("X-Error-Message") or getattr(error, "server_message", None) or ""
    return " ".join(message.split())


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
