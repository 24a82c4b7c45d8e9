"""Which node gets which work, decided from what nodes say of their files: no cluster is needed for that."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.planning import MergePlan
from raymoe.planning.owner import BASE, Owner
from raymoe.runtime.actor_plan import Workload, plan_actors
from raymoe.runtime.placement import ActorPlacement, FileRequirements, FileView, Node, Placement, view_files
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_transfer import PIECE_BYTES, split_pieces
from raymoe.sources.facts import SourceFile
from raymoe.sources.local_folder import fingerprints_differ
from raymoe.storage.local_journal import Journal, source_fingerprints
from tests.pico import merge_config

PlanOf = Callable[..., MergePlan]


@pytest.fixture
def plan_of(zoo: Callable[..., Path]) -> PlanOf:
    """plan_of(mode, experts=3, **config) is a plan of pico models."""

    def plan(mode: str, experts: int = 3, **config: object) -> MergePlan:
        models = [zoo("llama", seed=seed) for seed in range(1, experts + 1)]
        return raymoe.plan(merge_config(zoo("llama"), models, mode=mode, **config))

    return plan


def placement(plan: MergePlan, has: Mapping[str, str], **resources: tuple[float, float]) -> Placement:
    """Nodes by name, each with the folders of some owners ('base 0 1' for the base and two experts); the first is the
    coordinator's. `resources`: CPUs and GPUs of a node, where these are not 4 and 0."""
    needs = FileRequirements(plan)
    every = view_files(needs.files)
    folders = {str(s.owner).removeprefix("expert "): os.path.dirname(s.files[0].location) for s in plan.sources}
    nodes = []
    for name, owners in has.items():
        mine = {folders[owner] for owner in owners.split()}
        cpus, gpus = resources.get(name, (4.0, 0.0))
        files = {path: view for path, view in every.items() if os.path.dirname(path) in mine}
        nodes.append(Node(node_id=name, name=name, cpus=cpus, gpus=gpus, free={"CPU": cpus}, files=files))
    return Placement(needs, nodes, nodes[0].node_id)


def count(seats: tuple[ActorPlacement, ...]) -> Counter[tuple[str | None, float]]:
    return Counter((seat.node_id, seat.gpus) for seat in seats)


def test_everything_everywhere_binds_nobody(plan_of: PlanOf) -> None:
    all_three = "base 0 1 2"
    found = placement(plan_of("hidden"), {"a": all_three, "b": all_three})
    assert found.is_unconstrained and not found.problems(0)
    assert not found.fingerprints()


def test_each_folder_gets_an_actor_on_its_node(plan_of: PlanOf) -> None:
    found = placement(plan_of("hidden"), {"a": "base", "b": "0", "c": "1 2"})
    assert not found.is_unconstrained and not found.problems(0)
    seats = found.place_actors(1, 0.0)
    assert count(seats) == {("a", 0.0): 1, ("b", 0.0): 1, ("c", 0.0): 1}
    assert all(seat.hard_affinity for seat in seats)
    assert sorted(seat.label.partition(" (")[0] for seat in seats) == ["base", "expert 0", "expert 1"]
    assert found.place_actors(100, 0.0) == tuple(found.place_actors(12, 0.0))  # no more than there are CPUs


def test_further_actors_go_where_there_is_most_to_do(plan_of: PlanOf) -> None:
    found = placement(plan_of("random", experts=4), {"a": "base", "b": "0 1 2", "c": "3"})
    assert count(found.place_actors(5, 0.0)) == {("a", 0.0): 1, ("b", 0.0): 3, ("c", 0.0): 1}


def test_copies_on_several_nodes_leave_a_choice(plan_of: PlanOf) -> None:
    found = placement(plan_of("random"), {"a": "base 0 1 2", "b": "0 1 2"})
    seats = found.place_actors(4, 0.0)
    assert {seat.node_id: seat.hard_affinity for seat in seats} == {"a": True, "b": False}


def test_gpus_read_prompts_and_a_node_without_any_moves_its_own_bytes(plan_of: PlanOf) -> None:
    found = placement(plan_of("hidden"), {"a": "base", "b": "0 1 2"}, a=(8.0, 2.0))
    assert not found.problems(1.0)
    assert count(found.place_actors(4, 1.0)) == {("a", 1.0): 2, ("b", 0.0): 1}


def test_gpus_that_were_asked_for_have_to_be_where_prompts_are_read(plan_of: PlanOf) -> None:
    plan = plan_of("ridge", prompt_model="grafted")
    found = placement(plan, {"a": "base 0 1", "b": "base 2"}, a=(8.0, 2.0))
    (problem,) = found.problems(1.0)
    assert problem.what.startswith("reading the prompts of expert 2 (")
    assert "b (4 of 4 CPUs free) only, where no actor with 1 CPU and 1 GPU fits" in problem.what
    assert not found.problems(0.0)  # where they were not, it is read on the CPU
    assert count(found.place_actors(1, 1.0)) == {("a", 1.0): 1, ("b", 0.0): 1}


