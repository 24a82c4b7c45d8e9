"""A backbone that is merged by what prompts give: what waits for it, what is lost, and the same bytes in each case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.planning import MergeOptions, MergePlan
from raymoe.runtime.moment_jobs import MomentWork, merged_layers
from raymoe.runtime.scheduler import Outcome, run_jobs
from tests.cli.commands import hashes
from tests.pico import LAYERS, merge_config, merge_without_ray, tensors_of
from tests.runtime.fake_cluster import FakeActor, FakeCluster, Written
from tests.runtime.test_resume import leave_shards

OPTIONS = MergeOptions(max_shard_bytes=60_000, model_card=False)
Run = Callable[..., Any]


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture(scope="module")
def config(zoo: Callable[..., Path]) -> dict[str, Any]:
    base, *experts = (zoo("llama", seed=seed, dtype="bfloat16") for seed in range(3))
    return merge_config(base, experts, mode="ridge", backbone={"method": "regmean", "alpha": 0.8})


@pytest.fixture(scope="module")
def plan(config: dict[str, Any]) -> MergePlan:
    return raymoe.plan(config, OPTIONS)


def run(cluster: FakeCluster, plan: MergePlan, work: Written, actors: list[FakeActor]) -> Outcome:
    return run_jobs(
        plan,
        actors,
        work,
        cluster.tick,
        transport=cluster,
        readers=8,
        layers_at_once=1,
        shards_at_once=1,
    )


def times(cluster: FakeCluster, method: str) -> list[float]:
    return [when for when, *_ in cluster.begun(method)]


def needing(plan: MergePlan) -> set[str]:
    """The shards with merged matrices."""
    return {shard.file_name for shard in plan.worker_shards if merged_layers(shard)}


@pytest.mark.parametrize("actors", [1, 2])
def test_only_what_needs_merged_matrices_waits(cluster: FakeCluster, plan: MergePlan, actors: int) -> None:
    work = Written()
    outcome = run(cluster, plan, work, [cluster.actor() for _ in range(actors)])
    assert outcome.gates_done and outcome.backbone_done and outcome.backbone_layers_done == LAYERS
    assert sorted(work.done) == sorted(shard.file_name for shard in plan.worker_shards)
    assert len(times(cluster, "merge_layer")) == LAYERS
    assert max(times(cluster, "capture_inputs")) < min(times(cluster, "merge_layer"))
    assert max(times(cluster, "merge_layer")) < min(times(cluster, "capture"))
    first = {job: when for when, _, job in reversed(cluster.begun("write"))}
    waited = needing(plan)
    assert waited and min(first[name] for name in waited) > min(times(cluster, "merge_layer"))
    assert min(first[name] for name in first.keys() - waited) < min(times(cluster, "merge_layer"))


def test_matrices_that_are_lost_are_merged_again(cluster: FakeCluster, plan: MergePlan) -> None:
    """Also while prompts of the gates are read with them."""
    actors = [cluster.actor(), cluster.actor(node="node 2")]
    cluster.when(lambda: bool(cluster.begun("capture")), lambda: cluster.lose_node(actors[0], back_after=1.0))
    work = Written()
    outcome = run(cluster, plan, work, actors)
    assert outcome.gates_done and sorted(set(work.done)) == sorted(shard.file_name for shard in plan.worker_shards)
    assert len(times(cluster, "capture_inputs")) > 2 and len(times(cluster, "merge_layer")) > LAYERS


def test_layers_that_another_job_has_lost_are_merged_once(plan: MergePlan) -> None:
    cluster = FakeCluster()
    actor, work = cluster.actor(), MomentWork(plan.moments, 2, transport=cluster)
    while (job := work.next_reading()) is not None:
        job.start(actor)
        job.complete(None)
    for _ in range(LAYERS):
        layer = work.next_layer()
        assert layer is not None
        layer.start(actor)
        layer.complete(None)
    assert work.is_done and not work.is_waiting
    lost = work.matrices
    work.merge_again(lost)
    assert not work.is_done and work.is_waiting
    readings = work.next_reading()
    work.merge_again(lost)
    assert readings is not None and len(work.waiting_owners) + len(readings.owners) == 2


def test_the_bytes_of_a_merge(config: dict[str, Any], merge_in_process: Run, tmp_path: Path) -> None:
    """They are those that are written without a scheduler, those of a merge that was interrupted, and they verify."""
    merge_in_process(config, tmp_path / "out", OPTIONS)
    merge_without_ray(config, tmp_path / "again", OPTIONS)
    there, here = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert there.keys() == here.keys() and all(there[name].equal(here[name]) for name in here)
    assert raymoe.verify(str(tmp_path / "out")).differences == ()
    plan = raymoe.plan(config, OPTIONS)
    leave_shards(plan, [shard for shard in plan.worker_shards if not merged_layers(shard)][:2], tmp_path / "resumed")
    assert merge_in_process(config, tmp_path / "resumed", OPTIONS).bytes_kept > 0
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "out")


def test_merges_on_ray(config: dict[str, Any], ray_merge: Run, tmp_path: Path) -> None:
    """By one actor and by two."""
    for actors in (1, 2):
        ray_merge(config, tmp_path / str(actors), OPTIONS, actors=actors)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
