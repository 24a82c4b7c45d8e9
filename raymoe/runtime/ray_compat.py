"""All that raymoe uses of Ray without Ray's promise to keep it: private modules, options and names of loggers.

`tests/runtime/test_ray_compat.py` looks for each in the installed Ray. Where one is missing at run time, a merge does
without what only informs; it can't do without the options of actors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

AUTHENTICATION_LOGGER = "ray._private.authentication.authentication_token_setup"


def silence_authentication_logger() -> None:
    """Ray says at every start that its token authentication is on; that is its default, and no news to a user."""
    logging.getLogger(AUTHENTICATION_LOGGER).setLevel(logging.ERROR)


def free_resources_by_node() -> Mapping[str, Mapping[str, float]]:
    """What Ray has free, by node id; empty where it does not say. Ray has no public name for this."""
    try:
        from ray._private.state import available_resources_per_node

        found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    except Exception:  # of another version of Ray, or in Ray's client
        return {}
    return found


def node_type_names() -> Iterable[str]:
    """What the autoscaler, if there is one, calls the types of the cluster's nodes. Raises whatever Ray raises."""
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
    # KubeRay names types without an autoscaler too; one that runs has reported itself.
    nodes = [*found.active_nodes, *found.idle_nodes] if found.stats.autoscaler_version else []
    return [node.ray_node_type_name for node in nodes]


def node_affinity(node_id: str, *, hard: bool, allow_spill: bool) -> Any:
    """A scheduling strategy: on this node, or (unless `hard`) on another one if it is gone; with `allow_spill` also if
    it has no room."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=not hard, _spill_on_unavailable=allow_spill)


def streaming_method(most_pieces: int) -> Callable[[Any], Any]:
    """Decorator of an actor's method that gives pieces: Ray holds it up while `most_pieces` are not taken."""
    import ray

    streams: Callable[[Any], Any] = ray.method(num_returns="streaming", _generator_backpressure_num_objects=most_pieces)
    return streams
