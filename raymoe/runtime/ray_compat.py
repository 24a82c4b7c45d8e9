"""Collects everything in raymoe that relies on Ray internals: private modules, options and logger names.

`tests/runtime/test_ray_compat.py` checks each against the installed Ray. If one that only informs is missing at run
time, a merge runs without it. The options of actors are required.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

AUTHENTICATION_LOGGER = "ray._private.authentication.authentication_token_setup"


def silence_authentication_logger() -> None:
    """Silence a Ray logger that reports at every start that token authentication is on, which is the default."""
    logging.getLogger(AUTHENTICATION_LOGGER).setLevel(logging.ERROR)


_UNUSED_STARTS = ("start_monitor", "start_api_server")
_LOG_START = "start_log_monitor"


@contextmanager
def fewer_processes(*, prints_logs: bool) -> Iterator[None]:
    """A Ray that is started on this machine in the block lacks processes that a merge does not use.

    These are the autoscaler's monitor, the dashboard, and, unless the driver `prints_logs` of actors, the log monitor.
    Each is a Python process that takes about a second of processor time to start, and Ray waits for the dashboard and,
    at the end, a second for the monitor. Ray has no public option for the monitor, and starts the dashboard's process
    also with `include_dashboard=False`. In a Ray without these methods nothing changes.
    """
    try:
        from ray._private.node import Node
    except ImportError:  # another version of Ray
        yield
        return
    names = [name for name in (*_UNUSED_STARTS, *(() if prints_logs else (_LOG_START,))) if name in vars(Node)]
    methods = {name: vars(Node)[name] for name in names}
    for name in names:
        setattr(Node, name, lambda self, *arguments, **options: None)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


def free_resources_by_node() -> Mapping[str, Mapping[str, float]]:
    """Ray's free resources by node id; empty if Ray does not report them. Ray has no public API for this."""
    try:
        from ray._private.state import available_resources_per_node

        found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    except Exception:  # another version of Ray, or Ray Client
        return {}
    return found


def node_type_names() -> Iterable[str]:
    """The autoscaler's names for the types of the cluster's nodes, if there is one. Raises whatever Ray raises."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    if status := _internal_kv_get("__autoscaling_status"):
        mapping = (json.loads(status).get("autoscaler_report") or {}).get("node_type_mapping") or {}
        return [str(name) for name in mapping.values()]
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if not is_autoscaler_v2():
        return []
    from ray.autoscaler.v2.sdk import get_cluster_status

    found = get_cluster_status(ray.get_runtime_context().gcs_address)
    # KubeRay names types even without an autoscaler; a running autoscaler has reported itself.
    nodes = [*found.active_nodes, *found.idle_nodes] if found.stats.autoscaler_version else []
    return [node.ray_node_type_name for node in nodes]


def node_affinity(node_id: str, *, hard: bool, allow_spill: bool) -> Any:
    """A scheduling strategy: on this node, or (unless `hard`) on another one if it is gone; with `allow_spill` also if
    it has no room."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=not hard, _spill_on_unavailable=allow_spill)


def streaming_method(most_pieces: int) -> Callable[[Any], Any]:
    """Decorate an actor's generator method: Ray pauses it while `most_pieces` items have not been consumed."""
    import ray

    streams: Callable[[Any], Any] = ray.method(num_returns="streaming", _generator_backpressure_num_objects=most_pieces)
    return streams
