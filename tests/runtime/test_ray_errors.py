"""Every exception that Ray has: a death is retried, what can't be mended ends the merge with one message."""

from __future__ import annotations

import inspect

import pytest
import ray.exceptions

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.object_store.errors import StorageError
from raymoe.runtime.actor_pool import ActorPool, ActorState, PoolActor
from raymoe.runtime.jobs import Lost, PeerLost, lost_part
from raymoe.runtime.ray_errors import CALL_FAILURES, CallFailure, cause_of, classify_failure, first_line
from raymoe.runtime.router_jobs import FitLayerJob, GateWork, ReadPromptsJob
from raymoe.runtime.shard_transfer import sender_error
from tests.runtime.fake_cluster import FakeCluster

KINDS = [
    kind
    for _, kind in sorted(vars(ray.exceptions).items())
    if inspect.isclass(kind) and issubclass(kind, ray.exceptions.RayError)
]
WORK = GateWork.__new__(GateWork)
READING, LAYER = ReadPromptsJob(WORK, ()), FitLayerJob(WORK, 3)


def made(kind: type[Exception]) -> Exception:
    """An instance; constructors differ from class to class and from version to version."""

    class Made(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            pass

        def __str__(self) -> str:
            return "\nwhat happened\nand more"

    Made.__name__ = kind.__name__
    return Made()


def wrapped(cause: Exception) -> Exception:
    """As it comes out of an actor's method."""
    return ray.exceptions.RayTaskError("capture", "Traceback ...", cause)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_every_exception_is_in_the_table(kind: type[Exception]) -> None:
    """A version of Ray that brings a new class fails here, and the class gets its place."""
    assert kind.__name__ in CALL_FAILURES
    assert classify_failure(made(kind)) is CALL_FAILURES[kind.__name__]


def test_a_class_that_is_not_in_the_table_counts_as_its_base() -> None:
    new = type("SomeNewDeath", (ray.exceptions.ActorDiedError,), {"__init__": lambda self: None})
    assert classify_failure(new()) is CallFailure.DEAD
    assert classify_failure(OSError()) is CallFailure.FINAL


def test_a_gpu_without_memory_is_told_as_such() -> None:
    """torch has an OutOfMemoryError too. It is an error of the job, and not the death of the actor."""
    error = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("CUDA out of memory. Tried 2 GiB")
    assert classify_failure(error) is CallFailure.FINAL
    for job, label in ((READING, "gates of "), (LAYER, "router of layer 3")):
        with pytest.raises(MergeFailed, match=rf"^{label}.*: OutOfMemoryError: CUDA out of memory. Tried 2 GiB$"):
            lost_part(wrapped(error), job)
    foreign = type("RayActorError", (Exception,), {"__module__": "rayleigh.errors"})
    assert classify_failure(foreign()) is CallFailure.FINAL


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not ray.exceptions.RayTaskError])
def test_what_a_job_lost(kind: type[Exception]) -> None:
    error, fate = made(kind), CALL_FAILURES[kind.__name__]
    if fate in (CallFailure.FULL, CallFailure.FINAL):
        for raised in (error, wrapped(error)):
            with pytest.raises(MergeFailed, match=rf"^router of layer 3: .*{kind.__name__}"):
                lost_part(raised, LAYER)
        return
    assert lost_part(error, LAYER) is (Lost.STATES if fate is CallFailure.LOST else Lost.ACTOR)
    assert lost_part(error, READING) is Lost.ACTOR
    assert lost_part(wrapped(error), LAYER) is Lost.STATES


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not ray.exceptions.RayTaskError])
def test_what_a_stream_lost(kind: type[Exception]) -> None:
    """The stream itself breaks if its sender dies. What the sender's method raises is handed on, unless it lost another
    process. What it lost of Ray's store is the job's input: merged matrices of the backbone."""
    passed_on = (CallFailure.FULL, CallFailure.FINAL, CallFailure.LOST)
    error, is_final = made(kind), CALL_FAILURES[kind.__name__] in passed_on
    assert isinstance(sender_error(error, "model-1"), PeerLost)
    found = sender_error(wrapped(error), "model-1")
    assert found is error if is_final else isinstance(found, PeerLost)


