"""Whether a cluster's nodes come and go by themselves: then a merge that finds no room waits for some.

Ray has no public word for it. What it shows in `ray status` tells: an autoscaler calls nodes by the types of its
configuration; where there is none, Ray calls each node by its own id. Pending actors are what an autoscaler acts on, so
nothing else has to be asked of it, and nothing is left asked for when the merge ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

__all__ = ["has_autoscaler"]

_ANONYMOUS = re.compile(r"node_[0-9a-f]+|local_node|")


def has_autoscaler() -> bool:
    """Whether the connected cluster has an autoscaler that can start nodes. Where Ray does not say, it has none."""
    try:
        return any(not _ANONYMOUS.fullmatch(name) for name in _node_types())
    except Exception:  # these are not promised to be in every version of Ray
        return False


def _node_types() -> Iterable[str]:
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
