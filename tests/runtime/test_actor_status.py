"""What an actor says it works on: the words that people see, and the phases of Ray's metrics."""

from __future__ import annotations

import pytest

from raymoe.runtime.actor_status import Working, WorkKind
from raymoe.runtime.ray_metrics import MergeMetrics

SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("working", "label", "phases"),
    [
        (
            Working(WorkKind.PROMPTS, ("expert 0", "expert 1")),
            "gates of expert 0, expert 1",
            [("expert 0", "gates"), ("expert 1", "gates")],
        ),
        (Working(WorkKind.ROUTERS), "routers", []),
        (Working(WorkKind.SHARD, (SHARD,)), SHARD, [("expert 1", "shards")]),
        (Working(WorkKind.RECEIVE, (SHARD,)), f"receive {SHARD}", []),  # it is its sender's work
    ],
)
def test_each_kind_of_work(working: Working, label: str, phases: list[tuple[str, str]]) -> None:
    metrics = MergeMetrics.__new__(MergeMetrics)
    metrics._shard_owners = {SHARD: "expert 1"}
    assert working.label == label
    assert metrics._phases_of(working) == phases
