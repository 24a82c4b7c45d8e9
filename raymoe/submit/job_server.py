"""Connects to the job server of a Ray cluster: its address, its token, and the problem if it does not answer.

Ray's own client has no timeouts, and prefers the environment's address over its argument. So everything is settled here
before it is created.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from raymoe.errors import Problem, ProblemReport
from raymoe.submit.timeouts import REACH_TIMEOUT_S

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# These loggers report each package and connection.
_NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ADDRESS_REMEDY = (
    "check --address (http://HEAD:8265, the dashboard's port) and that the cluster runs with ray[default]; a head that "
    "can't be reached from here is reached through `ray dashboard`, ssh -L or kubectl port-forward"
)
_TOKEN_REMEDY = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it (on the head: ray get-auth-token)"


def job_server(address: str | None, token: str | None) -> JobSubmissionClient:
    """A client of the job server at `address`; None: as the environment says, else on this machine.

    Raises ProblemReport if no server answers there, if it is not a job server, or if it rejects the token.
    """
    url = _url(address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or _DEFAULT_ADDRESS)
    headers = _headers(token or _named_token())
    status = _probe_job_server(url, headers)
    if status == 401 and (found := _token_in_home()):  # sent only to servers that require a token
        headers = _headers(found)
        status = _probe_job_server(url, headers)
    if status == 401:
        raise _problem(url, "the cluster requires a token, and there is none here", _TOKEN_REMEDY)
    if status == 403:
        raise _problem(url, "the cluster refuses the token", _TOKEN_REMEDY)
    if status != 200:
        raise _problem(url, f"no job server of Ray answers there (HTTP status {status})", _ADDRESS_REMEDY)
    from ray.job_submission import JobSubmissionClient

    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # in Ray, it overrules the argument
    try:
        return JobSubmissionClient(url, headers=headers)
    except (RuntimeError, OSError) as error:
        raise _problem(url, str(error).splitlines()[0], _ADDRESS_REMEDY) from error


def _problem(url: str, what: str, remedy: str) -> ProblemReport:
    return ProblemReport([Problem(where=f"Ray at {url}", what=what, remedy=remedy)])


def _url(address: str) -> str:
    """`http://host:port` of an address. Ray's other kinds (`auto`, ray://) are not addresses of a job server."""
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or parts.scheme == "https")
    except ValueError:  # a port that is not a number, an unclosed bracket
        sound = False
    if not sound:
        what = "this is not the address of a job server"
        raise ProblemReport([Problem(where=f"Ray at {address}", what=what, remedy="write http://HEAD:8265")])
    return url.rstrip("/")


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _named_token() -> str | None:
    """The token that the environment gives, as Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the token can't be read: {getattr(error, 'strerror', None) or 'it is no text'}"
        raise ProblemReport([Problem(where=f"RAY_AUTH_TOKEN_PATH={path}", what=what, remedy=_TOKEN_REMEDY)]) from None


def _token_in_home() -> str | None:
    try:
        return (Path.home() / ".ray/auth_token").read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None


def _probe_job_server(url: str, headers: dict[str, str]) -> int:
    """The HTTP status of a first request."""
    import requests

    try:
        answer = requests.get(f"{url}/api/version", headers=headers, timeout=REACH_TIMEOUT_S)
    except requests.exceptions.Timeout:
        raise _problem(url, f"no answer within {REACH_TIMEOUT_S} s", _ADDRESS_REMEDY) from None
    except requests.exceptions.SSLError:
        raise _problem(url, "its certificate is not trusted", "set REQUESTS_CA_BUNDLE to your authority's") from None
    except requests.exceptions.RequestException as error:
        raise _problem(url, f"it can't be reached: {_reason(error)}", _ADDRESS_REMEDY) from None
    if answer.status_code == 200 and "ray_version" not in answer.text:
        return 404  # another kind of server
    return answer.status_code


def _reason(error: BaseException) -> str:
    """The innermost text of requests' nested errors."""
    text = str(error)
    for messages in ("Connection refused", "Name or service not known", "No route to host", "Network is unreachable"):
        if messages in text:
            return messages
    return "no such host" if "resolve" in text else type(error).__name__
