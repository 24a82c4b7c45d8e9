"""Decides which node can do which work: nodes report the source files that they have; actors start where the work is.

    FileRequirements   the local files that each shard, and the reading of each expert's prompts, needs
    Placement          requirements and the nodes' answers --> problems (work that no node can do), actor placements

Models on the Hub, in object stores, and in folders that all nodes have can be read from every node: then Ray places
the actors freely, and this module has nothing to do. A node *has* a file if its copy has the planned size, and
the sampled blocks are the same as on the coordinator's node: an older copy of a model is not that model.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymoe.config.model_refs import short_name
from raymoe.errors import Problem
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePrompts, MergePlan
from raymoe.runtime.ray_compat import free_resources_by_node
from raymoe.runtime.timeouts import ANSWER_TIMEOUT_S
from raymoe.sources.facts import SourceFile
from raymoe.sources.local_folder import file_fingerprint, has_changed, is_in_view, small_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class FileView:
    """A file as one node sees it. `sample` is a checksum of some of its blocks.

    `changed`: it is no longer the file of this node that the merge was planned with.
    """

    size: int
    mtime_ns: int
    sample: int
    changed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster: its total resources, and its answer, if it gave one (`files` by location)."""

    node_id: str
    name: str
    cpus: float
    gpus: float
    free: Mapping[str, float]
    files: Mapping[str, FileView] | None = None

    @property
    def description(self) -> str:
        """The node in a message, with its total and free resources."""
        parts = [f"{self.free.get('CPU', 0):g} of {self.cpus:g} CPUs free"]
        if self.gpus:
            parts.append(f"{self.free.get('GPU', 0):g} of {self.gpus:g} GPUs free")
        if memory := self.free.get("memory"):
            parts.append(f"{memory / 1e9:.1f} GB of memory free")
        return f"{self.name} ({', '.join(parts)})"

    def capacity(self, gpus: float) -> int:
        """How many actors fit on it, with that many GPUs each."""
        return int(min(self.cpus, self.gpus / gpus)) if gpus else int(self.cpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlacement:
    """Where an actor starts: on this node, and on no other if `hard_affinity`; without a node, wherever Ray has room.

    `allow_spill`: also elsewhere while that node is busy. `label` says in messages what the actor is for.
    `only_copies`: it only requests server-side copies, which needs no CPU.
    """

    node_id: str | None = None
    hard_affinity: bool = False
    allow_spill: bool = False
    gpus: float = 0.0
    label: str = ""
    only_copies: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A piece of work: a description, the owner's name, the local files that it reads, its bytes, and whether a model
    runs."""

    what: str
    label: str
    files: frozenset[str]
    nbytes: int
    computes: bool


class FileRequirements:
    """The local source files (by location) that each shard needs, and that reading each member's prompts needs.

    `extra_files` are further files that a shard needs, by the shard's name. `merging` are those that merging a layer of
    the backbone needs, if it is merged by what prompts give.
    """

    def __init__(self, plan: MergePlan, extra_files: Mapping[str, Iterable[SourceFile]] | None = None) -> None:
        found: dict[str, SourceFile] = {}
        self.shards: dict[str, frozenset[str]] = {}
        self.members: dict[Owner, frozenset[str]] = {}
        self._tasks: dict[tuple[str, frozenset[str], bool], _Task] = {}  # by label, files and whether a model runs
        names = owner_names(plan)
        for shard in plan.worker_shards:
            read = [file for part in shard.parts for file in part.files_read]
            read += (extra_files or {}).get(shard.file_name, ())
            self.shards[shard.file_name] = _local(read, found)
            label = names.get(shard.owner, str(shard.owner))
            self._add("the shards of", label, self.shards[shard.file_name], shard.nbytes)
        tokenizer = [side.file for side in plan.gates.tokenizer_files]
        for prompts in plan.prompt_plans:
            for member in prompts.prompted:
                files = _local([*_prompt_files(member), *tokenizer], found)
                self.members[member.owner] = self.members.get(member.owner, frozenset()) | files
                self._add("reading the prompts of", names[member.owner], files, 0, computes=prompts.runs_model)
        combined = plan.moments.tensors if plan.moments is not None else ()
        self.merging = _local((entry.file for each in combined for entry in each.entries), found)
        if self.merging:
            self._add("merging the backbone of", "all experts", self.merging, 0, computes=True)
        self.files = tuple(found.values())

    @property
    def tasks(self) -> tuple[_Task, ...]:
        return tuple(self._tasks.values())

    def for_members(self, owners: Iterable[Owner]) -> frozenset[str]:
        return frozenset().union(*(self.members[owner] for owner in owners))

    def _add(self, what: str, label: str, files: frozenset[str], nbytes: int, *, computes: bool = False) -> None:
        """Add work. Shards of one expert that read the same files are one task."""
        same = self._tasks.pop((label, files, computes), None)
        nbytes += same.nbytes if same is not None else 0
        task = _Task(what=f"{what} {label}", label=label, files=files, nbytes=nbytes, computes=computes)
        self._tasks[label, files, computes] = task


def owner_names(plan: MergePlan) -> dict[Owner, str]:
    """Names of the owners of shards and prompts for messages: `expert 0 (name)`."""
    return {source.owner: f"{source.owner} ({short_name(source.label, source.adapter)})" for source in plan.sources}


def _local(files: Iterable[SourceFile], found: dict[str, SourceFile]) -> frozenset[str]:
    local = {file.location: file for file in files if file.kind.is_local}
    found |= local
    return frozenset(local)


def _prompt_files(member: GatePrompts) -> Iterator[SourceFile]:
    for weight in member.weights.values():
        yield from (entry.file for entry in weight.entries)


class Placement:
    """Which node can do which work. `driver_node_id` is the id of the coordinator's node."""

    def __init__(self, requirements: FileRequirements, nodes: Sequence[Node], driver_node_id: str) -> None:
        self.requirements, self.nodes, self.driver_node_id = requirements, tuple(nodes), driver_node_id
        self._holders = {file.location: self._holders_of(file) for file in requirements.files}

    @property
    def is_unconstrained(self) -> bool:
        """Whether every node can do everything."""
        return all(len(holders) == len(self.nodes) for holders in self._holders.values())

    def eligible_nodes(self, files: Iterable[str]) -> list[Node]:
        """The nodes that have all of these files."""
        return [node for node in self.nodes if all(node.node_id in self._holders[file] for file in files)]

    def _holders_of(self, file: SourceFile) -> frozenset[str]:
        seen = {node.node_id: (node.files or {}).get(file.location) for node in self.nodes}
        views = {node_id: view for node_id, view in seen.items() if view is not None and view.size == file.size}
        planned = views.get(self.driver_node_id, next(iter(views.values()), None))
        return frozenset(node_id for node_id, view in views.items() if planned and view.sample == planned.sample)

    def fingerprints(self) -> dict[str, str]:
        """What distinguishes versions of the files that the coordinator's own node does not have, by location."""
        fingerprints = {}
        for file in self.requirements.files:
            views = [(node, view) for node in self.nodes if (view := (node.files or {}).get(file.location)) is not None]
            held = [(node, view) for node, view in views if node.node_id in self._holders[file.location]]
            if held and all(node.node_id != self.driver_node_id for node, _ in views):
                times = [(node.name, view.mtime_ns) for node, view in held]
                fingerprints[file.location] = file_fingerprint(times, held[0][1].sample)
        return fingerprints

    def changed(self, before: Placement | None = None) -> list[str]:
        """Files that a node no longer has in the version that the merge was planned with, or that `before` shows."""
        earlier = {node.node_id: node.files or {} for node in before.nodes} if before is not None else {}
        found = set()
        for node in self.nodes:
            for location, view in (node.files or {}).items():
                then = earlier.get(node.node_id, {}).get(location)
                held = then is not None and before is not None and node.node_id in before.holders(location)
                if view.changed or (held and then != view):
                    found.add(location)
        return sorted(found)

    def holders(self, location: str) -> frozenset[str]:
        """The nodes that have the planned version of a file."""
        return self._holders.get(location, frozenset())

    def refresh(self) -> Placement:
        """The same placement with current answers; nodes that are gone keep their old answers."""
        now = {node.node_id: node for node in query_nodes(self.requirements.files, cluster_nodes())}
        nodes = [now[n.node_id] if n.node_id in now and now[n.node_id].files is not None else n for n in self.nodes]
        return Placement(self.requirements, nodes, self.driver_node_id)

    def problems(self, gpus: float) -> list[Problem]:
        """The work that no node can do. Reading prompts needs `gpus` GPUs."""
        problems = []
        for task in self.requirements.tasks:
            eligible = self.eligible_nodes(task.files)
            needed = gpus if task.computes else 0.0
            if not eligible:
                problems.append(self._not_found_problem(task))
            elif not any(node.capacity(needed) for node in eligible):
                where = ", ".join(node.description for node in eligible)
                what = f"{task.what}: its files are on {where} only, where no actor with 1 CPU and {needed:g} GPU fits"
                remedy = (
                    "start Ray there with the CPUs and GPUs of the machine, or put the model where other nodes see it"
                )
                problems.append(Problem(where="placement", what=what, remedy=remedy))
        return list(dict.fromkeys(problems))

    def _not_found_problem(self, task: _Task) -> Problem:
        folders: dict[str, list[str]] = {}
        for file in sorted(task.files):
            folders.setdefault(os.path.dirname(file), []).append(file)
        found = [f"{folder} is {self._describe_locations(files)}" for folder, files in folders.items()]
        silent_nodes = [node.name for node in self.nodes if node.files is None]
        asked_nodes = ", ".join(node.name for node in self.nodes if node.files is not None)
        what = f"{task.what}: no node has all the files that this needs: {'; '.join(found)} (asked: {asked_nodes}"
        what += f"; without an answer: {', '.join(silent_nodes)})" if silent_nodes else ")"
        remedy = (
            "put the folders on one node (or on a filesystem that all share), or name the models by Hub ids or URLs"
        )
        if task.computes and len(folders) > 1 and not self.requirements.merging:
            remedy += "; with prompt_model: base the experts' folders are not read for prompts"
        return Problem(where="placement", what=what, remedy=remedy)

    def _describe_locations(self, files: Sequence[str]) -> str:
        """On which nodes a folder's files are, and why other nodes' files do not count as the same."""
        holders = [node.name for node in self.eligible_nodes(files)]
        partly = [
            node.name
            for node in self.nodes
            if any(file in (node.files or {}) for file in files) and node.name not in holders
        ]
        text = f"on {', '.join(holders)}" if holders else "on no node"
        return f"{text}, and incomplete or another version on {', '.join(partly)}" if partly else text

    def place_actors(self, count: int, gpus: float) -> tuple[ActorPlacement, ...]:
        """Placements for `count` actors, or for more if fewer can't do all the work.

        First one actor per task that no placed actor can do, then more on the nodes with the most bytes. Call it only
        if `problems()` is empty.
        """
        packer, demand = _Packer(gpus), Counter[str]()
        for task in sorted(self.requirements.tasks, key=lambda task: len(self.eligible_nodes(task.files))):
            eligible = self.eligible_nodes(task.files)
            for node in eligible:
                demand[node.node_id] += max(1, task.nbytes // len(eligible))
            # A node without GPUs can still move bytes, and read prompts that no other node can read.
            shares = {gpus} if task.computes and any(node.capacity(gpus) for node in eligible) else {gpus, 0.0}
            if any(packer.reserved(node, share) for node in eligible for share in shares):
                continue
            options = [(node, share) for node in eligible for share in shares if packer.free(node, share) > 0]
            if options:
                node, share = max(options, key=lambda o: (o[1], packer.free(*o), o[0].node_id == self.driver_node_id))
                packer.reserve(node, share, task.label)
        while packer.total < count:
            more = [node for node in self.nodes if demand[node.node_id] and packer.free(node, gpus) > 0]
            if not more:
                break
            packer.reserve(max(more, key=lambda node: demand[node.node_id] / (1 + packer.reserved(node, gpus))), gpus)
        eligible_nodes = [self.eligible_nodes(task.files) for task in self.requirements.tasks]
        only_nodes = {nodes[0].node_id for nodes in eligible_nodes if len(nodes) == 1}
        return tuple(
            ActorPlacement(node_id=node_id, hard_affinity=node_id in only_nodes, gpus=share, label=label)
            for (node_id, share), labels in packer.labels.items()
            for label in labels
        )


class _Packer:
    """Reserves room on nodes for actors, which get `gpus` GPUs or none.

    `labels`: what each actor is for, by node id and GPU share.
    """

    def __init__(self, gpus: float) -> None:
        self._gpus = gpus
        self.labels: dict[tuple[str, float], list[str]] = {}

    @property
    def total(self) -> int:
        return sum(map(len, self.labels.values()))

    def reserved(self, node: Node, share: float) -> int:
        return len(self.labels.get((node.node_id, share), ()))

    def free(self, node: Node, share: float) -> int:
        """How many more actors with this GPU share fit on the node."""
        held = self.reserved(node, self._gpus) + (self.reserved(node, 0.0) if self._gpus else 0)
        return min(node.capacity(0.0) - held, node.capacity(share) - self.reserved(node, share))

    def reserve(self, node: Node, share: float, label: str = "") -> None:
        self.labels.setdefault((node.node_id, share), []).append(label)


def cluster_nodes() -> list[Node]:
    """The nodes that are alive, by name, without answers."""
    import ray

    free = free_resources_by_node()
    nodes = [
        Node(
            node_id=node["NodeID"],
            name=f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})",
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.name, node.node_id))


