"""Starts the expert actors of a merge or a verification, waits for them, and ends them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from raymoe.console import say
from raymoe.errors import MergeFailed
from raymoe.object_store.location import Location
from raymoe.runtime.actor_plan import ACTOR_CPUS, ActorPlan
from raymoe.runtime.actor_process import without_secrets
from raymoe.runtime.expert_actor import ExpertWorker
from raymoe.runtime.import_blocker import block_sklearn_import, block_torch_import
from raymoe.runtime.placement import ActorPlacement, cluster_nodes
from raymoe.runtime.ray_compat import node_affinity, streaming_method
from raymoe.runtime.ray_errors import CallFailure, cause_of, classify_failure, error_text
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_transfer import PIECES_AHEAD
from raymoe.runtime.timeouts import GROW_REPORT_INTERVAL_S, GROW_TIMEOUT_S, START_GRACE_S, START_TIMEOUT_S

_RESTARTS = 2
_COPY_JOBS = 64  # threads that wait for the parts of a job; most jobs have several parts


@contextmanager
def expert_actors(
    actor_plan: ActorPlan, output: Location, settings: RuntimeSettings, run: str = ""
) -> Iterator[list[Any]]:
    """Actors that write for `run` of the journal; at least one is up. They are killed when the context ends."""
    import ray

    # Actors without a GPU must not probe for one: they would use the devices listed in CUDA_VISIBLE_DEVICES.
    on_cpu = replace(settings, device="cpu")
    if not actor_plan.runs_model:
        settings = on_cpu
    needs_torch = actor_plan.runs_model or settings.trust_remote_code
    worker = _remote_class(actor_plan.layers_at_once, actor_plan.shards_at_once, needs_torch, settings)
    copier = _remote_class(1, min(_COPY_JOBS, actor_plan.copies_at_once), False, settings)
    mark = secrets.token_hex(3)  # Ray requires names that are unique in the cluster
    actors = [
        (copier if actor_placement.only_copies else worker)
        .options(
            name=f"raymoe actor {number}{f' for {actor_placement.label}' if actor_placement.label else ''} [{mark}]",
            num_cpus=0 if actor_placement.only_copies else ACTOR_CPUS,
            num_gpus=actor_placement.gpus,
            max_restarts=_RESTARTS,
            scheduling_strategy=_strategy(actor_placement),
        )
        .remote(output, settings if actor_placement.gpus else on_cpu, run)
        for number, actor_placement in enumerate(actor_plan.placements)
    ]
    try:
        _wait_for_first_actor(actors, actor_plan, quiet=settings.verbosity < 0)
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor, no_restart=True)


def _remote_class(layers_at_once: int, shards_at_once: int, needs_torch: bool, settings: RuntimeSettings) -> Any:
    """The class of an actor, with one thread per job that it runs at once."""
    import ray

    groups = {"gates": 1, "layers": layers_at_once, "write": shards_at_once, "control": 1}
    return ray.remote(concurrency_groups=groups)(_actor_class(ExpertWorker, needs_torch, settings.trust_remote_code))


def _strategy(actor_placement: ActorPlacement) -> Any:
    if actor_placement.node_id is None:
        return "SPREAD"
    return node_affinity(
        actor_placement.node_id, hard=actor_placement.hard_affinity, allow_spill=actor_placement.allow_spill
    )


def _wait_for_first_actor(actors: list[Any], actor_plan: ActorPlan, *, quiet: bool) -> None:
    """Wait a short time for all actors, and longer for the first one. The others may come later (see scheduler.py).

    A cluster that is busy, grows, or has just lost a node has room for fewer actors than its resources promise.
    """
    import ray
    from ray.exceptions import RayError

    calls = [actor.describe.remote() for actor in actors]
    waiting = (
        f"waiting for the cluster's autoscaler: {len(actors)} actors of 1 CPU and {actor_plan.gpus:g} GPU want room"
    )
    if actor_plan.can_grow and not quiet and not any(node.capacity(actor_plan.gpus) for node in cluster_nodes()):
        say(waiting)
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=START_GRACE_S)
    limit = GROW_TIMEOUT_S if actor_plan.can_grow else START_TIMEOUT_S
    end = time.monotonic() + limit - START_GRACE_S
    while not answered and (left := end - time.monotonic()) > 0:
        if actor_plan.can_grow and not quiet:
            say(waiting)
        answered, _ = ray.wait(calls, num_returns=1, timeout=min(left, GROW_REPORT_INTERVAL_S))
    if not answered:
        raise MergeFailed(
            f"no actor with {ACTOR_CPUS:g} CPU and {actor_plan.gpus:g} GPU could be started within {limit} s; "
            f"the cluster has: {'; '.join(node.description for node in cluster_nodes())}. Other work may hold its "
            "resources."
        )
    failures = []
    for answer in answered:
        try:
            ray.get(answer)
        except RayError as error:
            # otherwise it died while it started, and may be restarted
            if classify_failure(error) not in (CallFailure.UNAVAILABLE, CallFailure.LOST):
                failures.append(error)
    if len(failures) == len(actors):
        why = error_text(cause_of(failures[0]))
        raise MergeFailed(f"no expert actor could be started: {why}") from failures[0]


def _actor_class(worker: type, needs_torch: bool, trusts_code: bool) -> type:
    """The worker with each method in its concurrency group."""
    import ray

    groups = {
        "embedding_rows": "gates",
        "capture": "gates",
        "fit_layer": "layers",
        "capture_inputs": "gates",
        "merge_layer": "layers",
        "write_shard": "write",
        "send_shard": "write",
        "compare_shard": "write",
        "describe": "control",
        "status": "control",
    }
    methods = {
        name: ray.method(concurrency_group=group)(without_secrets(getattr(worker, name)))
        for name, group in groups.items()
    }
    methods["send_shard"] = streaming_method(PIECES_AHEAD)(methods["send_shard"])

    def start(actor: Any, *arguments: Any) -> None:
        if not needs_torch:
            block_torch_import()
        elif not trusts_code:  # such code may import anything
            block_sklearn_import()
        without_secrets(worker.__init__)(actor, *arguments)  # type: ignore[misc]

    return type("ExpertActor", (worker,), {**methods, "__init__": start})
