"""Connects to Ray: to a running cluster, or to one that is started on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from raymoe.console import say
from raymoe.errors import MergeFailed, ProblemReport, RaymoeError
from raymoe.runtime.ray_compat import fewer_processes, silence_authentication_logger
from raymoe.runtime.ray_errors import cause_of, first_line
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.start_errors import check_port_open, reject_job_server, start_problem
from raymoe.signals import end_on_signal


@contextmanager
def ray_connection(settings: RuntimeSettings) -> Iterator[None]:
    """Connect to Ray: to the cluster at `address` or RAY_ADDRESS, else to one started here.

    An existing connection is used and stays open; a connection made here is closed at the end.
    """
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if settings.verbosity > 1 else logging.WARNING
    silence_authentication_logger()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {
        "address": settings.address,
        "namespace": "raymoe",
        "logging_level": level,
        "log_to_driver": settings.verbosity > 0,
    }
    address = settings.address or os.environ.get("RAY_ADDRESS")
    reject_job_server(address or "")
    if not address:
        options |= {"address": "local", "include_dashboard": False}
    if settings.verbosity >= 0:
        say(f"connecting to the Ray cluster at {address}" if address else "starting Ray on this machine")
    try:
        check_port_open(address or "")
        is_trimmed = nullcontext() if address else fewer_processes(prints_logs=options["log_to_driver"])
        with end_on_signal(), is_trimmed:
            ray.init(**options)
    except SystemExit:  # Ray's own SIGTERM handlers end a process this way, without a message
        raise KeyboardInterrupt from None
    except Exception as error:  # of any class: Ray raises a bare Exception if its own node starts too slowly
        raise ProblemReport([start_problem(error, address)]) from error
    try:
        yield
    except RayError as error:  # everything that no part of a merge can recover from, such as a lost head node
        cause = cause_of(error)
        if isinstance(cause, RaymoeError):
            raise cause from None
        raise MergeFailed(
            f"Ray failed: {type(cause).__name__}: {first_line(cause)}. Run the same command again to go on from the "
            "shards that are finished."
        ) from error
    finally:
        ray.shutdown()
