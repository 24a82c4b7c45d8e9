"""The queue of gate jobs by itself: what comes when, what is done again after a loss, and what is let go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.gate_modes.layer_values import LayerRows, LayerScores
from raymoe.planning.owner import Owner
from raymoe.runtime.jobs import Lost
from raymoe.runtime.router_jobs import FitLayerJob, GateWork, ReadPromptsJob
from tests.pico import HIDDEN, LAYERS, merge_config
from tests.runtime.fake_cluster import FakeCluster

OWNERS = [Owner.expert(number) for number in range(3)]


@pytest.fixture
def work(local_ray: None, zoo: Callable[..., Path]) -> GateWork:
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="ridge")
    return GateWork(raymoe.plan(config).gates, 3)


def read_all(work: GateWork) -> list[ReadPromptsJob]:
    """All prompts are read: a state in Ray's store for each layer."""
    import ray

    jobs = []
    while job := work.next_reading():
        assert work.next_layer() is None
        job.states = [ray.put(np.zeros(200_000, np.uint8)) for _ in range(LAYERS * len(job.owners))]
        jobs.append(job)
        job.complete(None)
    return jobs


def rows(value: float) -> LayerRows:
    check = LayerScores(accuracy_by_expert=(value, 1.0, 1.0), load=(1 / 3, 1 / 3, 1 / 3))
    return LayerRows(experts=np.full((3, HIDDEN), value), shared=None, scores=check)


def layers_of(work: GateWork) -> list[FitLayerJob]:
    found = []
    while job := work.next_layer():
        found.append(job)
    return found


def in_store() -> set[str]:
    """Ids of the objects that this process still holds in Ray's store."""
    from ray._private.worker import global_worker

    return {name.decode() for name in global_worker.core_worker.get_all_reference_counts()}


def test_layers_come_when_all_prompts_have_been_read(work: GateWork) -> None:
    first, second, third = (work.next_reading() for _ in range(3))
    assert first is not None and second is not None and third is not None
    assert [job.owners for job in (first, second, third)] == [(owner,) for owner in OWNERS]
    assert first.label == "gates of expert 0"
    for done, job in enumerate((second, first)):
        job.complete(None)
        assert work.members_done == done + 1
        assert not work.is_waiting and work.next_layer() is None
    third.complete(None)
    assert work.is_waiting
    jobs = layers_of(work)
    assert [job.layer for job in jobs] == [0, 1, 2]
    assert jobs[1].label == "router of layer 1"


def test_no_more_readers_at_once_than_there_may_be(local_ray: None, zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="ridge")
    work = GateWork(raymoe.plan(config).gates, 2)
    first, second = work.next_reading(), work.next_reading()
    assert first is not None and second is not None and work.next_reading() is None
    first.requeue()  # its actor died
    again = work.next_reading()
    assert again is first and work.next_reading() is None
    second.complete(None)
    third = work.next_reading()
    assert third is not None and third.owners == (OWNERS[2],)


class Fitting:
    """An actor that is asked for a layer's router; `inputs` are the states that it is given."""

    inputs: tuple[Any, ...] = ()

    @property
    def fit_layer(self) -> Fitting:
        return self

    def options(self, *, name: str) -> Fitting:
        return self

    def remote(self, mode: str, experts: int, counts: Sequence[int], *inputs: Any) -> None:
        assert sum(counts) == len(inputs)
        self.inputs = inputs


