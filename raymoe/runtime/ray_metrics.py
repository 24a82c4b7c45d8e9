"""Exports a merge's metrics through Ray, for Prometheus and Grafana (cluster/grafana-dashboard.json).

The coordinator records all of them, from the actors' statuses: Ray exports a process's metrics every ten seconds, and
would lose the last ones of actors, which are killed at the end. If Ray exports no metrics, recording has no effect. Ray
prefixes the names with `ray_`.

A failure here never stops a merge: on any error of Ray's, the metrics stop and the merge continues.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raymoe.planning.plan import MergePlan, Shard
from raymoe.runtime.actor_status import Status, Working, WorkKind

if TYPE_CHECKING:
    from raymoe.runtime.scheduler import Outcome

_log = logging.getLogger(__name__)

# Name -> (kind, its tags besides `output`, description).
METRICS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "raymoe_bytes_copied": ("Counter", ("way",), "Bytes written by workers, or copied by the store itself"),
    "raymoe_bytes_planned": ("Gauge", (), "Bytes of all shards except the router's"),
    "raymoe_shards_done": ("Counter", (), "Shards that are complete"),
    "raymoe_shards_planned": ("Gauge", (), "Shards except the router's"),
    "raymoe_gate_tokens": ("Counter", (), "Tokens that were passed through a layer for the gates, layers summed"),
    "raymoe_expert_phase": ("Gauge", ("expert", "phase"), "1 while prompts are read (gates) or shards written for it"),
    "raymoe_actors_away": ("Gauge", (), "Actors that are not up (yet, or again)"),
}


def ray_text(text: str) -> str:
    """A user's text as a metric tag: Ray takes ASCII only. Other characters are escaped, as in '\\xfc'."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


class MergeMetrics:
    """Turns totals into counter increments, and the actors' work into phases of experts."""

    def __init__(self, plan: MergePlan, output: str) -> None:
        self._metrics: dict[str, Any] = {}
        self._last_totals: dict[tuple[str, str], int] = {}
        self._shard_owners = {shard.file_name: str(shard.owner) for shard in plan.shards}
        self._phases: set[tuple[str, str]] = set()
        self._is_on = True
        with self._suppress_errors():
            self._begin(plan.worker_shards, ray_text(output))

    def record(self, actors: Iterable[Status], outcome: Outcome) -> None:
        """Record the changes since the last call."""
        if self._is_on:
            with self._suppress_errors():
                self._record(list(actors), outcome)

    @contextmanager
    def _suppress_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: Ray's Python, its C++, or the metrics exporter
            self._is_on = False
            _log.warning("no metrics of this merge in Ray: %s: %s", type(error).__name__, error)

    def _begin(self, shards: Sequence[Shard], output: str) -> None:
        from ray.util import metrics

        for name, (kind, tags, description) in METRICS.items():
            made = getattr(metrics, kind)(name, description=description, tag_keys=("output", *tags))
            self._metrics[name] = made.set_default_tags({"output": output})
        self._metrics["raymoe_bytes_planned"].set(sum(shard.nbytes for shard in shards))
        self._metrics["raymoe_shards_planned"].set(len(shards))

    def _record(self, actors: Sequence[Status], outcome: Outcome) -> None:
        self._count("raymoe_bytes_copied", sum(status.bytes_written for status in actors), way="worker")
        self._count("raymoe_bytes_copied", sum(status.bytes_copied_by_store for status in actors), way="store")
        self._count("raymoe_gate_tokens", sum(status.gate_tokens for status in actors))
        self._count("raymoe_shards_done", len(outcome.shard_results))
        self._metrics["raymoe_actors_away"].set(len(outcome.unavailable))
        phases = {phase for status in actors for working in status.busy_with for phase in self._phases_of(working)}
        for now, which in ((0, self._phases - phases), (1, phases - self._phases)):
            for expert, phase in which:
                self._metrics["raymoe_expert_phase"].set(now, tags={"expert": ray_text(expert), "phase": phase})
        self._phases = phases

    def _count(self, name: str, total: int, **tags: str) -> None:
        """Increment a counter to a total. A restarted actor counts from zero, so a total may fall; later increments
        count."""
        key = (name, tags.get("way", ""))
        step = total - self._last_totals.get(key, 0)
        self._last_totals[key] = total
        if step > 0:
            self._metrics[name].inc(step, tags=tags)

    def _phases_of(self, working: Working) -> list[tuple[str, str]]:
        if working.kind is WorkKind.PROMPTS:
            return [(owner, "gates") for owner in working.subject]
        if working.kind is WorkKind.SHARD:
            return [(self._shard_owners[name], "shards") for name in working.subject]
        return []
