"""Which actors a merge is given: how many, where, and what each works on at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raymoe.compute import COMPUTE_THREADS
from raymoe.errors import Problem, ProblemReport
from raymoe.planning.plan import MergePlan
from raymoe.runtime.autoscaler import has_autoscaler
from raymoe.runtime.placement import Needs, Node, Placement, Seat, ask_nodes, cluster_nodes, driver_node
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.facts import SourceFile

__all__ = ["ACTOR_CPUS", "Slots", "placed", "slots_for"]

ACTOR_CPUS = 1.0
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
    much memory (`routers.fit_memory`).

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
        what = f"no node has room for an actor with {ACTOR_CPUS:g} CPU and {gpus:g} GPU: {has}"
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
