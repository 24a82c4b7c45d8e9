"""What raymoe uses of Ray without a promise of Ray's is in the installed Ray."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import raymoe
from raymoe.runtime.ray_compat import (
    AUTHENTICATION_LOGGER,
    fewer_processes,
    free_resources_by_node,
    node_affinity,
    streaming_method,
)
from raymoe.submit.job_server import _NOISY_LOGGERS

_PRIVATE = ("ray._private", "ray.experimental", "ray.autoscaler", "_generator_backpressure", "_spill_on_unavailable")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ray._private.state", "available_resources_per_node"),
        ("ray.experimental.internal_kv", "_internal_kv_get"),
        ("ray.autoscaler.v2.utils", "is_autoscaler_v2"),
        ("ray.autoscaler.v2.sdk", "get_cluster_status"),
    ],
)
def test_functions_exist(module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(module), name))


def test_the_status_of_the_autoscaler_has_its_fields() -> None:
    from ray.autoscaler.v2 import schema

    fields = {
        kind: {field.name for field in dataclasses.fields(getattr(schema, kind))}
        for kind in ("ClusterStatus", "Stats", "NodeInfo")
    }
    assert {"active_nodes", "idle_nodes", "stats"} <= fields["ClusterStatus"]
    assert "autoscaler_version" in fields["Stats"] and "ray_node_type_name" in fields["NodeInfo"]


@pytest.mark.parametrize("logger", [AUTHENTICATION_LOGGER, *_NOISY_LOGGERS])
def test_modules_have_the_loggers(logger: str) -> None:
    """A logger is called as its module."""
    spec = find_spec(logger)
    assert spec is not None and spec.origin is not None
    assert "getLogger(__name__)" in Path(spec.origin).read_text()


def test_affinity_that_spills() -> None:
    soft, hard = (
        node_affinity("ab" * 28, hard=False, allow_spill=True),
        node_affinity("ab" * 28, hard=True, allow_spill=False),
    )
    assert (soft.soft, soft._spill_on_unavailable) == (True, True)
    assert (hard.soft, hard._spill_on_unavailable) == (False, False)


def test_a_stream_that_is_held_up() -> None:
    def pieces() -> Iterator[bytes]:
        yield b""

    held_up = streaming_method(4)(pieces)
    assert held_up.__ray_num_returns__ == "streaming"
    assert held_up.__ray_generator_backpressure_num_objects__ == 4


_START = """
import json, sys
import psutil, ray
from raymoe.runtime.connect import ray_connection
from raymoe.runtime.settings import RuntimeSettings
from tests.processes import arguments

with ray_connection(RuntimeSettings(verbosity=int(sys.argv[1]))):
    f = ray.remote(lambda: 1)
    lines = [" ".join(arguments(process)) for process in psutil.Process().children(recursive=True)]
    print(json.dumps({"result": ray.get(f.remote()), "lines": lines}))
"""


@pytest.mark.processes
@pytest.mark.parametrize(("verbosity", "has_log_monitor"), [(0, False), pytest.param(1, True, marks=pytest.mark.soak)])
def test_a_local_ray_has_no_process_that_a_merge_does_not_use(verbosity: int, has_log_monitor: bool) -> None:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", _START, str(verbosity)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["result"] == 1
    lines = "\n".join(found["lines"])
    assert "raylet" in lines and "gcs_server" in lines
    assert ("log_monitor.py" in lines) is has_log_monitor
    assert "monitor.py" not in lines.replace("log_monitor.py", "")
    assert "dashboard.py" not in lines


def test_methods_of_ray_are_put_back() -> None:
    from ray._private.node import Node

    before = dict(vars(Node))
    assert {"start_monitor", "start_api_server", "start_log_monitor"} <= before.keys()
    with fewer_processes(prints_logs=False):
        assert vars(Node)["start_monitor"] is not before["start_monitor"]
    assert dict(vars(Node)) == before


def test_no_more_is_said_where_ray_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.state.available_resources_per_node")
    assert free_resources_by_node() == {}


def test_private_names_are_in_one_module() -> None:
    """But for the names of loggers that `raymoe submit` silences: it does not import this package."""
    folder = Path(inspect.getfile(raymoe)).parent
    others = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if any(name in path.read_text() for name in _PRIVATE)
    }
    assert others == {"runtime/ray_compat.py", "submit/job_server.py"}