def test_states_are_in_the_order_of_experts_and_parts(
    zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever have been read first: the order of a sum changes its last bits."""
    monkeypatch.setattr("raymoe.routers.prompt_passes.STATE_BYTES", 5_000)
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="ridge")
    work, jobs, actor = GateWork(raymoe.plan(config).gates, 100, transport=FakeCluster()), [], Fitting()
    while job := work.next_reading():
        job.states = [(part.owner, part.part, layer) for layer in range(LAYERS) for part in job.readings]
        jobs.append(job)
    for job in reversed(jobs):
        job.complete(None)
    fitted = work.next_layer()
    assert fitted is not None
    fitted.start(actor)
    assert len(actor.inputs) == work.readings > 2 * len(OWNERS)
    assert list(actor.inputs) == sorted(actor.inputs, key=lambda state: (OWNERS.index(state[0]), state[1]))
    assert {layer for _, _, layer in actor.inputs} == {0}


def test_rows_of_all_layers_by_owner_whatever_their_order(work: GateWork) -> None:
    read_all(work)
    for job in reversed(layers_of(work)):
        job.complete(rows(float(job.layer)))
    assert not work.is_waiting
    found, summary = work.result()
    assert list(found) == OWNERS
    for owner in OWNERS:
        np.testing.assert_array_equal(found[owner], np.repeat([[0.0], [1.0], [2.0]], HIDDEN, axis=1))
    assert summary is not None and [check.accuracy_by_expert[0] for check in summary.layers.values()] == [0, 1, 2]


def test_states_leave_the_store_with_their_layer(work: GateWork) -> None:
    """What is under way for one layer and all that are done is not held by the coordinator."""
    ids = [[ref.hex() for ref in job.states] for job in read_all(work)]
    held = {name for names in ids for name in names}
    assert len(held) == 3 * LAYERS and held <= in_store()
    for job in layers_of(work):
        job.complete(rows(0.5))
        held -= {names[job.layer] for names in ids}
        assert in_store() & {name for names in ids for name in names} == held


def test_a_job_whose_actor_died_is_next(work: GateWork) -> None:
    job = work.next_reading()
    assert job is not None
    job.requeue()
    assert work.next_reading() is job
    job.requeue()
    read_all(work)
    layers = layers_of(work)
    layers[2].requeue()
    layers[1].requeue()
    assert layers_of(work) == [layers[1], layers[2]]


def test_lost_states_are_captured_again_for_the_layers_that_are_left(work: GateWork) -> None:
    read_all(work)
    first, second, third = layers_of(work)
    first.complete(rows(0.0))
    second.recover(Lost.STATES)
    third.recover(Lost.STATES)  # its job has failed for the same reason
    assert work.members_done == 0 and work.next_layer() is None
    third.requeue()  # its actor was on that node; it will be asked for anew
    again = read_all(work)
    assert [job.owners for job in again] == [(owner,) for owner in OWNERS]
    left = layers_of(work)
    assert [job.layer for job in left] == [1, 2] and left[0] is not second
    # A job from before the loss that comes to an end after all: its layer is done.
    second.recover(Lost.STATES)  # nor does one that fails: its states are there again
    left[0].requeue()
    second.complete(rows(0.1))
    assert layers_of(work) == []
    left[1].complete(rows(0.2))
    assert work.result()[0][OWNERS[0]][:, 0] == pytest.approx([0.0, 0.1, 0.2])


def test_losses_count_as_failures_of_what_comes_after_them(work: GateWork) -> None:
    for losses in range(3):
        members = read_all(work)
        layers = layers_of(work)
        assert {job.failures for job in (*members, *layers)} == {losses}
        layers[0].recover(Lost.STATES)


def test_embeddings_need_no_layers(local_ray: None, zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode="cheap_embed")
    work = GateWork(raymoe.plan(config).gates, 1)
    while job := work.next_reading():
        job.complete([np.arange(HIDDEN, dtype=np.float32)] * len(job.owners))
    assert work.members_done == 2 and not work.is_waiting and work.next_layer() is None
    found, summary = work.result()
    assert summary is None
    np.testing.assert_array_equal(found[OWNERS[1]], np.tile(np.arange(HIDDEN, dtype=np.float32), (LAYERS, 1)))


def test_random_rows_are_no_work(local_ray: None, zoo: Callable[..., Path]) -> None:
    config: dict[str, Any] = merge_config(zoo("llama"), [zoo("llama", seed=1)] * 2, mode="random")
    work = GateWork(raymoe.plan(config).gates, 2)
    assert not work.is_waiting and not work.members
    assert work.result() == ({}, None)


@pytest.mark.parametrize(
    ("prompt_model", "actors", "expected"),
    [
        ("base", 1, [(0, 1, 2)]),
        ("base", 2, [(0,), (1, 2)]),
        ("base", 7, [(0,), (1,), (2,)]),
        ("grafted", 1, [(0,), (1,), (2,)]),
    ],
)
def test_who_reads_the_same_model_is_read_together(
    prompt_model: str, actors: int, expected: list[tuple[int, ...]], local_ray: None, zoo: Callable[..., Path]
) -> None:
    experts = [zoo("llama", seed=seed) for seed in (1, 2, 3)]
    config = merge_config(zoo("llama"), experts, mode="ridge", prompt_model=prompt_model)
    work = GateWork(raymoe.plan(config).gates, actors)
    assert [tuple(owner.index for owner in job.owners) for job in read_all(work)] == expected
    assert work.members_done == 3
    assert len(layers_of(work)) == LAYERS
