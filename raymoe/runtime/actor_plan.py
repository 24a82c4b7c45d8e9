"""Plans the actors of a merge: how many start, on which nodes, and how many jobs each runs at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

ACTOR_CPUS = 1.0
_SHARDS_AT_ONCE, _MAX_SHARDS_AT_ONCE = 2, 8
_MAX_MOVERS, _CPUS_PER_MOVER = 4, 4
_QUEUED_COPIES = 2  # copies requested per copy that runs at first: the store may accept more, and replies overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work that actors are planned for.

    `jobs`: pieces of work. `copies`: parts that the store copies server-side, requested by separate actors.
    `runs_model`: the gates run a model, so a GPU helps; `quantize`: the precision it is loaded in. `experts`: the
    number of actors that a cluster with an autoscaler should make room for. `reads_folders`: some sources are local
    folders. `prefer_driver_node`: place one actor on the driver's node if it has room. `shares_reads`: gates and shards
    read the same objects, and each actor reads them once. `max_layers_at_once`: an actor that computes the routers of
    more layers at once would need too much memory (`routers.fit_memory`).
    """

    jobs: int
    copies: int = 0
    runs_model: bool = False
    quantize: str | None = None
    experts: int = 1
    reads_folders: bool = True
    prefer_driver_node: bool = False
    shares_reads: bool = False
    max_layers_at_once: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """The actors that run at once, grouped by where they start.

    The fields say what each actor gets, how many actors read prompts at once, how many layers' routers and shards each
    works on at once, for how many parts the `copiers` request copies at once, and whether actors run a model.
    `can_grow`: an autoscaler can make room for actors that do not fit now. `requirements`: the local files that work
    reads, if some nodes lack some of them.
    """

    placements: tuple[ActorPlacement, ...]
    gpus: float
    readers: int
    layers_at_once: int
    shards_at_once: int
    copies_at_once: int
    runs_model: bool
    can_grow: bool = False
    requirements: FileRequirements | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Capacity:
    """The capacity of a cluster: how many actors with `gpus` GPUs each fit now, or fit after it grows."""

    nodes: Sequence[Node]
    cpus: int
    gpus: float
    actors: int
    can_grow: bool

    @property
    def readers(self) -> int:
        """The number of actors that read prompts at once.

        On CPUs a model uses several threads. Two models that share cores take longer than one after the other.
        """
        return self.actors if self.gpus else max(1, self.cpus // COMPUTE_THREADS)


def plan_actors(settings: RuntimeSettings, workload: Workload, placement: Placement | None = None) -> ActorPlan:
    """Plan the actors for a workload: first how many fit, then where they start, then how many jobs each runs at once.

    Raises ProblemReport if the cluster can't hold a single actor, or can't do all of the work.
    """
    capacity = _capacity(settings, workload, placement)
    placements = _placements(settings, workload, placement, capacity)
    actors, movers = len(placements), _movers(settings, workload, placement, capacity, len(placements))
    # A layer's rows take one core for some seconds, or a GPU for a moment.
    layers_at_once = 1 if capacity.gpus else max(1, min(workload.max_layers_at_once, capacity.cpus // max(1, actors)))
    # If GPUs limit the number of actors, each one copies as much as several: kernel copies need almost no CPU.
    shards_at_once = max(_SHARDS_AT_ONCE, min(_MAX_SHARDS_AT_ONCE, capacity.cpus // max(1, actors + movers)))
    return ActorPlan(
        placements=(*placements, *(ActorPlacement(),) * movers, *_copiers(settings, workload, capacity)),
        gpus=capacity.gpus,
        readers=min(actors, capacity.readers),
        layers_at_once=layers_at_once,
        shards_at_once=shards_at_once,
        copies_at_once=_QUEUED_COPIES * settings.storage.copy_slots[0],
        runs_model=workload.runs_model,
        can_grow=capacity.can_grow,
        requirements=placement.requirements if placement is not None else None,
    )


def _capacity(settings: RuntimeSettings, workload: Workload, placement: Placement | None) -> _Capacity:
    """The capacity for this workload. Raises as `plan_actors`."""
    nodes = placement.nodes if placement is not None else cluster_nodes()
    gpus = settings.gpus_per_expert
    if gpus is None:
        has_gpus = sum(node.gpus for node in nodes) >= 1
        wants = workload.runs_model and (settings.device == "cuda" or (settings.device is None and has_gpus))
        gpus = 1.0 if wants else 0.0
    fit = sum(node.capacity(gpus) for node in nodes)
    # New nodes see shared folders only. So models in folders wait for new nodes only if nothing else helps.
    can_grow = (not fit or (workload.experts > fit and not workload.reads_folders)) and has_autoscaler()
    if problems := _resource_problems(nodes, settings, gpus, workload.quantize, can_grow=can_grow):
        raise ProblemReport(problems)
    if placement is not None and fit and (problems := placement.problems(settings.gpus_per_expert or 0.0)):
        raise ProblemReport(problems)
    return _Capacity(
        nodes=nodes,
        cpus=int(sum(node.cpus for node in nodes)),
        gpus=gpus,
        actors=max(fit, workload.experts) if can_grow else fit,
        can_grow=can_grow,
    )


def _placements(
    settings: RuntimeSettings, workload: Workload, placement: Placement | None, capacity: _Capacity
) -> tuple[ActorPlacement, ...]:
    """Where actors start, except those that only move bytes. Raises ProblemReport if `--actors` allows too few."""
    most = settings.actors or (capacity.readers if workload.shares_reads else workload.jobs)
    actors = min(workload.jobs, max(1, min(capacity.actors, most)))
    if not actors and not workload.copies:
        actors = 1
    if placement is not None and not placement.is_unconstrained:
        placements = placement.place_actors(actors, capacity.gpus)
        if settings.actors and len(placements) > settings.actors:
            needed = len(placements)
            what = f"{settings.actors} are too few: {needed} are needed, since no node has the folders of all models"
            raise ProblemReport([Problem(where="--actors", what=what, remedy=f"allow {needed}, or leave it out")])
        if placements:
            return placements
    placements = (ActorPlacement(gpus=capacity.gpus),) * actors
    if not placements or not workload.prefer_driver_node or len(capacity.nodes) < 2:
        return placements
    near = ActorPlacement(node_id=current_node_id(), allow_spill=True, gpus=capacity.gpus)
    return (near, *placements[1:])


def _copiers(settings: RuntimeSettings, workload: Workload, capacity: _Capacity) -> Iterator[ActorPlacement]:
    """One actor per node for server-side copies, on as many nodes as there are copies for."""
    wanted = -(-workload.copies // settings.storage.copy_slots[0])
    for node in list(capacity.nodes)[:wanted]:
        yield ActorPlacement(node_id=node.node_id, allow_spill=True, only_copies=True, label="copies of the store")


def _movers(
    settings: RuntimeSettings, workload: Workload, placement: Placement | None, capacity: _Capacity, actors: int
) -> int:
    """How many actors without a GPU move the bytes while actors with a GPU read prompts.

    In one process, threads that copy and a thread that computes in Python block each other. So separate actors start if
    there are cores for them, unless both kinds read the same objects.
    """
    is_free = placement is None or placement.is_unconstrained
    if not capacity.gpus or workload.shares_reads or settings.actors or not is_free:
        return 0
    return max(0, min(_MAX_MOVERS, workload.jobs, (capacity.cpus - actors) // _CPUS_PER_MOVER))


def _resource_problems(
    nodes: Sequence[Node], settings: RuntimeSettings, gpus: float, quantize: str | None, *, can_grow: bool
) -> list[Problem]:
    """The problems that keep even one actor from fitting on any current or future node."""
    problems = []
    has = "; ".join(node.description for node in nodes)
    most = max((node.gpus for node in nodes), default=0.0)
    if settings.device == "cuda" and not most and not can_grow and not has_autoscaler():
        what, remedy = f"no node has a GPU: {has}", "leave it out to compute on CPUs"
        problems.append(Problem(where="--device cuda", what=what, remedy=remedy))
    elif gpus > most and not can_grow:
        what = f"{gpus:g} GPUs per expert were requested, but no node has more than {most:g}: {has}"
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
    """Which nodes have which of the plan's sources. None if that makes no difference: on a single node that can do all
    the work, or if no source is a local folder. `extra_files` are further files that a shard needs, by the shard's
    name."""
    nodes = cluster_nodes()
    if len(nodes) < 2 and any(node.capacity(0.0) for node in nodes):
        return None
    requirements = FileRequirements(plan, extra_files)
    return (
        Placement(requirements, query_nodes(requirements.files, nodes), current_node_id())
        if requirements.files
        else None
    )
