"""A merge as metrics of Ray, for Prometheus and Grafana (cluster/grafana-dashboard.json).

All are recorded by the coordinator, from what the actors say of themselves: Ray sends a process's metrics every ten
seconds, and would lose the last ones of actors, which are killed at the end. Where Ray exports no metrics, nothing
comes of it. Ray puts `ray_` before the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from raymoe.planning.types import MergePlan
from raymoe.runtime.worker import GATES_OF, Status

if TYPE_CHECKING:
    from raymoe.runtime.schedule import Outcome

__all__ = ["METRICS", "MergeMetrics"]

# Name -> (kind, its tags beside `output`, what it says).
METRICS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "raymoe_bytes_copied": ("Counter", ("way",), "Bytes written by workers, or copied by the store itself"),
    "raymoe_bytes_planned": ("Gauge", (), "Bytes of all shards but the router's"),
    "raymoe_shards_done": ("Counter", (), "Shards that are complete"),
    "raymoe_shards_planned": ("Gauge", (), "Shards but the router's"),
    "raymoe_gate_tokens": ("Counter", (), "Tokens that were passed through a layer for the gates, layers summed"),
    "raymoe_expert_phase": ("Gauge", ("expert", "phase"), "1 while prompts are read (gates) or shards written for it"),
    "raymoe_actors_away": ("Gauge", (), "Actors that are not up yet, or not again"),
}


class MergeMetrics:
    """Turns totals into steps of counters, and what actors are at into phases of experts."""

    def __init__(self, plan: MergePlan, output: str) -> None:
        from ray.util import metrics

        self._metrics: dict[str, Any] = {}
        for name, (kind, tags, description) in METRICS.items():
            made = getattr(metrics, kind)(name, description=description, tag_keys=("output", *tags))
            self._metrics[name] = made.set_default_tags({"output": output})
        self._counted: dict[tuple[str, str], int] = {}
        self._shard_owners = {shard.file_name: shard.owner for shard in plan.shards}
        self._phases: set[tuple[str, str]] = set()
        shards = [shard for shard in plan.shards if shard.owner != "router"]
        self._metrics["raymoe_bytes_planned"].set(sum(shard.nbytes for shard in shards))
        self._metrics["raymoe_shards_planned"].set(len(shards))

    def record(self, actors: Iterable[Status], outcome: Outcome) -> None:
        """Record what has come to be since the last call."""
        actors = list(actors)
        self._count("raymoe_bytes_copied", sum(status.bytes_written for status in actors), way="worker")
        self._count("raymoe_bytes_copied", sum(status.bytes_copied_by_store for status in actors), way="store")
        self._count("raymoe_gate_tokens", sum(status.gate_tokens for status in actors))
        self._count("raymoe_shards_done", len(outcome.shard_results))
        self._metrics["raymoe_actors_away"].set(len(outcome.away))
        phases = {phase for status in actors for what in status.busy_with for phase in self._at(what)}
        for now, which in ((0, self._phases - phases), (1, phases - self._phases)):
            for expert, phase in which:
                self._metrics["raymoe_expert_phase"].set(now, tags={"expert": expert, "phase": phase})
        self._phases = phases

    def _count(self, name: str, total: int, **tags: str) -> None:
        """An actor that was restarted counts from zero again, so a total may fall; what comes then is counted on."""
        key = (name, tags.get("way", ""))
        step = total - self._counted.get(key, 0)
        self._counted[key] = total
        if step > 0:
            self._metrics[name].inc(step, tags=tags)

    def _at(self, what: str) -> list[tuple[str, str]]:
        if what.startswith(GATES_OF):
            return [(owner, "gates") for owner in what.removeprefix(GATES_OF).split(", ")]
        owner = self._shard_owners.get(what)
        return [(owner, "shards")] if owner else []
