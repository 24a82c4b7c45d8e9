"""The states of actors by themselves: each event in each state, and what an actor that dies takes with it."""

from __future__ import annotations

import pytest

from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import Shard
from raymoe.runtime.actor_pool import ActorEvent, ActorPool, ActorState, Lane, PoolActor, next_state
from raymoe.runtime.eligibility import Eligibility
from raymoe.runtime.shard_jobs import ShardMethod
from raymoe.storage.outputs.protocol import ShardJob
from tests.runtime.fake_cluster import Direct, FakeActor, FakeCluster, Sent

SHARD = Shard(file_name="model-1", owner=BASE, header=b"", parts=())
JOB = ShardJob(shard=SHARD)
STARTING, UP, RESTARTING, DEAD = ActorState


@pytest.mark.parametrize(
    ("event", "after"),
    [
        (ActorEvent.ANSWERED, {STARTING: UP, UP: UP, RESTARTING: UP, DEAD: DEAD}),
        (ActorEvent.LOST, {STARTING: STARTING, UP: RESTARTING, RESTARTING: RESTARTING, DEAD: DEAD}),
        (ActorEvent.GIVEN_UP, {STARTING: DEAD, UP: DEAD, RESTARTING: DEAD, DEAD: DEAD}),
    ],
)
def test_every_event_in_every_state(event: ActorEvent, after: dict[ActorState, ActorState]) -> None:
    assert {state: next_state(state, event) for state in ActorState} == after


def test_a_lane_has_room_for_so_many_jobs() -> None:
    lane = Lane(2)
    lane.running.add("one")
    assert lane.has_room
    lane.running.add("another")
    assert not lane.has_room
    lane.running.discard("one")
    assert lane.has_room


def pool_of(cluster: FakeCluster, *handles: FakeActor) -> ActorPool:
    """A pool whose actors have been asked once, and what they said was taken."""
    pool = ActorPool([PoolActor(handle, number) for number, handle in enumerate(handles)], cluster)
    ask(pool, cluster)
    return pool


def ask(pool: ActorPool, cluster: FakeCluster) -> None:
    pool.ping_absent()
    pings = pool.pending_pings
    for ref in cluster.ready(list(pings), 0.5):
        pool.take_ping_reply(pings[ref])


def test_an_actor_that_dies_and_comes_back() -> None:
    cluster = FakeCluster()
    handle = cluster.actor()
    pool = pool_of(cluster, handle)
    (actor,) = pool.up
    actor.reads_for = (Owner.expert(0),)
    pool.poll_statuses()
    pool.poll_statuses()
    assert actor.status is not None
    before = pool.version
    pool.change(actor, ActorEvent.LOST)
    assert (actor.state, actor.reads_for, actor.status) == (RESTARTING, (), None) and pool.version > before
    assert pool.up == [] and pool.actors == [actor] and actor.info is not None
    cluster.sleep(1.0)
    ask(pool, cluster)
    assert actor.state is UP and pool.statuses.keys() == {0}


def test_an_actor_that_never_comes_back_is_not_asked_again() -> None:
    cluster = FakeCluster()
    gone, other = cluster.actor(), cluster.actor()
    cluster.kill(gone, back_after=None)
    pool = pool_of(cluster, gone, other)
    assert [actor.handle for actor in pool.actors] == [other]
    pool.ping_absent()
    assert pool.pending_pings == {}


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def sent(cluster: FakeCluster) -> Sent:
    return Sent(lambda: cluster.actor(up_after=1.0))


def eligibility_of(pool: ActorPool, *methods: ShardMethod) -> Eligibility:
    return Eligibility(pool, None, methods=methods, is_settling=lambda: False, has_read_prompts=lambda: True)


def test_a_question_starts_no_helper(cluster: FakeCluster, sent: Sent) -> None:
    pool = pool_of(cluster, cluster.actor(sees_output=False))
    eligibility, (actor,) = eligibility_of(pool, Direct(must_see_output=True), sent), pool.up
    assert not eligibility.can_do(actor, JOB) and eligibility.missing_helpers(lambda: [SHARD]) == [sent.helper]
    assert eligibility.method(actor, JOB) is sent and pool.helpers == {} and len(cluster.actors) == 1
    actor.shards.running.update(range(actor.shards.capacity))
    assert eligibility.missing_helpers(lambda: [SHARD]) == []  # it has no room for it


def test_a_helper_is_waited_for(cluster: FakeCluster, sent: Sent) -> None:
    """It is asked whether it is up as the others are, and takes no work of its own."""
    pool = pool_of(cluster, cluster.actor(sees_output=False))
    eligibility, (actor,) = eligibility_of(pool, Direct(must_see_output=True), sent), pool.up
    pool.start_helper(sent.helper)
    helper = pool.helpers[sent.helper]
    assert (helper.number, pool.actors) == (1, [actor]) and eligibility.missing_helpers(lambda: [SHARD]) == []
    ask(pool, cluster)
    assert not eligibility.can_do(actor, JOB)
    cluster.sleep(1.0)
    ask(pool, cluster)
    assert eligibility.can_do(actor, JOB) and pool.up == [actor]
    pool.end_helpers()
    assert cluster.ended == [(helper.handle, True)]


def test_the_first_method_that_an_actor_can_use(cluster: FakeCluster, sent: Sent) -> None:
    pool = pool_of(cluster, cluster.actor(sees_output=False))
    (actor,), direct, near = pool.up, Direct(), Direct(must_see_output=True)
    assert eligibility_of(pool, direct, sent).method(actor, JOB) is direct
    assert eligibility_of(pool, near, sent, direct).method(actor, JOB) is sent
    assert eligibility_of(pool, near).method(actor, JOB) is None


def test_answers_are_kept_until_a_state_changes(cluster: FakeCluster, sent: Sent) -> None:
    pool = pool_of(cluster, cluster.actor(), cluster.actor(sees_output=False))
    eligibility, (near, far) = eligibility_of(pool, Direct(must_see_output=True), sent), pool.up
    eligibility.refresh()
    assert eligibility.method(far, JOB) is None
    pool.change(near, ActorEvent.LOST)
    assert eligibility.method(far, JOB) is None
    eligibility.refresh()
    assert eligibility.method(far, JOB) is sent
