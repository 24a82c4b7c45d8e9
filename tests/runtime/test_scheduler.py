"""Each decision of the scheduler, on a cluster whose actors die, come back and stand still on cue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

import raymoe
from raymoe.errors import MergeFailed
from raymoe.object_store.protocol import ObjectInfo
from raymoe.planning import MergeOptions
from raymoe.planning.multipart import CopyRange, UploadPart
from raymoe.planning.owner import Owner
from raymoe.planning.plan import MergePlan, Shard
from raymoe.runtime.placement import FileRequirements
from raymoe.runtime.scheduler import Outcome, run_jobs
from raymoe.sources.facts import SourceFile
from raymoe.storage.outputs.protocol import ShardJob
from tests.pico import LAYERS, merge_config
from tests.runtime.fake_cluster import JOB_S, Direct, FakeActor, FakeCluster, Written

Run = Callable[..., Outcome]


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture(scope="session")
def plans(zoo: Callable[..., Path]) -> dict[str, MergePlan]:
    """By gate mode: three experts, in some thirty shards."""
    models = [zoo("llama", seed=seed) for seed in range(4)]
    options = MergeOptions(max_shard_bytes=40_000)
    reading = {"hidden": {"prompt_model": "grafted"}, "random": {}}
    configs = {mode: merge_config(models[0], models[1:], mode=mode, **more) for mode, more in reading.items()}
    return {mode: raymoe.plan(config, options) for mode, config in configs.items()}


@pytest.fixture
def run(cluster: FakeCluster, plans: dict[str, MergePlan]) -> Run:
    """run(work, mode="random", **more) is `run_jobs` on the cluster's actors; they are its first arguments."""

    def run(work: Written, mode: str = "random", *, actors: Sequence[FakeActor] | None = None, **more: Any) -> Outcome:
        more = {"readers": 8, "layers_at_once": 1, "shards_at_once": 1, "stall_timeout_s": 120.0, **more}
        handles = list(cluster.actors if actors is None else actors)
        return run_jobs(plans[mode], handles, work, cluster.tick, transport=cluster, **more)

    return run


@pytest.fixture
def shards(plans: dict[str, MergePlan]) -> list[str]:
    return sorted(shard.file_name for shard in plans["random"].worker_shards)


def written(cluster: FakeCluster) -> Counter[str]:
    """How often each shard was begun."""
    return Counter(job for _, _, job in cluster.begun("write"))


# Without losses


@pytest.mark.parametrize("actors", [1, 3])
def test_all_is_done_once(cluster: FakeCluster, run: Run, shards: list[str], actors: int) -> None:
    for _ in range(actors):
        cluster.actor()
    work = Written()
    outcome = run(work, "hidden")
    assert sorted(work.done) == shards and set(written(cluster).values()) == {1}
    assert len(shards) > 20
    assert len(cluster.begun("capture")) == 3 and len(cluster.begun("fit_layer")) == LAYERS
    assert outcome.gates_done and set(outcome.rows) == {Owner.expert(number) for number in range(3)}
    # No actor idles while there is work: lanes are filled again as soon as they are free.
    assert cluster.seconds < JOB_S * (len(shards) / actors + 1) + 1


class Noted(Direct):
    """Notes which jobs of parts look for those that are there."""

    def __init__(self, resumed: list[bool]) -> None:
        super().__init__()
        self._resumed = resumed

    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        if job.parts:
            self._resumed.append(job.resumes)
        return super().start(actor, job, helper)


