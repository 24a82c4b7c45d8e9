"""Gives actors their work and collects what comes back.

Every actor has two lanes that run side by side: gates (see gate_work.py) and shards. An actor that reads an expert's
prompts writes that expert's shards first, then the base's, then whatever is left, so that no actor idles while
there is work. More experts than actors simply means that lanes are filled again: waves without a pause between them.

The jobs of an actor that dies go back to the front of the queue, for whoever has room. Ray restarts the actor, which
may take long or never happen (its node is gone and no other has room); it is given work again when it answers. An actor
that the cluster has no room for yet is in the same state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.gates.assemble import Rows
from raymoe.gates.summary import RouterSummary
from raymoe.planning.types import MergePlan, Shard
from raymoe.runtime.gate_work import GateJob, GateWork

__all__ = ["Outcome", "ShardWork", "run_jobs"]

_ATTEMPTS = 3  # at one job: one that kills every actor that takes it up will not be finished by a fourth
_TICK_S = 0.25
_ASK_EVERY_S = 1.0


@dataclass
class Outcome:
    """Gate rows by owner, what held-out prompts say of them, and what came of each shard.

    `members_done`: members whose prompts have been read; `layers_done`: layers whose rows are made. `bytes_kept` are
    those that an earlier run had written. `away`: actors that are not up (yet, or again).
    """

    rows: Rows = field(default_factory=dict)
    summary: RouterSummary | None = None
    members_done: int = 0
    layers_done: int = 0
    gates_done: bool = False
    shard_results: list[Any] = field(default_factory=list)
    bytes_kept: int = 0
    away: list[Any] = field(default_factory=list)


@dataclass
class _Actor:
    handle: Any
    gates_for: tuple[str, ...] = ()  # the members whose prompts it reads now or read last
    gates_busy: bool = False
    layers_busy: int = 0
    shards_busy: int = 0
    is_up: bool = False
    answer: Any = None  # while it is not up: the reference of the answer that will tell, if it has been asked
    asked_at: float = 0.0


@dataclass
class _OpenShard:
    """A shard whose jobs have been asked for: how many are still to come back, and what came back."""

    shard: Shard
    missing: int
    results: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _ShardJob:
    """A job of a shard: `detail` is what the actor is given."""

    opened: _OpenShard
    detail: Any
    failures: int = 0

    @property
    def owner(self) -> str:
        return self.opened.shard.owner

    @property
    def label(self) -> str:
        return f"{self.opened.shard.file_name} ({self.owner})"


_Running = dict[Any, "tuple[_Actor, GateJob | _ShardJob]"]


class ShardWork(Protocol):
    """What is done with shards. A shard is one or several jobs, which several actors may do at the same time."""

    def jobs(self, shard: Shard) -> Sequence[Any]:
        """Begin with a shard; nothing, if there is nothing left for actors to do."""

    def start(self, actor: Any, job: Any) -> Any:
        """Start a job on an actor; the reference of its result."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        """All jobs of a shard came back: what is to be kept of it."""


def run_jobs(
    plan: MergePlan,
    handles: Sequence[Any],
    work: ShardWork,
    on_tick: Callable[[Outcome], None],
    *,
    readers: int,
    layers_at_once: int,
    shards_at_once: int,
) -> Outcome:
    """Compute all gate rows, and do `work` for every shard that needs none. Raises the first error.

    `readers` actors at most read prompts at once. An actor works on the routers of `layers_at_once` layers and on
    `shards_at_once` jobs of shards side by side.
    `on_tick` is called several times a second.
    """
    import ray

    outcome = Outcome()
    actors = [_Actor(handle) for handle in handles]
    gates = GateWork(plan.gates, min(readers, len(handles)))
    shards = _Shards([shard for shard in plan.shards if shard.owner != "router"], work, outcome)
    running: _Running = {}
    try:
        while gates.is_waiting or shards.waiting or shards.ready or running:
            for actor in actors:
                if actor.is_up:
                    _fill_gates(actor, gates, layers_at_once, running)
                    _fill_shards(actor, shards, shards_at_once, running)
                else:
                    _ask(actor)
            outcome.away = [actor.handle for actor in actors if not actor.is_up]
            asked = {actor.answer: actor for actor in actors if actor.answer is not None}
            done = _wait([*running, *asked])
            for ref in done:
                if ref in asked:
                    _welcome(asked[ref], actors)
                else:
                    actor, job = running.pop(ref)
                    _collect(ref, actor, job, gates, shards)
            outcome.members_done, outcome.layers_done = gates.members_done, gates.layers_done
            outcome.gates_done = gates.is_done
            on_tick(outcome)
    finally:
        for ref in running:
            ray.cancel(ref, force=False, recursive=False)
    outcome.rows, outcome.summary = gates.result()
    return outcome


def _wait(refs: list[Any]) -> list[Any]:
    """The first reference that is ready, if one is within a tick."""
    import ray

    if not refs:  # all actors are away, and have just said so
        time.sleep(_TICK_S)
        return []
    ready: list[Any] = ray.wait(refs, num_returns=1, timeout=_TICK_S)[0]
    return ready


def _fill_gates(actor: _Actor, gates: GateWork, layers_at_once: int, running: _Running) -> None:
    if not actor.gates_busy and (job := gates.next_member()) is not None:
        actor.gates_for, actor.gates_busy = job.owners, True
        running[gates.start(actor.handle, job)] = (actor, job)
    while actor.layers_busy < layers_at_once and (job := gates.next_layer()) is not None:
        actor.layers_busy += 1
        running[gates.start(actor.handle, job)] = (actor, job)


def _fill_shards(actor: _Actor, shards: _Shards, shards_at_once: int, running: _Running) -> None:
    while actor.shards_busy < shards_at_once and (job := shards.next_for(actor)) is not None:
        actor.shards_busy += 1
        running[shards.work.start(actor.handle, job.detail)] = (actor, job)


class _Shards:
    """The queue of shards: `waiting` have not been begun, `ready` are jobs of begun ones that nobody does yet."""

    def __init__(self, waiting: list[Shard], work: ShardWork, outcome: Outcome) -> None:
        self.waiting, self.work, self._outcome = waiting, work, outcome
        self.ready: list[_ShardJob] = []

    def next_for(self, actor: _Actor) -> _ShardJob | None:
        """A job for an actor: of its own expert's shards, else of the base's, else of any; begun shards first."""
        while self.waiting or self.ready:
            job = min(self.ready, key=lambda job: _preference(actor, job.owner), default=None)
            shard = min(self.waiting, key=lambda shard: _preference(actor, shard.owner), default=None)
            if job is not None and (shard is None or _preference(actor, job.owner) <= _preference(actor, shard.owner)):
                self.ready.remove(job)
                return job
            assert shard is not None
            self.waiting.remove(shard)
            self._begin(shard)
        return None

    def _begin(self, shard: Shard) -> None:
        jobs = self.work.jobs(shard)
        opened = _OpenShard(shard, len(jobs))
        self.ready += [_ShardJob(opened, detail=job) for job in jobs]
        if not jobs:
            self._outcome.bytes_kept += shard.nbytes
            self._outcome.shard_results.append(self.work.complete(shard, ()))

    def came_back(self, opened: _OpenShard, result: Any) -> None:
        opened.results.append(result)
        opened.missing -= 1
        if not opened.missing:
            self._outcome.shard_results.append(self.work.complete(opened.shard, opened.results))


def _preference(actor: _Actor, owner: str) -> tuple[bool, bool]:
    """Smallest first: this actor's own expert, then the base, then the rest in the plan's order."""
    return (owner not in actor.gates_for, owner != "base")


def _collect(ref: Any, actor: _Actor, job: GateJob | _ShardJob, gates: GateWork, shards: _Shards) -> None:
    """Take a job's result, or see to it that it is done again. Raises what can't be mended so."""
    if isinstance(job, _ShardJob):
        actor.shards_busy -= 1
    elif isinstance(job.what, int):
        actor.layers_busy -= 1
    else:
        actor.gates_busy = False
    loss, result = _result(ref, job)
    if loss == "actor":
        if isinstance(job, _ShardJob):
            shards.ready.insert(0, job)
        else:
            gates.send_back(job)
        actor.is_up, actor.gates_for = False, ()
    elif loss == "states":
        assert isinstance(job, GateJob) and isinstance(job.what, int)  # nothing else works with what others left
        gates.capture_again()
    elif isinstance(job, _ShardJob):
        shards.came_back(job.opened, result)
    else:
        gates.came_back(job, result)


def _result(ref: Any, job: GateJob | _ShardJob) -> tuple[str, Any]:
    """What came back, or what was lost ('actor', or the prompts' 'states'), if it has not been lost too often."""
    import ray
    from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

    try:
        return "", ray.get(ref)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, RaymoeError):
            raise cause from None
        if not isinstance(cause, ObjectLostError):
            raise MergeFailed(f"{job.label}: {type(cause).__name__}: {cause}") from error
        failure, what = cause, "states"
    except RayActorError as error:
        failure, what = error, "actor"
    except ObjectLostError as error:
        failure, what = error, "states"
    except RayError as error:
        raise MergeFailed(f"{job.label}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    job.failures += 1
    if job.failures < _ATTEMPTS:
        return what, None
    lost = "its actor died" if what == "actor" else "what it works with was lost with its node"
    raise MergeFailed(
        f"{job.label}: {lost} ({str(failure).splitlines()[0]}), {job.failures} times. Memory may have run out; run the "
        "same command again to go on from the shards that are finished."
    ) from failure


def _ask(actor: _Actor) -> None:
    """Ask an actor that is away whether it is up. One that has not been started yet answers when it is; one that is
    being restarted refuses (Ray would repeat the call, and tell the user about every try), and is asked again."""
    now = time.monotonic()
    if actor.answer is None and now - actor.asked_at >= _ASK_EVERY_S:
        actor.answer, actor.asked_at = actor.handle.where.remote(), now


def _welcome(actor: _Actor, actors: list[_Actor]) -> None:
    """The actor is up, or will never be. Raises MergeFailed where it was the last one."""
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError

    answer, actor.answer = actor.answer, None
    try:
        ray.get(answer)
        actor.is_up = True
    except ActorUnavailableError:
        return
    except RayActorError as error:
        actors.remove(actor)
        if not actors:
            raise MergeFailed(
                f"no actor is left: the last one died ({str(error).splitlines()[0]}). They may have run out of memory; "
                "run the same command again to go on from the shards that are finished."
            ) from error
