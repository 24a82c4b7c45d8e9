"""Ray's side: finding or starting a cluster, and the actors that fit on it."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from raymoe.compute import COMPUTE_THREADS
from raymoe.console import say
from raymoe.errors import MergeFailed, Problem, ProblemReport, RaymoeError
from raymoe.planning.types import MergePlan
from raymoe.runtime.autoscaler import has_autoscaler
from raymoe.runtime.left_out import leave_sklearn_out, leave_torch_out
from raymoe.runtime.losses import Fate, cause_of, fate_of, first_line, own_words
from raymoe.runtime.placement import Needs, Node, Placement, Seat, ask_nodes, cluster_nodes, driver_node
from raymoe.runtime.process import without_secrets
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.start_errors import knock, refuse_job_server, start_problem
from raymoe.runtime.stream import PIECES_AHEAD
from raymoe.runtime.worker import ExpertWorker
from raymoe.signals import heard_at_once
from raymoe.sources.types import SourceFile

__all__ = ["Slots", "connected", "expert_actors", "placed", "slots_for"]

_START_GRACE_S = 5
_START_TIMEOUT_S = 60
_GROW_TIMEOUT_S = 1800  # machines with GPUs may be hours away, but then a job is better submitted again
_SAY_EVERY_S = 30
_RESTARTS = 2
_CPUS = 1.0  # an actor's
_SHARDS_AT_ONCE, _MOST_SHARDS_AT_ONCE = 2, 8
_MOST_COPIERS, _CPUS_A_COPIER = 4, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """The actors that run at once, by where they are started; what each is given, how many of them read prompts at
    once, how many layers' routers and shards each works on side by side, and whether it runs a model. `may_grow`: an
    autoscaler is there to make room for those that do not fit."""

    seats: tuple[Seat, ...]
    gpus: float
    readers: int
    layers_at_once: int
    shards_at_once: int
    runs_model: bool
    may_grow: bool = False


@contextmanager
def connected(settings: RuntimeSettings) -> Iterator[None]:
    """Be connected to Ray: to the cluster at `address` or RAY_ADDRESS, else to one started here.

    A connection that exists already is used and left alone; one made here is closed at the end.
    """
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if settings.verbosity > 1 else logging.WARNING
    # Ray says at every start that its token authentication is on; that is its default, and no news to a user.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {
        "address": settings.address,
        "namespace": "raymoe",
        "logging_level": level,
        "log_to_driver": settings.verbosity > 0,
    }
    address = settings.address or os.environ.get("RAY_ADDRESS")
    refuse_job_server(address or "")
    if not address:
        # A laptop's own cluster: no dashboard to start and wait for.
        options |= {"address": "local", "include_dashboard": False}
    if settings.verbosity >= 0:
        say(f"connecting to the Ray cluster at {address}" if address else "starting Ray on this machine")
    try:
        knock(address or "")
        with heard_at_once():
            ray.init(**options)
    except SystemExit:  # how Ray's own handlers of SIGTERM end a process, without a word
        raise KeyboardInterrupt from None
    except Exception as error:  # of whatever class: Ray raises a bare Exception where its own node starts too slowly
        raise ProblemReport([start_problem(error, address)]) from error
    try:
        yield
    except RayError as error:  # whatever no part of a merge can mend, a lost head among it
        cause = cause_of(error)
        if isinstance(cause, RaymoeError):
            raise cause from None
        what = f"Ray failed: {type(cause).__name__}: {first_line(cause)}"
        raise MergeFailed(f"{what}. Run the same command again to go on from the shards that are finished.") from error
    finally:
        ray.shutdown()


def slots_for(
    settings: RuntimeSettings,
    *,
    jobs: int,
    compute: bool,
    quantise: str | None,
    placement: Placement | None = None,
    experts: int = 1,
    reads_folders: bool = True,
    beside_driver: bool = False,
    shares_reads: bool = False,
    most_layers_at_once: int = 1,
) -> Slots:
    """Actors for `jobs` pieces of work. `compute`: the gates run a model, so that a GPU is of use. `experts`: how many
    actors a cluster with an autoscaler is to have room for; `reads_folders`: some sources are local folders.
    `beside_driver`: one actor is to be on the driver's node, if there is room. `shares_reads`: gates and shards read
    the same objects, each actor its own once. `most_layers_at_once`: more layers' routers at once take an actor too
    much memory (`gates.fitting`).

    Raises ProblemReport where the cluster can't hold a single actor, or can't do all of the work.
    """
    nodes = placement.nodes if placement is not None else cluster_nodes()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    wanted = settings.gpus_per_expert
    if wanted is None:
        wants = compute and (settings.device == "cuda" or (settings.device is None and gpus >= 1))
        wanted = 1.0 if wants else 0.0
    fit = sum(node.room(wanted) for node in nodes)
    # New nodes have no folders but shared ones: for models in folders they are waited for only if nothing else helps.
    may_grow = (not fit or (experts > fit and not reads_folders)) and has_autoscaler()
    if problems := _resource_problems(nodes, settings, wanted, quantise, may_grow=may_grow):
        raise ProblemReport(problems)
    if placement is not None and fit and (problems := placement.problems(settings.gpus_per_expert or 0.0)):
        raise ProblemReport(problems)
    if may_grow:
        fit = max(fit, experts)
    # On CPUs a model computes with several threads; two models that share cores take longer than one after the other.
    readers = fit if wanted else max(1, int(cpus) // COMPUTE_THREADS)
    actors = max(1, min(jobs, fit, settings.actors or (readers if shares_reads else jobs)))
    seats = placement.seats(actors, wanted) if placement is not None and not placement.is_free else ()
    if len(seats) > (settings.actors or len(seats)):
        what = f"{settings.actors} are too few: {len(seats)} are needed, since no node has the folders of all models"
        raise ProblemReport([Problem(where="--actors", what=what, remedy=f"allow {len(seats)}, or leave it out")])
    if not seats:
        seats = (Seat(gpus=wanted),) * actors
        if beside_driver and len(nodes) > 1:
            seats = (Seat(node_id=driver_node(), spills=True, gpus=wanted), *seats[1:])
    # Threads that copy and one that computes in Python wait for each other in one process. Where there are cores for
    # it, others move the bytes while those with a GPU read prompts; not where both read the same objects.
    apart = wanted and not shares_reads and not settings.actors and (placement is None or placement.is_free)
    spare = int(cpus) - len(seats) if apart else 0
    copiers = max(0, min(_MOST_COPIERS, jobs, spare // _CPUS_A_COPIER))
    actors = len(seats)
    # A layer's rows take one core for some seconds, or a GPU for a moment.
    layers_at_once = 1 if wanted else max(1, min(most_layers_at_once, int(cpus) // actors))
    # Where GPUs make actors few, each copies for several: the kernel's copies need no core of their own to speak of.
    shards_at_once = max(_SHARDS_AT_ONCE, min(_MOST_SHARDS_AT_ONCE, int(cpus) // (actors + copiers)))
    return Slots(
        seats=(*seats, *(Seat(),) * copiers),
        gpus=wanted,
        readers=min(actors, readers),
        layers_at_once=layers_at_once,
        shards_at_once=shards_at_once,
        runs_model=compute,
        may_grow=may_grow,
    )


def _resource_problems(
    nodes: Sequence[Node], settings: RuntimeSettings, gpus: float, quantise: str | None, *, may_grow: bool
) -> list[Problem]:
    """What keeps even one actor from any node, of those that are there or may come."""
    problems = []
    has = "; ".join(node.words for node in nodes)
    most = max((node.gpus for node in nodes), default=0.0)
    if settings.device == "cuda" and not most and not may_grow and not has_autoscaler():
        what, remedy = f"no node has a GPU: {has}", "leave it out to compute on CPUs"
        problems.append(Problem(where="--device cuda", what=what, remedy=remedy))
    elif gpus > most and not may_grow:
        what = f"{gpus:g} GPUs an expert were asked for, but no node has more than {most:g}: {has}"
        problems.append(Problem(where="--gpus-per-expert", what=what, remedy="ask for fewer (0 computes on CPUs)"))
    if quantise and not gpus:
        what = "needs a GPU (bitsandbytes computes there), but none is given to the experts"
        remedy = "run on a cluster with GPUs, or leave the flag out: layers are streamed, so that no model is too large"
        problems.append(Problem(where=f"--load-in-{quantise}", what=what, remedy=remedy))
    if not problems and not may_grow and not any(node.room(gpus) for node in nodes):
        what = f"no node has room for an actor with {_CPUS:g} CPU and {gpus:g} GPU: {has}"
        remedy = "start Ray with the machine's CPUs (ray start --num-cpus), or add a node"
        problems.append(Problem(where="Ray cluster", what=what, remedy=remedy))
    return problems


def placed(plan: MergePlan, also: Mapping[str, Iterable[SourceFile]] | None = None) -> Placement | None:
    """What the cluster's nodes have of the plan's sources; None where that makes no difference: on one node that can do
    it all, and where no source is a local folder. `also` are further files that a shard needs, by its name."""
    nodes = cluster_nodes()
    if len(nodes) < 2 and any(node.room(0.0) for node in nodes):
        return None
    needs = Needs(plan, also)
    return Placement(needs, ask_nodes(needs.files, nodes), driver_node()) if needs.files else None


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
            num_cpus=_CPUS,
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
    """Wait for all actors a while, and longer for one of them: the rest may come later (see schedule.py).

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
            f"no actor with {_CPUS:g} CPU and {slots.gpus:g} GPU could be started within {limit} s; "
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