def test_shares_of_a_gpu(plan_of: PlanOf) -> None:
    found = placement(plan_of("hidden"), {"a": "base", "b": "0 1 2"}, a=(8.0, 1.0), b=(8.0, 1.0))
    assert count(found.place_actors(8, 0.5)) == {("a", 0.5): 2, ("b", 0.5): 2}


def test_no_node_has_both(plan_of: PlanOf) -> None:
    """The base with an expert's FFN is read where both are."""
    found = placement(plan_of("ridge", prompt_model="grafted", experts=2), {"a": "base 0", "b": "1"})
    (problem,) = found.problems(0)
    assert problem.what.startswith("reading the prompts of expert 1 (llama-")
    assert "no node has all the files that this needs: " in problem.what
    assert " is on a" in problem.what and " is on b" in problem.what and problem.what.endswith("(asked: a, b)")
    assert "prompt_model: base" in problem.remedy


def test_an_older_copy_is_not_the_model(plan_of: PlanOf) -> None:
    plan = plan_of("random", experts=2)
    both = placement(plan, {"a": "base 0 1", "b": "base 0 1"})
    location = next(s.files[0].location for s in plan.sources if s.owner == Owner.expert(1))
    files = dict(both.nodes[1].files or {})
    for change in ({"sample": 1}, {"size": 1}):
        changed = replace(both.nodes[1], files={**files, location: replace(files[location], **change)})
        found = Placement(both.requirements, [both.nodes[0], changed], "a")
        assert [node.name for node in found.eligible_nodes([location])] == ["a"]
    alone = replace(both.nodes[0], files={})
    (problem, *_) = Placement(both.requirements, [alone, changed], "a").problems(0)
    assert "another version on b" in problem.what


def test_stamps_are_of_files_that_are_elsewhere(plan_of: PlanOf) -> None:
    plan = plan_of("random", experts=2)
    found = placement(plan, {"a": "base", "b": "0", "c": "0 1"})
    zero, one = (s.files[0].location for s in plan.sources if s.owner != BASE)
    stamps = found.fingerprints()
    assert stamps.keys() == {zero, one}
    here = source_fingerprints(file for s in plan.sources for file in s.files)
    assert not any(fingerprints_differ(stamp, here[name]) for name, stamp in stamps.items())


def test_a_copy_that_is_lost_or_comes_back_changes_no_source(plan_of: PlanOf, tmp_path: Path) -> None:
    """Copies have times of their own. One that both runs have seen, and that is as it was, is enough."""
    plan = plan_of("random", experts=2)
    needs = FileRequirements(plan)
    views = view_files(needs.files)
    later = {name: replace(view, mtime_ns=view.mtime_ns + 1) for name, view in views.items()}
    other = {name: replace(view, sample=view.sample ^ 1) for name, view in views.items()}

    def stamps(**files: Mapping[str, FileView]) -> dict[str, str]:
        seen: dict[str, Mapping[str, FileView]] = {"driver": {}, **files}
        nodes = [Node(node_id=n, name=n, cpus=2, gpus=0, free={}, files=there) for n, there in seen.items()]
        return Placement(needs, nodes, "driver").fingerprints()

    both, first, second = stamps(a=views, b=later), stamps(a=views), stamps(b=later)
    for number, (before, now) in enumerate(permutations((both, first, second), 2)):
        journal = Journal(tmp_path / str(number))
        journal.lock()
        journal.begin("plan", before)
        assert journal.changed_sources(now) == ([] if both in (before, now) else sorted(views))
        assert journal.changed_sources(stamps(c=other)) == sorted(views)  # a sample tells, whatever the node
        assert journal.changed_sources(stamps(a=later)) == ([] if before == second else sorted(views))
        assert journal.changed_sources(stamps(b=views)) == ([] if before == first else sorted(views))
        journal.release()


def test_too_few_actors_allowed(plan_of: PlanOf) -> None:
    found = placement(plan_of("random"), {"a": "base", "b": "0 1 2"})
    with pytest.raises(raymoe.errors.ProblemReport, match=r"--actors: 1 are too few: 2 are needed"):
        plan_actors(RuntimeSettings(actors=1), Workload(jobs=9, runs_model=False), found)


