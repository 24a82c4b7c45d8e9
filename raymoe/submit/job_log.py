"""Follows a job: its log as it grows, and how it ended.

The log is read over a connection that a proxy may cut at any time; reading resumes where it stopped. If the head does
not come back, following ends, but the job does not.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any

from raymoe.errors import MergeFailed
from raymoe.safe_text import printable
from raymoe.submit.timeouts import LOG_PAUSE_S, LOG_RECONNECT_TIMEOUT_S

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def follow(client: JobSubmissionClient, job: str) -> Any:
    """Print the log of a job to standard output until it ends; returns Ray's `JobDetails` of it.

    Raises MergeFailed if the job server does not answer for a minute.
    """
    log = _LogPrinter()
    passing: tuple[type[Exception], ...] = (RuntimeError, OSError, *_connection_errors())
    last_answer = time.monotonic()
    while True:
        try:
            asyncio.run(log.tail(client, job))
            details = client.get_job_info(job)
            last_answer = time.monotonic()
            if details.status.is_terminal():
                return details
        except passing as error:
            if time.monotonic() - last_answer > LOG_RECONNECT_TIMEOUT_S:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise MergeFailed(
                    f"the cluster's head has not answered for {LOG_RECONNECT_TIMEOUT_S:.0f} s ({why}). If it lives, "
                    f"the job goes on: ray job logs --follow {job}"
                ) from error
        time.sleep(LOG_PAUSE_S)


def exit_code(details: Any) -> int:
    """The driver's exit status; 128 plus the signal's number if a signal ended it, 1 if it never ran."""
    code: int | None = details.driver_exit_code
    if code is None:
        return 0 if details.status == "SUCCEEDED" else 1
    return code if code >= 0 else 128 - code


def _connection_errors() -> tuple[type[Exception], ...]:
    import aiohttp
    import requests

    return (aiohttp.ClientError, requests.exceptions.RequestException)


class _LogPrinter:
    """Keeps track of the printed part of the log: a new connection starts with the first line again."""

    def __init__(self) -> None:
        self._printed = 0

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        """Print new text until the connection ends."""
        to_skip = self._printed
        async for text in client.tail_job_logs(job):
            new = text[to_skip:]
            to_skip = max(0, to_skip - len(text))
            sys.stdout.write(printable(new))
            sys.stdout.flush()
            self._printed += len(new)
