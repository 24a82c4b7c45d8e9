"""`raymoe submit`: packs a merge, sends it to a cluster, follows it there."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import raymoe
from raymoe.errors import MergeFailed
from raymoe.report.display import say
from raymoe.submit.follow import exit_code, follow
from raymoe.submit.job import CONFIG_NAME, Job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = ["StoppedFollowing", "follow_job", "send_job"]


class StoppedFollowing(MergeFailed):
    """Ctrl-C while a job is followed. The job itself goes on."""


def send_job(client: JobSubmissionClient, job: Job, *, install: bool) -> str:
    """Submit a job and return its id. With `install` this raymoe's code goes with it, else the cluster's own is run."""
    name = f"raymoe-{job.digest[:8]}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="raymoe-submit-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(job.config, encoding="utf-8")
        runtime_env: dict[str, Any] = {"working_dir": folder}
        if install:
            runtime_env |= {"py_modules": [str(Path(raymoe.__file__).parent)], "excludes": ["__pycache__"]}
        try:
            client.submit_job(
                entrypoint=job.entrypoint, submission_id=name, runtime_env=runtime_env, metadata=job.metadata
            )
        except (RuntimeError, OSError) as error:
            raise MergeFailed(f"the cluster did not take the job: {str(error).splitlines()[0]}") from error
    return name


def follow_job(client: JobSubmissionClient, name: str, job: Job) -> int:
    """Print a job's log until it ends, and say how it did; its driver's exit status."""
    try:
        details = follow(client, name)
    except KeyboardInterrupt:
        raise StoppedFollowing(
            f"no longer following; the job goes on.\n"
            f"  follow it:  ray job logs --follow {name}\n"
            f"  stop it:    ray job stop {name}"
        ) from None
    code = exit_code(details)
    if code == 0:
        say(f"result: {job.output}")
        return code
    if details.driver_exit_code is None:  # Ray has more to say than the log
        say(f"job {name}: {details.status.lower()}: {details.message}")
    if code != 2:
        say(f"the merge to {job.output} is not finished; submit it again to go on from the shards that are")
    return code