class ReadBack(Written):
    """Each shard is one job of a part, and one more that its completion asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.resumed: list[bool] = []
        self.asked: set[str] = set()
        self.methods = (Noted(self.resumed),)

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return [ShardJob(shard=shard, upload_id="id", parts=(UploadPart(number=1, start=0, end=shard.nbytes),))]

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        if shard.file_name in self.asked:
            return super().complete(shard, results)
        self.asked.add(shard.file_name)
        return ShardJob(shard=shard, read_back=ObjectInfo(size=shard.nbytes))


def test_a_shard_is_finished_when_what_its_completion_asks_for_is_done(
    cluster: FakeCluster, run: Run, shards: list[str]
) -> None:
    cluster.actor()
    work = ReadBack()
    outcome = run(work)
    assert sorted(work.done) == shards == sorted(outcome.shard_results)
    assert set(written(cluster)) == {f"{name}{rest}" for name in shards for rest in (" from part 1", " read back")}
    assert not any(work.resumed)


class Copied(Written):
    """Shards that a store copies: each is a job of `parts` parts."""

    def __init__(self, parts: int = 4) -> None:
        super().__init__()
        self._parts = parts

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        file = SourceFile(location="s3://models/m.safetensors", size=1 << 30, etag="e")
        copies = [
            UploadPart(number=number, start=0, end=1, copy=CopyRange(file, 0, 1))
            for number in range(1, self._parts + 1)
        ]
        return [ShardJob(shard=shard, upload_id="id", parts=tuple(copies), asks_store=True)]


def by(cluster: FakeCluster, actor: FakeActor) -> int:
    return sum(each is actor for _, each, _ in cluster.begun("write"))


def test_copies_go_to_the_actors_that_are_there_for_them(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    """As many parts at once as they may ask for; the others do what is not copied."""
    worker, copier = cluster.actor(), cluster.actor()
    work = Copied()
    run(work, actors=[worker], copiers=[copier], copies_at_once=8)
    assert sorted(work.done) == shards and (by(cluster, worker), by(cluster, copier)) == (0, len(shards))
    starts = [when for when, _, _ in cluster.begun("write")]
    assert max(map(starts.count, starts)) == 2
    run(Written(), actors=[worker], copiers=[copier], copies_at_once=8)
    assert (by(cluster, worker), by(cluster, copier)) == (len(shards), len(shards))


def test_each_kind_of_actor_does_the_others_work_if_they_are_lost(
    cluster: FakeCluster, run: Run, shards: list[str]
) -> None:
    worker, copier = cluster.actor(), cluster.actor()
    cluster.at(0.5, lambda: cluster.kill(copier, back_after=None))
    run(Copied(), actors=[worker], copiers=[copier], copies_at_once=8)
    assert by(cluster, worker) == len(shards)
    only = cluster.actor()
    run(Written(), actors=[], copiers=[only], copies_at_once=8)
    assert by(cluster, only) == len(shards)


def test_shards_are_opened_and_completed_beside_the_jobs(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    """A store that takes its time to open and to complete does not keep actors waiting."""
    cluster.actor()
    cluster.takes |= {"jobs": 0.9, "complete": 0.9}
    run(Written())
    assert cluster.seconds < JOB_S * len(shards) + 3


def test_parts_of_a_lost_actor_are_looked_for(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    actors = [cluster.actor(), cluster.actor()]
    cluster.at(0.5, lambda: cluster.kill(actors[0], back_after=1.0))
    work = ReadBack()
    run(work)
    assert sorted(work.done) == shards and work.resumed.count(True) == 1


def test_an_actor_writes_the_expert_that_it_reads_first(
    cluster: FakeCluster, run: Run, plans: dict[str, MergePlan]
) -> None:
    actors = [cluster.actor() for _ in range(3)]
    run(Written(), "hidden")
    owner = {shard.file_name: str(shard.owner) for shard in plans["hidden"].shards}
    read = {actor.number: job for _, actor, job in cluster.begun("capture")}
    for actor in actors:
        mine = [owner[job] for _, each, job in cluster.begun("write") if each is actor]
        own = read[actor.number].removeprefix("gates of ")
        count = sum(each == own for each in owner.values())
        assert mine[:count] == [own] * count and mine[count] == "base"


def test_no_more_read_prompts_than_there_may_be(cluster: FakeCluster, run: Run) -> None:
    for _ in range(3):
        cluster.actor()
    run(Written(), "hidden", readers=1)
    began = [when for when, _, _ in cluster.begun("capture")]
    assert len(began) == 3 and all(late - early >= JOB_S for early, late in pairwise(began))


def test_layers_come_after_all_prompts(cluster: FakeCluster, run: Run) -> None:
    cluster.actor()
    run(Written(), "hidden")
    assert min(cluster.begun("fit_layer"))[0] >= max(cluster.begun("capture"))[0] + JOB_S


def test_gpus_read_prompts_and_leave_the_bytes_to_others(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    gpu, cpu = cluster.actor(device="cuda:0"), cluster.actor()
    work = Written()
    run(work, "hidden", gpus=[True, False])
    assert {actor for _, actor, _ in (*cluster.begun("capture"), *cluster.begun("fit_layer"))} == {gpu}
    ready = max(when for when, _, _ in cluster.begun("fit_layer")) + JOB_S
    assert all(actor is cpu or when >= ready for when, actor, _ in cluster.begun("write"))
    assert sorted(work.done) == shards


def test_a_gpu_that_is_a_moment_late_still_reads_the_prompts(cluster: FakeCluster, run: Run) -> None:
    gpu, _ = cluster.actor(device="cuda:0", up_after=4.0), cluster.actor()
    run(Written(), "hidden", gpus=[True, False])
    assert {actor for _, actor, _ in cluster.begun("capture")} == {gpu}


def test_a_gpu_that_does_not_come_is_not_waited_for(cluster: FakeCluster, run: Run) -> None:
    _, cpu = cluster.actor(device="cuda:0", up_after=600.0), cluster.actor()
    run(Written(), "hidden", gpus=[True, False])
    assert {actor for _, actor, _ in cluster.begun("capture")} == {cpu} and cluster.seconds < 60


def test_an_actor_that_comes_late_takes_part(cluster: FakeCluster, run: Run) -> None:
    cluster.actor()
    late = cluster.actor(up_after=5.0)
    run(Written())
    began = [when for when, actor, _ in cluster.begun("write") if actor is late]
    assert 5 <= min(began) < 6


def test_all_that_is_ready_is_taken_in_a_step(cluster: FakeCluster, plans: dict[str, MergePlan]) -> None:
    """No job is begun in place of the first of those that end together before the others have been taken."""
    actors = [cluster.actor() for _ in range(4)]
    results: list[int] = []
    run_jobs(
        plans["random"],
        actors,
        Written(),
        lambda outcome: results.append(len(outcome.shard_results)),
        readers=4,
        layers_at_once=1,
        shards_at_once=2,
        stall_timeout_s=120.0,
        transport=cluster,
    )
    steps = [late - early for early, late in pairwise(results) if late > early]
    assert set(steps[:-1]) == {8}


# Deaths


@pytest.mark.parametrize("actors", [1, 2])
def test_what_a_dead_actor_wrote_is_next(cluster: FakeCluster, run: Run, shards: list[str], actors: int) -> None:
    first, *_ = [cluster.actor() for _ in range(actors)]
    cluster.at(3.5, lambda: cluster.kill(first, back_after=2.0))
    work = Written()
    run(work)
    assert sorted(work.done) == shards
    (again,) = (job for job, times in written(cluster).items() if times > 1)
    began = [job for when, _, job in cluster.begun("write") if when >= 3.5]
    assert began[0] == again and written(cluster)[again] == 2
    assert any(actor is first and when >= 5.5 for when, actor, _ in cluster.begun("write"))  # it is back at work


def test_prompts_of_a_dead_actor_are_read_by_another(cluster: FakeCluster, run: Run) -> None:
    first, second = cluster.actor(), cluster.actor()
    cluster.at(0.5, lambda: cluster.kill(first, back_after=None))
    assert run(Written(), "hidden").gates_done
    assert len(cluster.begun("capture")) == 4
    assert {actor for when, actor, _ in cluster.begun("capture") if when > 0.5} == {second}


def test_the_router_of_a_dead_actor_is_made_by_another(cluster: FakeCluster, run: Run) -> None:
    first, other = cluster.actor(), cluster.actor()

    def is_fitting() -> bool:
        return any(actor is first for _, actor, _ in cluster.begun("fit_layer"))

    cluster.when(is_fitting, lambda: cluster.kill(first, back_after=None))
    outcome = run(Written(), "hidden")
    assert outcome.gates_done and outcome.layers_done == LAYERS
    begun = cluster.begun("fit_layer")
    assert len(begun) == LAYERS + 1 and sum(actor is other for _, actor, _ in begun) == LAYERS


def test_a_job_that_kills_every_actor_ends_the_merge(cluster: FakeCluster, run: Run) -> None:
    actors = [cluster.actor(), cluster.actor()]
    cluster.takes["write"] = 5.0
    victim = ""

    def kills() -> bool:
        nonlocal victim
        victim = victim or next((job for _, _, job in cluster.begun("write")), "")
        return any(ref.name == victim and ref.at > cluster.now() for actor in actors for ref in actor.refs)

    def kill() -> None:
        for actor in actors:
            if any(ref.name == victim and ref.at > cluster.now() for ref in actor.refs):
                cluster.kill(actor, back_after=1.0)
        cluster.when(kills, kill)

    cluster.when(kills, kill)
    with pytest.raises(MergeFailed, match=r"its actor died .*, 3 times\. Memory may .* run the same command again"):
        run(Written())
    assert written(cluster)[victim] == 3
    assert cluster.cancelled  # what others were doing is not wanted any more


def test_actors_that_never_come_back_are_left_out(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    first, second = cluster.actor(), cluster.actor()
    cluster.at(1.5, lambda: cluster.kill(first, back_after=None))
    work = Written()
    assert run(work).unavailable == []
    assert sorted(work.done) == shards
    assert {actor for when, actor, _ in cluster.begun("write") if when > 1.5} == {second}


def test_what_an_actor_did_when_memory_ran_out_is_done_by_another(
    cluster: FakeCluster, run: Run, shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a death like others, and the user is told that it was memory, once per actor."""
    actors, work = [cluster.actor(), cluster.actor()], Written()
    cluster.at(2.5, lambda: cluster.run_out_of_memory(actors[0]))
    run(work, shards_at_once=2)
    assert sorted(work.done) == shards
    assert all(actor is actors[1] for when, actor, _ in cluster.begun("write") if when > 2.5)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert len(warnings) == 1 and warnings[0].endswith("use --actors 1")
    assert warnings[0].startswith("warning: memory ran out on the node of actor 0, process 100 on node 1, and Ray")


