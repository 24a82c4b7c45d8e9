"""Gives actors their work and collects what comes back.

Every actor has two lanes that run side by side: gate rows (one expert at a time) and shards. An actor that computes an
expert's gates writes that expert's shards first, then the base's, then whatever is left, so that no actor idles while
there is work. More experts than actors simply means that lanes are filled again: waves without a pause between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.planning.types import GatePlan, GatePrompts, MergePlan, Shard

__all__ = ["Outcome", "run_jobs"]

_SHARDS_AT_ONCE = 2
_TICK_S = 0.25


@dataclass
class Outcome:
    """Gate rows by owner, and what came back for each shard."""

    rows: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    shard_results: list[Any] = field(default_factory=list)


@dataclass
class _Actor:
    handle: Any
    gates_for: str = ""  # the owner whose gates it computes now or computed last
    gates_busy: bool = False
    shards_busy: int = 0


@dataclass
class _Job:
    actor: _Actor
    label: str
    owner: str
    is_gates: bool


# Starts one shard's job on an actor and returns the reference of its result.
ShardCall = Callable[[Any, Shard], Any]


def run_jobs(
    plan: MergePlan, handles: Sequence[Any], shard_call: ShardCall, on_tick: Callable[[Outcome], None]
) -> Outcome:
    """Compute all gate rows, and do `shard_call` for every shard that needs none. Raises the first error.

    `on_tick` is called several times a second.
    """
    import ray

    outcome = Outcome()
    actors = [_Actor(handle) for handle in handles]
    waiting_gates: list[GatePrompts] = [p for p in (*plan.gates.experts, *plan.gates.shared) if p.positive]
    waiting_shards: list[Shard] = [shard for shard in plan.shards if shard.owner != "router"]
    gates_ref = ray.put(_without_prompts(plan.gates))
    running: dict[Any, _Job] = {}
    try:
        while waiting_gates or waiting_shards or running:
            for actor in actors:
                _fill_gates(actor, waiting_gates, gates_ref, running)
                _fill_shards(actor, waiting_shards, shard_call, running)
            done, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_S)
            for ref in done:
                _collect(ref, running.pop(ref), outcome)
            on_tick(outcome)
    finally:
        for ref in running:
            ray.cancel(ref, force=False, recursive=False)
    return outcome


def _without_prompts(gates: GatePlan) -> GatePlan:
    """What all experts' gate jobs share; each job gets its own prompts beside it."""
    import dataclasses

    return dataclasses.replace(gates, experts=(), shared=())


def _fill_gates(actor: _Actor, waiting_gates: list[GatePrompts], gates_ref: Any, running: dict[Any, _Job]) -> None:
    if waiting_gates and not actor.gates_busy:
        prompts = waiting_gates.pop(0)
        actor.gates_for, actor.gates_busy = prompts.owner, True
        ref = actor.handle.gate_rows.options(name=f"gates of {prompts.owner}").remote(gates_ref, prompts)
        running[ref] = _Job(actor, f"gates of {prompts.owner}", prompts.owner, True)


def _fill_shards(actor: _Actor, waiting_shards: list[Shard], shard_call: ShardCall, running: dict[Any, _Job]) -> None:
    while waiting_shards and actor.shards_busy < _SHARDS_AT_ONCE:
        shard = min(waiting_shards, key=lambda s: _preference(actor, s))
        waiting_shards.remove(shard)
        actor.shards_busy += 1
        ref = shard_call(actor.handle, shard)
        running[ref] = _Job(actor, f"{shard.file_name} ({shard.owner})", shard.owner, False)


def _preference(actor: _Actor, shard: Shard) -> tuple[bool, bool]:
    """Smallest first: this actor's own expert, then the base, then the rest in the plan's order."""
    return (shard.owner != actor.gates_for, shard.owner != "base")


def _collect(ref: Any, job: _Job, outcome: Outcome) -> None:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        result = ray.get(ref)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, RaymoeError):
            raise cause from None
        raise MergeFailed(f"{job.label}: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise MergeFailed(
            f"{job.label}: its actor died ({str(error).splitlines()[0]}). It may have run out of memory; run the same "
            "command again to go on from the shards that are finished."
        ) from error
    if job.is_gates:
        job.actor.gates_busy = False
        outcome.rows[job.owner] = result
    else:
        job.actor.shards_busy -= 1
        outcome.shard_results.append(result)
