"""Makes the output object of a merge from the location that a user names."""

from __future__ import annotations

from pathlib import Path

from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.location import Location, LocationKind
from raymoe.object_store.options import StorageOptions
from raymoe.storage.locations import is_in_job_package
from raymoe.storage.outputs.fsspec import StreamOutput
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.outputs.s3 import S3Output

_EXAMPLE = "name a folder, or a URL such as s3://bucket/prefix"


def writable_location(text: str | Path, where: str, *, example: str = _EXAMPLE) -> Location:
    """The location that a user names for writing. Raises ProblemReport if nothing can be written to such a location.
    Existing files are not checked.

    `where` is the argument or option that names it; `example` is what to write instead.
    """
    try:
        location = Location.parse(text)
    except ValueError as error:
        raise ProblemReport([Problem(where=where, what=str(error), remedy=example)]) from None
    if problem := unwritable_problem(location, where, example):
        raise ProblemReport([problem])
    return location


def unwritable_problem(location: Location, where: str, example: str) -> Problem | None:
    """The problem of a kind of location that nothing permanent can be written to; None if there is none."""
    if location.is_web_address:
        remedy = f"{example}; the address of an S3 server is set as storage.endpoint or AWS_ENDPOINT_URL"
        return Problem(where=where, what=f"nothing can be written to {location}: HTTP is for reading", remedy=remedy)
    if location.kind is LocationKind.HUB:
        what = "files are not written to the Hub one by one"
        return Problem(where=where, what=what, remedy=f"{example}, and publish it with `raymoe push`")
    if location.kind.is_local and is_in_job_package(location.text):
        what = f"{location} is in the working directory of a Ray job, which Ray deletes when the job has ended"
        remedy = "name a URL in a bucket, or the whole path of a place that stays, in a folder that the nodes share"
        return Problem(where=where, what=what, remedy=remedy)
    return None


def open_output(location: Location, storage: StorageOptions, run: str = "") -> Output:
    """The output at a location; an actor names the `run` that it works for."""
    if location.kind.is_local:
        return LocalOutput(Path(location.text), run)
    store_output = S3Output if location.kind is LocationKind.S3 else StreamOutput
    return store_output(location.text, storage, run)
