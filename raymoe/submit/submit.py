"""`raymoe submit`: packs a merge, sends it to a cluster, and follows it there."""

from __future__ import annotations

import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.console import say
from raymoe.errors import MergeFailed
from raymoe.submit.job_log import exit_code, follow
from raymoe.submit.job_spec import CONFIG_NAME, Job
from raymoe.submit.timeouts import JOB_AGENT_PAUSES_S

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# The job server's reply if it knows no node agent that could start the job; it has waited for one itself.
_NO_AGENT = "No available agent"


class StoppedFollowing(MergeFailed):
    """Ctrl-C while a job is followed. The job itself goes on."""


def send_job(client: JobSubmissionClient, job: Job, *, install: bool) -> str:
    """Submit a job and return its id. With `install`, this raymoe's code is sent too; else the cluster's own is run."""
    name = f"raymoe-{job.digest[:8]}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="raymoe-submit-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(job.config, encoding="utf-8")
        runtime_env: dict[str, Any] = {"working_dir": folder}
        if install:
            runtime_env |= {"py_modules": [str(Path(__file__).parents[1])], "excludes": ["__pycache__"]}
        try:
            _submit(client, name, entrypoint=job.entrypoint, runtime_env=runtime_env, metadata=job.metadata)
        except (RuntimeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if _NO_AGENT in reason:
                reason = (
                    f"no node had a job agent in {len(JOB_AGENT_PAUSES_S) + 1} tries. The head has just started, is "
                    "overloaded, or its agent has died (dashboard_agent.log on the head): submit again when `ray "
                    "status` answers"
                )
            raise MergeFailed(f"the cluster did not take the job: {reason}") from error
    return name


def _submit(client: JobSubmissionClient, name: str, **request: Any) -> None:
    """Submit a job; retry after a pause while no node has an agent for it, as just after a cluster's start."""
    for pause in (*JOB_AGENT_PAUSES_S, None):
        try:
            client.submit_job(submission_id=name, **request)
            return
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or pause is None:
                raise
        say(f"the cluster has no agent for the job yet; next try in {pause:g} s")
        time.sleep(pause)
        if _is_known(client, name):  # the job was accepted, only the reply came too late
            return


def _is_known(client: JobSubmissionClient, name: str) -> bool:
    try:
        client.get_job_info(name)
    except RuntimeError:
        return False
    return True


def follow_job(client: JobSubmissionClient, name: str, job: Job) -> int:
    """Print a job's log until it ends, and say how it ended; returns its driver's exit status."""
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
    if details.driver_exit_code is None:  # Ray has information that is not in the log
        say(f"job {name}: {details.status.lower()}: {details.message}")
    if code != 2:
        say(f"the merge to {job.output} is not finished; submit it again to resume from the finished shards")
    return code
