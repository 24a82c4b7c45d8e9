"""Tells whether a cluster has an autoscaler: then a merge that finds no room waits for new nodes.

Ray has no public API for it. raymoe infers it from node type names, as `ray status` shows them: an autoscaler names
nodes by the types of its configuration; without one, Ray names each node by its own id. Pending actors already trigger
scale-up, so raymoe makes no explicit resource request, and none has to be withdrawn when the merge ends.
"""

from __future__ import annotations

import re

from raymoe.runtime.ray_compat import node_type_names

_ANONYMOUS = re.compile(r"node_[0-9a-f]+|local_node|")


def has_autoscaler() -> bool:
    """Whether the connected cluster has an autoscaler that can start nodes. False if Ray does not say."""
    try:
        return any(not _ANONYMOUS.fullmatch(name) for name in node_type_names())
    except Exception:  # these private names may be missing in other versions of Ray
        return False