def test_what_a_sender_raises_itself() -> None:
    problem = ProblemReport([Problem(where="base", what="is broken")])
    assert sender_error(wrapped(problem), "model-1") is problem
    other = sender_error(wrapped(ValueError("no such thing")), "model-1")
    assert isinstance(other, MergeFailed) and str(other) == "model-1: ValueError: no such thing"


def test_what_an_actor_raises_itself() -> None:
    assert lost_part(wrapped(PeerLost("node died")), READING) is Lost.PEER
    problem = ProblemReport([Problem(where="base", what="is broken")])
    with pytest.raises(ProblemReport, match="is broken"):
        lost_part(wrapped(problem), READING)
    with pytest.raises(MergeFailed, match="router of layer 3: ValueError: no such thing"):
        lost_part(wrapped(ValueError("no such thing")), LAYER)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_an_actor_that_does_not_come_up(kind: type[Exception]) -> None:
    """It is asked again where it may come, else the others work on; the last one ends the merge with one message."""
    first, second = PoolActor("one"), PoolActor("another")
    pool = ActorPool([first, second], FakeCluster())
    for _ in range(4):
        if first in pool.actors:
            pool.on_startup_failure(first, made(kind))
    comes_again = CALL_FAILURES[kind.__name__] in (CallFailure.UNAVAILABLE, CallFailure.LOST)
    assert pool.actors == ([first, second] if comes_again else [second])
    if comes_again and kind is not ray.exceptions.ActorUnavailableError:
        pool.on_startup_failure(first, made(kind))  # not for ever
        assert pool.actors == [second] and first.state is ActorState.DEAD
    if kind is not ray.exceptions.ActorUnavailableError:
        second.startup_failures = 4
        memory = "ran out on its node" if kind is ray.exceptions.OutOfMemoryError else "may have run out"
        left = rf"no actor is left: the last one died \(what happened\)\. Memory {memory}; run the same command again"
        with pytest.raises(MergeFailed, match=left):
            pool.on_startup_failure(second, made(kind))


def test_the_last_actor_can_not_reach_the_output() -> None:
    """No node has the credentials that the driver has: no process died, and the remedy is the store's."""
    problem = Problem(where="s3://bucket/out", what="no credentials found", remedy="set AWS_ACCESS_KEY_ID")
    last = PoolActor("one")
    with pytest.raises(MergeFailed) as told:
        ActorPool([last], FakeCluster()).on_startup_failure(last, wrapped(StorageError([problem])))
    said = str(told.value)
    assert "no credentials found" in said and "set AWS_ACCESS_KEY_ID" in said
    assert "died" not in said and "emory" not in said
    last = PoolActor("one")
    with pytest.raises(MergeFailed, match=r"the last one can't work: OSError: no such device$"):
        ActorPool([last], FakeCluster()).on_startup_failure(last, wrapped(OSError("no such device")))


@pytest.mark.parametrize("lost", Lost)
def test_a_job_that_lost_something_waits_again(lost: Lost) -> None:
    """A layer whose states are lost is not put back: their prompts are read again first."""
    told: list[str] = []

    class Work(GateWork):
        def __init__(self) -> None:
            pass

        def requeue_reading(self, job: ReadPromptsJob) -> None:
            told.append("prompts")

        def requeue_layer(self, job: FitLayerJob) -> None:
            told.append("layer")

        def recapture(self, job: FitLayerJob) -> None:
            told.append("states")

    ReadPromptsJob(Work(), ()).recover(lost)
    FitLayerJob(Work(), 3).recover(lost)
    assert told == ["prompts", "states" if lost is Lost.STATES else "layer"]


def test_words() -> None:
    assert first_line(made(ray.exceptions.NodeDiedError)) == "what happened"
    assert first_line(OSError()) == "OSError"
    assert isinstance(cause_of(wrapped(OSError("x"))), OSError)
