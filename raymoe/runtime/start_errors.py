"""Explains why Ray can't be reached or started, with the remedy for each cause."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from raymoe.errors import Problem, ProblemReport
from raymoe.runtime.timeouts import REACH_TIMEOUT_S

_CLUSTER_REMEDY = (
    "check --address and RAY_ADDRESS, that the cluster runs, and that its token is known here (ray status)"
)
_TEMP_REMEDY = "set RAY_TMPDIR to a short folder that you may write to, such as /tmp/ray-$USER"
_HOME_REMEDY = "Ray keeps its token there: set HOME to a folder that you may write to"
_START_REMEDY = "Ray's own logs may say more: logs/ of the newest session in {}"


def reject_job_server(address: str) -> None:
    """Raises ProblemReport for the address of a job server, which Ray would take for a host name."""
    if address.lower().startswith(("http://", "https://")):
        raise ProblemReport([_job_server_problem(address)])


def check_port_open(address: str) -> None:
    """Raises OSError if nothing listens at `host:port`: Ray itself would keep trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # skips 'auto' and 'local', for which Ray searches
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()


def _job_server_problem(address: str) -> Problem:
    try:
        host = urlsplit(address).hostname or "HEAD"
    except ValueError:  # an unclosed bracket
        host = "HEAD"
    named = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") == address else "--address"
    remedy = f"send the merge there with `raymoe submit`, or name the cluster itself: {host}:6379 or ray://{host}:10001"
    if named == "RAY_ADDRESS":
        remedy += (
            "; without RAY_ADDRESS Ray is started on this machine (RAY_API_SERVER_ADDRESS is for submitting alone)"
        )
    return Problem(where=named, what="this is the address of a cluster's job server", remedy=remedy)


def start_problem(error: BaseException, address: str | None) -> Problem:
    """The problem to report after `ray.init` failed; `address` is None if Ray was to start on this machine."""
    text = str(error).strip()
    reason = getattr(error, "strerror", None) or (text.splitlines() or [type(error).__name__])[0]
    if address:
        what = f"no cluster could be reached: {reason}"
        return Problem(where=f"Ray at {address}", what=what, remedy=_CLUSTER_REMEDY)
    file = getattr(error, "filename", None)
    folder = _temp_folder()
    if "AF_UNIX path" in text:
        reason, remedy = f"the path of its folder is too long for a socket: {folder}", _TEMP_REMEDY
    elif file is None and "RAY_AUTH_TOKEN" in text:
        remedy = "correct that variable, or unset it: Ray makes a token of its own"
    elif file is None:
        remedy = _START_REMEDY.format(folder)
    else:
        reason, remedy = f"{file}: {reason}", _HOME_REMEDY if _is_in_home(str(file)) else _TEMP_REMEDY
    return Problem(where="Ray on this machine", what=f"no cluster could be started: {reason}", remedy=remedy)


def _temp_folder() -> str:
    """The folder of Ray's sessions."""
    return os.path.join(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")


def _is_in_home(file: str) -> bool:
    try:
        home = Path.home() / ".ray"
    except RuntimeError:
        return False
    # The folder itself, its content, or a folder that would have to be created for it.
    return file == str(home) or Path(file).is_relative_to(home) or home.is_relative_to(file)