def test_resources_that_no_node_has(plan_of: PlanOf) -> None:
    found = placement(plan_of("hidden"), {"a": "base 0 1 2", "b": "base 0 1 2"}, a=(4.0, 1.0), b=(4.0, 1.0))
    with pytest.raises(
        raymoe.errors.ProblemReport, match=r"2 GPUs per expert were requested, but no node has more than 1"
    ):
        plan_actors(RuntimeSettings(gpus_per_expert=2.0), Workload(jobs=9, runs_model=True), found)
    slots = plan_actors(RuntimeSettings(), Workload(jobs=9, runs_model=True), found)
    assert [seat.gpus for seat in slots.placements] == [1.0, 1.0, 0.0]
    none = placement(plan_of("random"), {"a": "base 0 1 2", "b": "base 0 1 2"}, a=(0.0, 0.0), b=(0.5, 0.0))
    with pytest.raises(raymoe.errors.ProblemReport, match=r"no node has room for an actor .*: a \(.*; b \("):
        plan_actors(RuntimeSettings(), Workload(jobs=9, runs_model=False), none)


def test_a_gpu_that_was_asked_for_by_name(plan_of: PlanOf) -> None:
    """`device="cuda"` never falls back to CPUs, also where the mode runs no model."""
    none = placement(plan_of("hidden"), {"a": "base 0 1 2"}, a=(4.0, 0.0))
    for compute in (True, False):
        with pytest.raises(raymoe.errors.ProblemReport, match=r"^--device cuda: no node has a GPU: a \("):
            plan_actors(RuntimeSettings(device="cuda"), Workload(jobs=9, runs_model=compute), none)
    one = placement(plan_of("hidden"), {"a": "base 0 1 2"}, a=(4.0, 1.0))
    slots = plan_actors(RuntimeSettings(device="cuda"), Workload(jobs=9, runs_model=True), one)
    assert slots.gpus == 1.0
    assert plan_actors(RuntimeSettings(device="cuda"), Workload(jobs=9, runs_model=False), one).gpus == 0.0


@pytest.mark.parametrize(
    ("cpus", "options", "copiers"),
    [
        (16.0, {}, 4),  # as many as are of use
        (8.0, {}, 3),
        (2.0, {}, 0),  # no cores to spare
        (16.0, {"jobs": 2}, 2),
        (16.0, {"runs_model": False}, 0),
        (16.0, {"shares_reads": True}, 0),  # what gates and shards both read of a bucket is read in one process
    ],
)
def test_actors_that_only_copy_where_others_have_gpus(
    cpus: float, options: dict[str, Any], copiers: int, plan_of: PlanOf
) -> None:
    found = placement(plan_of("hidden"), {"a": "base 0 1 2", "b": "base 0 1 2"}, a=(cpus, 1.0), b=(cpus, 1.0))
    workload = replace(Workload(jobs=9, runs_model=True), **options)
    slots = plan_actors(RuntimeSettings(), workload, found)
    computing = 2 if workload.runs_model else min(9, int(2 * cpus))
    gpus = [seat.gpus for seat in slots.placements]
    assert len(gpus) == computing + copiers
    assert gpus.count(1.0) == (2 if workload.runs_model else 0) == slots.readers or not workload.runs_model
    assert len(plan_actors(RuntimeSettings(actors=2), workload, found).placements) == 2


def test_layers_at_once_are_bounded_by_cores_and_memory(plan_of: PlanOf) -> None:
    found = placement(plan_of("ridge"), {"a": "base 0 1 2"}, a=(8.0, 0.0))
    workload = Workload(jobs=2, runs_model=True)
    layers = [
        plan_actors(RuntimeSettings(actors=actors), replace(workload, max_layers_at_once=most), found).layers_at_once
        for actors, most in [(1, 4), (1, 2), (1, 1), (2, 9), (2, 3)]
    ]
    assert layers == [4, 2, 1, 4, 3]


def test_samples_see_changes_all_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytearray(np.random.default_rng(0).bytes(200_000))
    path.write_bytes(content)
    size = len(content)
    first = view_files([SourceFile(location=str(path), size=size)])[str(path)]
    assert first == FileView(size=size, mtime_ns=path.stat().st_mtime_ns, sample=first.sample)
    for at in (0, size - 1):
        content[at] ^= 1
        path.write_bytes(content)
        assert view_files([SourceFile(location=str(path), size=size)])[str(path)].sample != first.sample
    assert view_files([SourceFile(location=str(p), size=1) for p in (tmp_path / "none", tmp_path)]).keys() == {
        str(tmp_path)
    }


@pytest.mark.parametrize("sizes", [[], [5], [PIECE_BYTES], [PIECE_BYTES + 1], [3 << 20, 1, 6 << 20, 9 << 20]])
def test_pieces_hold_the_stream(sizes: list[int]) -> None:
    content = np.random.default_rng(1).integers(0, 256, sum(sizes), np.uint8)
    cuts = np.cumsum([0, *sizes])
    chunks = [memoryview(content[start:end]) for start, end in pairwise(cuts)]
    pieces = [piece.copy() for piece in split_pieces(chunks, len(content))]
    assert all(len(piece) == PIECE_BYTES for piece in pieces[:-1])
    assert np.array_equal(np.concatenate([content[:0], *pieces]), content)
