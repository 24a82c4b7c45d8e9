"""Which actors a merge is given: how many, where, and what each works on at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raymoe.compute import COMPUTE_THREADS
from raymoe.errors import Problem, ProblemReport
from raymoe.planning.plan import MergePlan
from raymoe.runtime.autoscaler import has_autoscaler
from raymoe.runtime.placement import (
    ActorPlacement,
    FileRequirements,
    Node,
    Placement,
    cluster_nodes,
    current_node_id,
    query_nodes,
)
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.facts import SourceFile

__all__ = ["ACTOR_CPUS", "ActorPlan", "locate_sources", "plan_actors"]

ACTOR_CPUS = 1.0
_SHARDS_AT_ONCE, _MAX_SHARDS_AT_ONCE = 2, 8
_MAX_COPIERS, _CPUS_PER_COPIER = 4, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """The actors that run at once, by where they are started; what each is given, how many of them read prompts at
    once, how many layers' routers and shards each works on side by side, and whether it runs a model. `can_grow`: an
    autoscaler is there to make room for those that do not fit."""

    placements: tuple[ActorPlacement, ...]
    gpus: float
    readers: int
    layers_at_once: int
    shards_at_once: int
    runs_model: bool
    can_grow: bool = False


def plan_actors(
    settings: RuntimeSettings,
    *,
    jobs: int,
    compute: bool,
    quantize: str | None,
    placement: Placement | None = None,
    experts: int = 1,
    reads_folders: bool = True,
    prefer_driver_node: bool = False,
    shares_reads: bool = False,
    max_layers_at_once: int = 1,
) -> ActorPlan:
    """Actors for `jobs` pieces of work. `compute`: the gates run a model, so that a GPU is of use. `experts`: how many
    actors a cluster with an autoscaler is to have room for; `reads_folders`: some sources are local folders.
    `prefer_driver_node`: one actor is to be on the driver's node, if there is room. `shares_reads`: gates and shards
    read the same objects, each actor its own once. `max_layers_at_once`: more layers' routers at once take an actor too
    much memory (`routers.fit_memory`).

    Raises ProblemReport where the cluster can't hold a single actor, or can't do all of the work.
    """
    nodes = placement.nodes if placement is not None else cluster_nodes()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    wanted = settings.gpus_per_expert
    if wanted is None:
        wants = compute and (settings.device == "cuda" or (settings.device is None and gpus >= 1))
        wanted = 1.0 if wants else 0.0
    fit = sum(node.capacity(wanted) for node in nodes)
    # New nodes have no folders but shared ones: for models in folders they are waited for only if nothing else helps.
    can_grow = (not fit or (experts > fit and not reads_folders)) and has_autoscaler()
    if problems := _resource_problems(nodes, settings, wanted, quantize, can_grow=can_grow):
        raise ProblemReport(problems)
    if placement is not None and fit and (problems := placement.problems(settings.gpus_per_expert or 0.0)):
        raise ProblemReport(problems)
    if can_grow:
        fit = max(fit, experts)
    # On CPUs a model computes with several threads; two models that share cores take longer than one after the other.
    readers = fit if wanted else max(1, int(cpus) // COMPUTE_THREADS)
    actors = max(1, min(jobs, fit, settings.actors or (readers if shares_reads else jobs)))
    placements = (
        placement.place_actors(actors, wanted) if placement is not None and not placement.is_unconstrained else ()
    )
    if len(placements) > (settings.actors or len(placements)):
        what = (
            f"{settings.actors} are too few: {len(placements)} are needed, since no node has the folders of all models"
        )
        raise ProblemReport([Problem(where="--actors", what=what, remedy=f"allow {len(placements)}, or leave it out")])
    if not placements:
        placements = (ActorPlacement(gpus=wanted),) * actors
        if prefer_driver_node and len(nodes) > 1:
            placements = (ActorPlacement(node_id=current_node_id(), allow_spill=True, gpus=wanted), *placements[1:])
    # Threads that copy and one that computes in Python wait for each other in one process. Where there are cores for
    # it, others move the bytes while those with a GPU read prompts; not where both read the same objects.
    byte_actors = (
        wanted and not shares_reads and not settings.actors and (placement is None or placement.is_unconstrained)
    )
    spare_cpus = int(cpus) - len(placements) if byte_actors else 0
    copiers = max(0, min(_MAX_COPIERS, jobs, spare_cpus // _CPUS_PER_COPIER))
    actors = len(placements)
    # A layer's rows take one core for some seconds, or a GPU for a moment.
    layers_at_once = 1 if wanted else max(1, min(max_layers_at_once, int(cpus) // actors))
    # Where GPUs make actors few, each copies for several: the kernel's copies need no core of their own to speak of.
    shards_at_once = max(_SHARDS_AT_ONCE, min(_MAX_SHARDS_AT_ONCE, int(cpus) // (actors + copiers)))
    return ActorPlan(
        placements=(*placements, *(ActorPlacement(),) * copiers),
        gpus=wanted,
        readers=min(actors, readers),
        layers_at_once=layers_at_once,
        shards_at_once=shards_at_once,
        runs_model=compute,
        can_grow=can_grow,
    )


def _resource_problems(
    nodes: Sequence[Node], settings: RuntimeSettings, gpus: float, quantize: str | None, *, can_grow: bool
) -> list[Problem]:
    """What keeps even one actor from any node, of those that are there or may come."""
    problems = []
    has = "; ".join(node.description for node in nodes)
    most = max((node.gpus for node in nodes), default=0.0)
    if settings.device == "cuda" and not most and not can_grow and not has_autoscaler():
        what, remedy = f"no node has a GPU: {has}", "leave it out to compute on CPUs"
        problems.append(Problem(where="--device cuda", what=what, remedy=remedy))
    elif gpus > most and not can_grow:
        what = f"{gpus:g} GPUs an expert were asked for, but no node has more than {most:g}: {has}"
        problems.append(Problem(where="--gpus-per-expert", what=what, remedy="ask for fewer (0 computes on CPUs)"))
    if quantize and not gpus:
        what = "needs a GPU (bitsandbytes computes there), but none is given to the experts"
        remedy = "run on a cluster with GPUs, or leave the flag out: layers are streamed, so that no model is too large"
        problems.append(Problem(where=f"--load-in-{quantize}", what=what, remedy=remedy))
    if not problems and not can_grow and not any(node.capacity(gpus) for node in nodes):
        what = f"no node has room for an actor with {ACTOR_CPUS:g} CPU and {gpus:g} GPU: {has}"
        remedy = "start Ray with the machine's CPUs (ray start --num-cpus), or add a node"
        problems.append(Problem(where="Ray cluster", what=what, remedy=remedy))
    return problems


def locate_sources(plan: MergePlan, extra_files: Mapping[str, Iterable[SourceFile]] | None = None) -> Placement | None:
    """What the cluster's nodes have of the plan's sources; None where that makes no difference: on one node that can do
    it all, and where no source is a local folder. `extra_files` are further files that a shard needs, by its name."""
    nodes = cluster_nodes()
    if len(nodes) < 2 and any(node.capacity(0.0) for node in nodes):
        return None
    requirements = FileRequirements(plan, extra_files)
    return (
        Placement(requirements, query_nodes(requirements.files, nodes), current_node_id())
        if requirements.files
        else None
    )
