"""Whether a cluster's nodes come and go by themselves: then a merge that finds no room waits for some.

Ray has no public word for it. What it shows in `ray status` tells: an autoscaler calls nodes by the types of its
configuration; where there is none, Ray calls each node by its own id. Pending actors are what an autoscaler acts on, so
nothing else has to be asked of it, and nothing is left asked for when the merge ends.
"""

from __future__ import annotations

import re

from raymoe.runtime.ray_compat import node_type_names

_ANONYMOUS = re.compile(r"node_[0-9a-f]+|local_node|")


def has_autoscaler() -> bool:
    """Whether the connected cluster has an autoscaler that can start nodes. Where Ray does not say, it has none."""
    try:
        return any(not _ANONYMOUS.fullmatch(name) for name in node_type_names())
    except Exception:  # these are not promised to be in every version of Ray
        return False