def test_a_job_that_runs_out_of_memory_everywhere_ends_the_merge(cluster: FakeCluster, run: Run) -> None:
    for _ in range(4):
        cluster.actor()
    cluster.raising["write"] = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
    with pytest.raises(MergeFailed, match=r"its actor died \(1 worker.*\), 3 times\. Memory ran out on its node; run"):
        run(Written())


def test_the_last_actor_ends_the_merge(cluster: FakeCluster, run: Run) -> None:
    for number in range(2):
        actor = cluster.actor()
        cluster.at(1.5 + number, lambda actor=actor: cluster.kill(actor, back_after=None))
    message = r"^no actor is left: the last one died \(.*\)\. .*run the same command again to go on"
    with pytest.raises(MergeFailed, match=message):
        run(Written())


def test_an_actor_that_ray_has_no_room_for_is_waited_for(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    """It refuses each question meanwhile: that is no death."""
    only = cluster.actor()
    cluster.at(1.5, lambda: cluster.kill(only, back_after=40.0))
    work = Written()
    run(work)
    assert sorted(work.done) == shards and cluster.seconds > 41


def test_no_actor_is_up_for_too_long(cluster: FakeCluster, run: Run) -> None:
    cluster.actor(up_after=1e6)
    with pytest.raises(MergeFailed, match=r"^none of the actors has been up for 2 min: .*same command again"):
        run(Written())
    assert 120 <= cluster.seconds < 130


def test_an_error_of_the_job_itself_ends_the_merge_at_once(cluster: FakeCluster, run: Run) -> None:
    cluster.actor()
    cluster.raising["write"] = RayTaskError("write", "", MergeFailed("the disk is full"))
    with pytest.raises(MergeFailed, match=r"^the disk is full$"):
        run(Written())
    cluster.raising["write"] = RayTaskError("write", "", ZeroDivisionError("by zero"))
    with pytest.raises(MergeFailed, match=r"^model-.*: ZeroDivisionError: by zero$"):
        run(Written())
    assert len(cluster.begun("write")) == 2


@pytest.mark.parametrize("error", [ObjectStoreFullError, OutOfDiskError])
@pytest.mark.parametrize("method", ["capture", "fit_layer"])
def test_no_room_for_states_is_not_tried_again(
    cluster: FakeCluster, run: Run, method: str, error: type[RayError]
) -> None:
    """Raised where prompts are read, or where a router's actor takes in what they left."""
    cluster.actor()
    cluster.raising[method] = RayTaskError(method, "", error("Local disk is full"))
    words = (
        r"^(gates of expert \d|router of layer \d): no room for the states of prompts: Ray's object store is full, .* "
        rf"\({error.__name__}\)\. Start Ray with more .* run the same command again"
    )
    with pytest.raises(MergeFailed, match=words):
        run(Written(), "hidden")
    assert len(cluster.begun(method)) == 1


# States of prompts


def test_lost_states_are_read_again_for_the_layers_that_are_left(
    cluster: FakeCluster, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    actors = [cluster.actor(), cluster.actor()]
    cluster.takes["fit_layer"] = 4.0
    cluster.when(lambda: len(cluster.begun("fit_layer")) > 1, lambda: cluster.lose_node(actors[0], back_after=2.0))
    outcome = run(Written(), "hidden")
    assert outcome.gates_done and outcome.layers_done == LAYERS
    captures = Counter(job for _, _, job in cluster.begun("capture"))
    # All that is ready is taken in one step: the actor's death is known before prompts are given out again.
    assert sorted(captures.values()) == [2, 2, 2]
    assert capsys.readouterr().err.count("lost with their node: the prompts are read again") == 1


def test_states_that_are_lost_again_and_again_end_the_merge(cluster: FakeCluster, run: Run) -> None:
    actors = [cluster.actor(), cluster.actor()]

    def lose() -> None:
        count = len(cluster.begun("fit_layer"))
        cluster.lose_node(actors[0], back_after=1.0)
        cluster.lose_node(actors[1], back_after=1.0)
        cluster.when(lambda: len(cluster.begun("fit_layer")) > count, lose)

    cluster.when(lambda: bool(cluster.begun("fit_layer")), lose)
    with pytest.raises(MergeFailed, match=r"^(router of layer|gates of|model-).*, 3 times"):
        run(Written(), "hidden")


# Files that only some nodes have, and outputs that only some nodes see


@pytest.fixture
def of_one_expert(plans: dict[str, MergePlan]) -> tuple[FileRequirements, str]:
    """What the jobs need, and the file of one expert's shards."""
    needs, plan = FileRequirements(plans["random"]), plans["random"]
    (file,) = needs.shards[next(shard.file_name for shard in plan.shards if shard.owner == Owner.expert(1))]
    return needs, file


def test_work_goes_to_actors_that_have_the_files(
    cluster: FakeCluster, run: Run, of_one_expert: tuple[FileRequirements, str], shards: list[str]
) -> None:
    needs, theirs = of_one_expert
    has, lacks = cluster.actor(), cluster.actor(missing=[theirs])
    work = Written()
    run(work, requirements=needs)
    takes = {job for _, actor, job in cluster.begun("write") if actor is lacks}
    assert sorted(work.done) == shards and takes and all(theirs not in needs.shards[job] for job in takes)
    assert {actor for _, actor, _ in cluster.begun("write")} == {has, lacks}


def test_files_that_no_node_has_any_more(
    cluster: FakeCluster, run: Run, of_one_expert: tuple[FileRequirements, str]
) -> None:
    needs, theirs = of_one_expert
    has, _ = cluster.actor(), cluster.actor(missing=[theirs], node="node 2")
    cluster.at(0.5, lambda: cluster.kill(has, back_after=None))
    with pytest.raises(MergeFailed, match=rf"{theirs} is on none of the nodes with an actor \(node 2\).*same command"):
        run(Written(), requirements=needs)
    assert cluster.seconds < 60


def test_hope_for_a_node_that_may_come_back(
    cluster: FakeCluster, run: Run, of_one_expert: tuple[FileRequirements, str], shards: list[str]
) -> None:
    needs, theirs = of_one_expert
    has, _ = cluster.actor(), cluster.actor(missing=[theirs])
    cluster.at(0.5, lambda: cluster.kill(has, back_after=60.0))
    work = Written()
    run(work, requirements=needs)
    assert sorted(work.done) == shards


@pytest.fixture
def writers(cluster: FakeCluster) -> list[FakeActor]:
    """The writers that were started."""
    return []


@pytest.fixture
def sending(cluster: FakeCluster, writers: list[FakeActor]) -> Written:
    """Shards of actors that do not see the output are sent to a writer."""

    def start() -> FakeActor:
        writers.append(cluster.actor(up_after=1.0))
        return writers[-1]

    return Written(start)


def test_an_actor_that_does_not_see_the_output_sends_to_a_writer(
    cluster: FakeCluster, run: Run, sending: Written, writers: list[FakeActor], shards: list[str]
) -> None:
    far = [cluster.actor(sees_output=False), cluster.actor(sees_output=False)]
    run(sending, actors=far)
    assert sorted(sending.done) == shards and len(writers) == 1
    assert len(cluster.begun("receive")) == len(shards) and not cluster.begun("write")
    assert cluster.ended == [(writers[0], True)]  # when nothing is left to do


def test_an_actor_that_sees_the_output_writes_what_it_can(cluster: FakeCluster, run: Run, sending: Written) -> None:
    near, far = cluster.actor(), cluster.actor(sees_output=False)
    run(sending, actors=[near, far])
    assert {actor for _, actor, _ in cluster.begun("write")} == {near} and not cluster.begun("receive")


def test_no_writer_is_started_while_an_actor_that_sees_the_output_may_come(
    cluster: FakeCluster, run: Run, sending: Written, writers: list[FakeActor], shards: list[str]
) -> None:
    far, near = cluster.actor(sees_output=False), cluster.actor(up_after=3.0)
    run(sending, actors=[far, near])
    assert sorted(sending.done) == shards and not writers
    assert not cluster.begun("receive") and min(when for when, _, _ in cluster.begun("write")) >= 3


def test_a_writer_is_started_when_no_actor_that_sees_the_output_is_left(
    cluster: FakeCluster, run: Run, sending: Written, writers: list[FakeActor], shards: list[str]
) -> None:
    near, far = cluster.actor(), cluster.actor(sees_output=False)
    cluster.at(4.5, lambda: cluster.kill(near, back_after=None))
    run(sending, actors=[near, far])
    assert sorted(sending.done) == shards and len(writers) == 1
    assert min(when for when, _, _ in cluster.begun("receive")) >= 4.5


def test_a_sender_that_dies(cluster: FakeCluster, run: Run, sending: Written, shards: list[str]) -> None:
    far = [cluster.actor(sees_output=False), cluster.actor(sees_output=False)]
    cluster.when(lambda: cluster.busy(far[0]), lambda: cluster.kill(far[0], back_after=2.0))
    run(sending, actors=far)
    assert sorted(sending.done) == shards
    assert max(Counter(job for _, _, job in cluster.begun("receive")).values()) == 2


def test_a_writer_that_dies(
    cluster: FakeCluster, run: Run, sending: Written, writers: list[FakeActor], shards: list[str]
) -> None:
    far = [cluster.actor(sees_output=False), cluster.actor(sees_output=False)]
    cluster.when(lambda: len(sending.done) > 3, lambda: cluster.kill(writers[0], back_after=3.0))
    run(sending, actors=far)
    assert sorted(sending.done) == shards and len(writers) == 1
    again = Counter(job for _, _, job in cluster.begun("receive"))
    assert sorted(again.values())[-2:] == [2, 2]  # what both were sending


def test_a_writer_that_never_comes_back(
    cluster: FakeCluster, run: Run, sending: Written, writers: list[FakeActor]
) -> None:
    far = cluster.actor(sees_output=False)
    cluster.when(lambda: len(sending.done) > 3, lambda: cluster.kill(writers[0], back_after=None))
    with pytest.raises(MergeFailed, match=r"^the actor that writes to the output died"):
        run(sending, actors=[far])


# Jobs that stand still


def test_a_job_that_stands_still_is_given_to_another(
    cluster: FakeCluster, run: Run, shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    still, _ = cluster.actor(), cluster.actor()
    cluster.at(0.5, lambda: cluster.stand_still(still))
    work = Written()
    run(work)
    assert sorted(work.done) == shards
    said = [line for line in capsys.readouterr().err.splitlines() if "no progress for" in line]
    assert ["for 60 s" in said[0], "for 2 min" in said[1], len(said)] == [True, True, 2]
    assert all("(actor 0, process 100 on node 1)" in line for line in said)
    assert cluster.ended == [(still, False)] and 120 < cluster.seconds < 150


def test_a_job_that_stands_still_twice_ends_the_merge(cluster: FakeCluster, run: Run) -> None:
    actors = [cluster.actor(), cluster.actor()]
    cluster.takes["write"] = 5.0
    cluster.at(0.5, lambda: [cluster.stand_still(actor) for actor in actors])
    cluster.at(124, lambda: [cluster.stand_still(actor) for actor in actors])
    message = r"^model-.*: no progress for 2 min \(actor \d, .*\), for the second time\. .*--stall-timeout"
    with pytest.raises(MergeFailed, match=message):
        run(Written())
    assert 240 < cluster.seconds < 260


def test_a_slow_job_that_moves_is_left_alone(cluster: FakeCluster, run: Run, shards: list[str]) -> None:
    cluster.actor()
    cluster.takes["write"] = 300.0
    work = Written()
    run(work, shards_at_once=16)
    assert sorted(work.done) == shards and cluster.ended == []


def test_a_writer_that_is_not_up_for_too_long(cluster: FakeCluster, run: Run) -> None:
    """A process that stands still before it has said that it is up: no job of its could be seen to stand still."""
    far = cluster.actor(sees_output=False)
    with pytest.raises(MergeFailed, match=r"^the actor that writes to the output has not been up for 2 min"):
        run(Written(lambda: cluster.actor(up_after=1e6)), actors=[far])


@pytest.mark.parametrize("side", ["sender", "writer"])
def test_of_a_stream_the_side_that_is_silent_is_ended(
    cluster: FakeCluster, run: Run, sending: Written, writers: list[FakeActor], shards: list[str], side: str
) -> None:
    far = cluster.actor(sees_output=False)

    def stop() -> None:
        silent, other = (far, writers[0]) if side == "sender" else (writers[0], far)
        cluster.stand_still(silent, silent=True)
        cluster.stand_still(other)
        cluster.when(lambda: bool(cluster.ended), lambda: setattr(other, "is_still", False))

    cluster.when(lambda: len(sending.done) > 3, stop)
    run(sending, actors=[far])
    assert sorted(sending.done) == shards
    assert cluster.ended[0] == (far if side == "sender" else writers[0], False)
