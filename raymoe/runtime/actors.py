"""The expert actors of a merge or a verification: started, waited for, ended."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from raymoe.console import say
from raymoe.errors import MergeFailed
from raymoe.runtime.actor_plan import ACTOR_CPUS, Slots
from raymoe.runtime.actor_process import without_secrets
from raymoe.runtime.expert_actor import ExpertWorker
from raymoe.runtime.import_blocker import leave_sklearn_out, leave_torch_out
from raymoe.runtime.placement import Seat, cluster_nodes
from raymoe.runtime.ray_errors import Fate, cause_of, fate_of, own_words
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_transfer import PIECES_AHEAD

__all__ = ["expert_actors"]

_START_GRACE_S = 5
_START_TIMEOUT_S = 60
_GROW_TIMEOUT_S = 1800  # machines with GPUs may be hours away, but then a job is better submitted again
_SAY_EVERY_S = 30
_RESTARTS = 2


@contextmanager
def expert_actors(slots: Slots, output: str, settings: RuntimeSettings, run: str = "") -> Iterator[list[Any]]:
    """Actors that write for `run` of the journal; at least one is up. They are killed at the end, however it comes."""
    import ray

    # Who gets no GPU is not to look for one: it would take those that CUDA_VISIBLE_DEVICES names for its own.
    on_cpu = replace(settings, device="cpu")
    if not slots.runs_model:
        settings = on_cpu
    needs_torch = slots.runs_model or settings.trust_remote_code
    groups = {"gates": 1, "layers": slots.layers_at_once, "write": slots.shards_at_once, "control": 1}
    remote = ray.remote(concurrency_groups=groups)(_actor_class(ExpertWorker, needs_torch, settings.trust_remote_code))
    mark = secrets.token_hex(3)  # Ray wants names that no other merge in the cluster has
    actors = [
        remote.options(
            name=f"raymoe actor {number}{f' for {seat.label}' if seat.label else ''} [{mark}]",
            num_cpus=ACTOR_CPUS,
            num_gpus=seat.gpus,
            max_restarts=_RESTARTS,
            scheduling_strategy=_strategy(seat),
        ).remote(output, settings if seat.gpus else on_cpu, run)
        for number, seat in enumerate(slots.seats)
    ]
    try:
        _wait_for_one(actors, slots, quiet=settings.verbosity < 0)
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor, no_restart=True)


def _strategy(seat: Seat) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if seat.node_id is None:
        return "SPREAD"
    return NodeAffinitySchedulingStrategy(seat.node_id, soft=not seat.only_there, _spill_on_unavailable=seat.spills)


def _wait_for_one(actors: list[Any], slots: Slots, *, quiet: bool) -> None:
    """Wait for all actors a while, and longer for one of them: the rest may come later (see scheduler.py).

    A cluster that is busy, grows or has just lost a node has room for fewer actors than its resources promise.
    """
    import ray
    from ray.exceptions import RayError

    calls = [actor.where.remote() for actor in actors]
    waiting = f"waiting for the cluster's autoscaler: {len(actors)} actors of 1 CPU and {slots.gpus:g} GPU want room"
    if slots.may_grow and not quiet and not any(node.room(slots.gpus) for node in cluster_nodes()):
        say(waiting)
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=_START_GRACE_S)
    limit = _GROW_TIMEOUT_S if slots.may_grow else _START_TIMEOUT_S
    end = time.monotonic() + limit - _START_GRACE_S
    while not answered and (left := end - time.monotonic()) > 0:
        if slots.may_grow and not quiet:
            say(waiting)
        answered, _ = ray.wait(calls, num_returns=1, timeout=min(left, _SAY_EVERY_S))
    if not answered:
        raise MergeFailed(
            f"no actor with {ACTOR_CPUS:g} CPU and {slots.gpus:g} GPU could be started within {limit} s; "
            f"the cluster has: {'; '.join(node.words for node in cluster_nodes())}. Other work may hold its resources."
        )
    failures = []
    for answer in answered:
        try:
            ray.get(answer)
        except RayError as error:
            if fate_of(error) not in (Fate.AWAY, Fate.LOST):  # else it died in its first moments, and may come again
                failures.append(error)
    if len(failures) == len(actors):
        why = own_words(cause_of(failures[0]))
        raise MergeFailed(f"no expert actor could be started: {why}") from failures[0]


def _actor_class(worker: type, needs_torch: bool, trusts_code: bool) -> type:
    """The worker with each method in its concurrency group."""
    import ray

    groups = {
        "embedding_rows": "gates",
        "capture": "gates",
        "layer_rows": "layers",
        "write_shard": "write",
        "send_shard": "write",
        "compare_shard": "write",
        "where": "control",
        "status": "control",
    }
    methods = {
        name: ray.method(concurrency_group=group)(without_secrets(getattr(worker, name)))
        for name, group in groups.items()
    }
    streams = ray.method(num_returns="streaming", _generator_backpressure_num_objects=PIECES_AHEAD)
    methods["send_shard"] = streams(methods["send_shard"])

    def start(actor: Any, *arguments: Any) -> None:
        if not needs_torch:
            leave_torch_out()
        elif not trusts_code:  # which may want anything
            leave_sklearn_out()
        without_secrets(worker.__init__)(actor, *arguments)  # type: ignore[misc]

    return type("ExpertActor", (worker,), {**methods, "__init__": start})
