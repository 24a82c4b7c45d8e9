"""Gives actors their work and collects what comes back.

Every actor has two lanes that run side by side: gate rows (one expert at a time) and shards. An actor that computes an
expert's gates writes that expert's shards first, then the base's, then whatever is left, so that no actor idles while
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

import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.planning.types import GatePlan, GatePrompts, MergePlan, Shard

__all__ = ["Outcome", "ShardWork", "run_jobs"]

_SHARDS_AT_ONCE = 2
_ATTEMPTS = 3  # at one job: one that kills every actor that takes it up will not be finished by a fourth
_TICK_S = 0.25
_ASK_EVERY_S = 1.0


@dataclass
class Outcome:
    """Gate rows by owner, and what came of each shard.

    `bytes_kept` are those that an earlier run had written. `away`: actors that are not up (yet, or again).
    """

    rows: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    shard_results: list[Any] = field(default_factory=list)
    bytes_kept: int = 0
    away: list[Any] = field(default_factory=list)


@dataclass
class _Actor:
    handle: Any
    gates_for: str = ""  # the owner whose gates it computes now or computed last
    gates_busy: bool = False
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


@dataclass
class _Job:
    """Work for one actor: the gates of an expert, or a job of a shard."""

    work: GatePrompts | _OpenShard
    detail: Any = None  # what is given to the actor, for a shard
    failures: int = 0

    @property
    def owner(self) -> str:
        return self.work.shard.owner if isinstance(self.work, _OpenShard) else self.work.owner

    @property
    def label(self) -> str:
        if isinstance(self.work, _OpenShard):
            return f"{self.work.shard.file_name} ({self.owner})"
        return f"gates of {self.owner}"


class ShardWork(Protocol):
    """What is done with shards. A shard is one or several jobs, which several actors may do at the same time."""

    def jobs(self, shard: Shard) -> Sequence[Any]:
        """Begin with a shard; nothing, if there is nothing left for actors to do."""

    def start(self, actor: Any, job: Any) -> Any:
        """Start a job on an actor; the reference of its result."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        """All jobs of a shard came back: what is to be kept of it."""


def run_jobs(plan: MergePlan, handles: Sequence[Any], work: ShardWork, on_tick: Callable[[Outcome], None]) -> Outcome:
    """Compute all gate rows, and do `work` for every shard that needs none. Raises the first error.

    `on_tick` is called several times a second.
    """
    import ray

    outcome = Outcome()
    actors = [_Actor(handle) for handle in handles]
    gates = [_Job(p) for p in (*plan.gates.experts, *plan.gates.shared) if p.positive]
    shards = _Shards([shard for shard in plan.shards if shard.owner != "router"], work, outcome)
    gates_ref = ray.put(_without_prompts(plan.gates))
    running: dict[Any, tuple[_Actor, _Job]] = {}
    try:
        while gates or shards.waiting or shards.ready or running:
            for actor in actors:
                if actor.is_up:
                    _fill_gates(actor, gates, gates_ref, running)
                    _fill_shards(actor, shards, running)
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
                    if not _collect(ref, actor, job, outcome, shards):
                        _send_back(actor, job, gates, shards)
            on_tick(outcome)
    finally:
        for ref in running:
            ray.cancel(ref, force=False, recursive=False)
    return outcome


def _wait(refs: list[Any]) -> list[Any]:
    """The first reference that is ready, if one is within a tick."""
    import ray

    if not refs:  # all actors are away, and have just said so
        time.sleep(_TICK_S)
        return []
    ready: list[Any] = ray.wait(refs, num_returns=1, timeout=_TICK_S)[0]
    return ready


def _without_prompts(gates: GatePlan) -> GatePlan:
    """What all experts' gate jobs share; each job gets its own prompts beside it."""
    import dataclasses

    return dataclasses.replace(gates, experts=(), shared=())


def _fill_gates(actor: _Actor, waiting: list[_Job], gates_ref: Any, running: dict[Any, tuple[_Actor, _Job]]) -> None:
    if waiting and not actor.gates_busy:
        job = waiting.pop(0)
        actor.gates_for, actor.gates_busy = job.owner, True
        ref = actor.handle.gate_rows.options(name=job.label).remote(gates_ref, job.work)
        running[ref] = (actor, job)


def _fill_shards(actor: _Actor, shards: _Shards, running: dict[Any, tuple[_Actor, _Job]]) -> None:
    while actor.shards_busy < _SHARDS_AT_ONCE and (job := shards.next_for(actor)) is not None:
        actor.shards_busy += 1
        running[shards.work.start(actor.handle, job.detail)] = (actor, job)


class _Shards:
    """The queue of shards: `waiting` have not been begun, `ready` are jobs of begun ones that nobody does yet."""

    def __init__(self, waiting: list[Shard], work: ShardWork, outcome: Outcome) -> None:
        self.waiting, self.work, self._outcome = waiting, work, outcome
        self.ready: list[_Job] = []

    def next_for(self, actor: _Actor) -> _Job | None:
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
        self.ready += [_Job(opened, detail=job) for job in jobs]
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
    return (owner != actor.gates_for, owner != "base")


def _collect(ref: Any, actor: _Actor, job: _Job, outcome: Outcome, shards: _Shards) -> bool:
    """Take a job's result. False if its actor died over it and another may try; raises any other error."""
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

    if isinstance(job.work, _OpenShard):
        actor.shards_busy -= 1
    else:
        actor.gates_busy = False
    try:
        result = ray.get(ref)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, RaymoeError):
            raise cause from None
        raise MergeFailed(f"{job.label}: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        job.failures += 1
        if job.failures < _ATTEMPTS:
            return False
        raise MergeFailed(
            f"{job.label}: its actor died ({str(error).splitlines()[0]}), {job.failures} times. It may have run out of "
            "memory; run the same command again to go on from the shards that are finished."
        ) from error
    except RayError as error:
        raise MergeFailed(f"{job.label}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if isinstance(job.work, _OpenShard):
        shards.came_back(job.work, result)
    else:
        outcome.rows[job.work.owner] = result
    return True


def _send_back(actor: _Actor, job: _Job, gates: list[_Job], shards: _Shards) -> None:
    """The actor died: its job goes to the front of the queue."""
    (shards.ready if isinstance(job.work, _OpenShard) else gates).insert(0, job)
    actor.is_up, actor.gates_for = False, ""


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