def current_node_id() -> str:
    """Ray's id of this process's node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def query_nodes(files: Sequence[SourceFile], nodes: Sequence[Node]) -> list[Node]:
    """The nodes that answer in time, with their answers."""
    answers = run_on_nodes(view_files, list(files), nodes, "look for source files")
    return [
        Node(
            node_id=node.node_id,
            name=node.name,
            cpus=node.cpus,
            gpus=node.gpus,
            free=node.free,
            files=answers.get(node.node_id),
        )
        for node in nodes
    ]


def run_on_nodes(function: Any, argument: Any, nodes: Sequence[Node], name: str) -> dict[str, Any]:
    """Call a one-argument function on all nodes at once: results by node id, for the nodes that answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=1)(function)
    calls = {
        remote.options(name=name, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            argument
        ): node.node_id
        for node in nodes
    }
    ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_TIMEOUT_S)
    for call in late:
        ray.cancel(call, force=True)
    answers = {}
    for call in ready:
        try:
            answers[calls[call]] = ray.get(call)
        except ray.exceptions.RayError:
            continue  # the node was lost, or lacks this version of raymoe: treat it as absent
    return answers


def view_files(wanted: Sequence[SourceFile]) -> dict[str, FileView]:
    """This machine's view of some files; files of another size get no sample."""
    found = {}
    for file in wanted:
        try:
            status = os.stat(file.location)
            sample = small_sample(file) if status.st_size == file.size else 0
        except OSError:
            continue
        found[file.location] = FileView(
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            sample=sample,
            changed=is_in_view(file) and has_changed(file),
        )
    return found
