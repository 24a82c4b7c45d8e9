"""Options for reaching an object store. Plain data: it is pickled to actors and may be shown and recorded anywhere.

There is deliberately no field for a key, a secret or a token. Each process finds credentials where all tools of its
cloud look for them (environment, ~/.aws, an instance's role), so none can leak into a job record or a message.
"""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.urls import check_no_secrets

_CHECKSUMS = (None, "sha256")
_MAX_REQUESTS = 10_000
_COPIES, _MOST_COPIES = 64, 128  # initial and maximum; a copy keeps the server busy, not this process
_MAX_SECONDS = 10**9  # the limit of system timers


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """Options of an object store. None means: from the usual environment (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL,
    AWS_REGION, AWS_PROFILE) and ~/.aws/config.

    `max_requests`: concurrent requests per process. `max_copies`: concurrent server-side copies per node; None: 64 at
    first, fewer if the store asks for it, and up to 128 while copies take no longer than at first. `read_timeout_s`:
    how long a server may stay silent. `deadline_s`: limit for one call with all its retries. `checksum`: how a finished
    output is checked by reading it back (None: sizes and part digests only). `anonymous` sends no credentials, for
    public buckets.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    max_requests: int = 16
    max_copies: int | None = None
    read_timeout_s: float = 300
    deadline_s: float = 900
    checksum: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name in ("max_requests", "max_copies"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MAX_REQUESTS:
                what = f"{_format_number(value)} is not a number from 1 up to {_MAX_REQUESTS}"
                problems.append(_problem(name, what, "leave it out"))
        for name in ("read_timeout_s", "deadline_s"):
            if not 0 < getattr(self, name) <= _MAX_SECONDS:
                what = f"{_format_number(getattr(self, name))} is not a time over 0 seconds, up to {_MAX_SECONDS}"
                problems.append(_problem(name, what, "leave it out"))
        for name in ("region", "profile"):
            try:
                check_no_secrets(getattr(self, name) or "")
            except ValueError as error:
                problems.append(_problem(name, str(error), "write its name, and set credentials as for the AWS CLI"))
        if self.checksum not in _CHECKSUMS:
            what = f"unknown checksum {self.checksum!r}"
            problems.append(_problem("checksum", what, "write sha256, or leave it out"))
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            # The value is not shown: it may contain credentials.
            what, remedy = "the endpoint is not an http:// or https:// URL", "write https://host[:port]"
            problems.append(_problem("endpoint", what, remedy))
        elif self.endpoint is not None and ("@" in self.endpoint or "?" in self.endpoint):
            what = "the endpoint holds more than an address; credentials don't belong there"
            remedy = "write https://host[:port], and set credentials as for the AWS CLI"
            problems.append(_problem("endpoint", what, remedy))
        if problems:
            raise ProblemReport(problems)

    @property
    def copy_slots(self) -> tuple[int, int]:
        """Concurrent copies per process: initial and maximum."""
        return (_COPIES, _MOST_COPIES) if self.max_copies is None else (self.max_copies, self.max_copies)


def _format_number(number: float) -> str:
    """A number as text, or a placeholder for an integer that is too long to print."""
    return f"{number}" if abs(number) < 2**64 or isinstance(number, float) else "this"


def _problem(name: str, what: str, remedy: str) -> Problem:
    return Problem(where=f"storage.{name}", what=what, remedy=remedy)
