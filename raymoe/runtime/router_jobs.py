"""The jobs that compute routers: first reading the members' prompts, then computing each layer's rows.

    prompts of members  --> one object per member and layer, in Ray's object store
    a layer             --> its objects of all members, to an actor with room --> rows, to the coordinator

A member with very many prompts is read in parts (routers/prompt_passes.py), each with its own objects. The activations
go from actor to actor, never through the coordinator, and several layers are computed at once. Gate modes that read no
layers (`cheap_embed`) need the first step only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from raymoe.console import say
from raymoe.gate_modes import MODES
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePlan, PromptPlan
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.prompt_passes import Reading, plan_readings
from raymoe.routers.router_matrices import RouterRows, embedding_rows_by_owner, fitted_rows
from raymoe.runtime.actor_status import ROUTERS_JOB, reading_label
from raymoe.runtime.jobs import Job, Lost
from raymoe.runtime.transport import RayTransport, Transport
from raymoe.sources.facts import TensorEntry


@dataclass(eq=False)
class ReadPromptsJob(Job):
    """Prompts that one model reads.

    `states` refer to the activations that reading gives, once it has started: one layer after another, per reading.
    `tensors` refer to the tensors, in Ray's object store, that the prompts' models share with shards; `matrices` to the
    merged matrices of the backbone, by layer.
    """

    work: PromptWork
    readings: tuple[Reading, ...]
    states: list[Any] = field(default_factory=list)
    tensors: Any = None
    matrices: Mapping[int, Any] = field(default_factory=dict)

    @property
    def takes_states(self) -> bool:
        return bool(self.matrices)

    @property
    def owners(self) -> tuple[Owner, ...]:
        """The members of these prompts."""
        return tuple(dict.fromkeys(prompts.owner for prompts in self.readings))

    @property
    def label(self) -> str:
        return reading_label(self.readings)

    @property
    def heartbeat_name(self) -> str:
        return self.label

    def start(self, actor: Any) -> Any:
        """Start it on an actor; returns a reference that is ready when it is done."""
        return self.work.start_reading(actor, self)

    def complete(self, result: Any) -> None:
        """Take the result: None for captured prompts, since their activations stay in Ray's object store."""
        self.work.complete_reading(self, result)

    def requeue(self) -> None:
        self.work.requeue_reading(self)


@dataclass(eq=False)
class FitLayerJob(Job):
    """Computes the router of a layer from the activations of all prompts. `losses`: how often activations had been lost
    when it started."""

    work: PromptWork
    layer: int
    losses: int = 0

    @property
    def takes_states(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return f"router of layer {self.layer}"

    @property
    def heartbeat_name(self) -> str:
        return ROUTERS_JOB

    def start(self, actor: Any) -> Any:
        """Start it on an actor; returns a reference that is ready when it is done."""
        return self.work.start_layer(actor, self)

    def complete(self, result: Any) -> None:
        self.work.complete_layer(self, result)

    def requeue(self) -> None:
        self.work.requeue_layer(self)

    def recover(self, lost: Lost) -> None:
        if lost is Lost.STATES:
            self.work.recapture(self)
        else:
            self.requeue()


class PromptWork:
    """The queue of jobs of prompts, and their results. What is read and computed is up to the subclass."""

    reading_job: ClassVar[type[ReadPromptsJob]] = ReadPromptsJob
    layer_job: ClassVar[type[FitLayerJob]] = FitLayerJob

    def __init__(
        self,
        plan: PromptPlan,
        layers: Sequence[int],
        readers: int,
        names: Mapping[Owner, str] | None,
        transport: Transport | None,
    ) -> None:
        """`layers` are computed after all prompts were read. `readers`: how many actors read prompts at once; `names`:
        the owners' names in Ray's dashboard."""
        self._transport, self._names = transport or RayTransport(), names or {}
        self._wanted_layers = tuple(layers)
        self.members = plan.prompted
        self._passes = plan_readings(self.members, readers, plan.hidden)
        self._waiting_prompts = [self.reading_job(self, taken) for taken in self._passes]
        self._waiting_layers: list[FitLayerJob] = []
        self._parts: dict[Owner, list[tuple[Owner, int]]] = {member.owner: [] for member in self.members}
        for key in sorted((_key(part) for taken in self._passes for part in taken), key=lambda key: key[1]):
            self._parts[key[0]].append(key)
        self._idle_readers = readers
        # Losses of activations. Later jobs start with as many failures, so that repetition ends.
        self._capture_losses = 0
        self._captured: dict[tuple[Owner, int], list[Any]] = {}  # by owner and part
        self._layers: dict[int, Any] = {}

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting_prompts or self._waiting_layers)

    @property
    def readings(self) -> int:
        """The total number of parts in which the members' prompts are read."""
        return sum(map(len, self._passes))

    @property
    def members_done(self) -> int:
        unread = {part.owner for taken in self._passes for part in taken if _key(part) not in self._captured}
        return len(self.members) - len(unread)

    @property
    def layers_done(self) -> int:
        return len(self._layers)

    @property
    def is_done(self) -> bool:
        """Whether all layers are computed."""
        return len(self._layers) == len(self._wanted_layers)

    @property
    def _all_captured(self) -> bool:
        return bool(self._wanted_layers) and len(self._captured) == self.readings

    @property
    def waiting_owners(self) -> tuple[Owner, ...]:
        """The members of the prompts that are read next."""
        return next((job.owners for job in self._waiting_prompts), ())

    def next_reading(self, can_read: Callable[[ReadPromptsJob], bool] = bool) -> ReadPromptsJob | None:
        """The next prompts to read, among those that the requesting actor may read."""
        if not self._idle_readers:
            return None
        job = next((job for job in self._waiting_prompts if can_read(job)), None)
        if job is not None:
            self._waiting_prompts.remove(job)
            self._idle_readers -= 1
        return job

    def next_layer(self) -> FitLayerJob | None:
        """The next layer to compute the router of, if all prompts have been read."""
        if not self._all_captured:
            return None
        while self._waiting_layers:
            job = self._waiting_layers.pop(0)
            if job.layer not in self._layers:  # it is done if it was running while activations were captured again
                job.losses = self._capture_losses
                return job
        return None

    def start_reading(self, actor: Any, job: ReadPromptsJob) -> Any:
        """Ask an actor to read prompts; returns a reference that is ready when it is done."""
        raise NotImplementedError

    def start_layer(self, actor: Any, job: FitLayerJob) -> Any:
        """Ask an actor to compute a layer; returns a reference that is ready when it is done."""
        raise NotImplementedError

    def _layer_inputs(self, layer: int) -> tuple[tuple[int, ...], list[Any]]:
        """How many parts each member has, and references to what they have given at a layer."""
        inputs = [self._captured[key][layer] for keys in self._parts.values() for key in keys]
        return tuple(map(len, self._parts.values())), inputs

    def complete_reading(self, job: ReadPromptsJob, result: Any) -> None:
        """Prompts have been read. After the last ones, layers are next."""
        self._idle_readers += 1
        for number, part in enumerate(job.readings):
            self._captured[_key(part)] = job.states[number :: len(job.readings)]
        if self._all_captured:
            missing = [n for n in self._wanted_layers if n not in self._layers]
            self._waiting_layers += [self.layer_job(self, layer, failures=self._capture_losses) for layer in missing]

    def complete_layer(self, job: FitLayerJob, rows: Any) -> None:
        self._layers[job.layer] = rows
        for layers in self._captured.values():  # the store may have room for others
            layers[job.layer] = None

    def requeue_reading(self, job: ReadPromptsJob) -> None:
        self._idle_readers += 1
        self._waiting_prompts.insert(0, job)

    def requeue_layer(self, job: FitLayerJob) -> None:
        if self._all_captured:  # otherwise its layer will be requested again anyway
            self._waiting_layers.insert(0, job)

    def recapture(self, job: FitLayerJob) -> None:
        """Capture all activations again for the layers that are not done: the ones of this layer were lost with their
        node."""
        if job.losses == self._capture_losses:  # otherwise another layer has already requested it
            say("activations of prompts were lost with their node: the prompts are read again")
            self._read_again()

    def _read_again(self) -> None:
        self._capture_losses += 1
        self._captured.clear()
        self._waiting_layers.clear()
        self._waiting_prompts = [self.reading_job(self, taken, failures=self._capture_losses) for taken in self._passes]


class GateWork(PromptWork):
    """The queue of gate jobs, and their results."""

    def __init__(
        self,
        gates: GatePlan,
        readers: int,
        names: Mapping[Owner, str] | None = None,
        shard_tensors: Set[TensorEntry] = frozenset(),
        transport: Transport | None = None,
    ) -> None:
        """`readers` and `names` as in `PromptWork`. `shard_tensors`: tensors in object stores that actors read for
        shards."""
        self._gates, self._mode = gates, MODES[gates.mode]
        has_layers = self._mode.needs_forward_pass and bool(gates.prompted)
        super().__init__(gates, gates.layers_with_router if has_layers else (), readers, names, transport)
        self._shard_tensors = shard_tensors
        # Arguments that all jobs share; each job adds its own prompts.
        shared = dataclasses.replace(gates, experts=(), shared=(), kept=None)
        self._shared_plan = self._transport.put(shared) if self.members else None
        self._tensors_known: dict[Any, set[int]] = {}  # ids of the jobs whose tensors each actor has been told of
        self._rows: dict[Owner, npt.NDArray[np.float32]] = {}  # in modes that read no layers, (hidden,)

    @property
    def members_done(self) -> int:
        return len(self._rows) if self._rows else super().members_done

    @property
    def is_done(self) -> bool:
        """Whether all rows are computed."""
        return super().is_done if self._wanted_layers else len(self._rows) == len(self.members)

    def start_reading(self, actor: Any, job: ReadPromptsJob) -> Any:
        name = f"gates of {', '.join(self._names.get(owner, str(owner)) for owner in job.owners)}"
        if not self._mode.needs_forward_pass:
            return actor.embedding_rows.options(name=name).remote(self._shared_plan, job.readings)
        capture = actor.capture.options(name=name, num_returns=1 + self._gates.layers * len(job.readings))
        shared, experts = self._shared_with_shards(actor, job), len(self._gates.fitted)
        *job.states, done = capture.remote(self._shared_plan, job.readings, experts, job.matrices, *shared)
        return done

    def start_layer(self, actor: Any, job: FitLayerJob) -> Any:
        counts, inputs = self._layer_inputs(job.layer)
        fit_layer = actor.fit_layer.options(name=job.label)
        return fit_layer.remote(self._gates.mode, len(self._gates.fitted), counts, *inputs)

    def _shared_with_shards(self, actor: Any, job: ReadPromptsJob) -> tuple[Any, ...]:
        """The tensors that both these prompts and shards read; then those of waiting jobs that the actor has not been
        told of. Each job's list is put into Ray's object store once, however many actors get it."""
        if not self._shard_tensors:
            return ()
        known = self._tensors_known.setdefault(actor, set())
        told = (job, *(other for other in self._waiting_prompts if id(other) not in known))
        known.update(map(id, told))  # a reference to a job itself would keep its activations in Ray's object store
        return tuple(self._tensors(each) for each in told)

    def _tensors(self, job: ReadPromptsJob) -> Any:
        if job.tensors is None:
            refs = (ref for each in job.readings for ref in each.weights.values())
            read = (ref.entry for ref in refs if ref.combined is None)
            job.tensors = self._transport.put(
                tuple(dict.fromkeys(entry for entry in read if entry in self._shard_tensors))
            )
        return job.tensors

    def forget_actor(self, actor: Any) -> None:
        """Forget what an actor was told, since its process has ended."""
        self._tensors_known.pop(actor, None)

    def complete_reading(self, job: ReadPromptsJob, result: Any) -> None:
        if self._mode.needs_forward_pass:
            super().complete_reading(job, result)
            return
        self._idle_readers += 1
        self._rows |= dict(zip((part.owner for part in job.readings), result, strict=True))

    def result(self) -> tuple[RouterRows, RouterSummary | None]:
        """Rows of all members with prompts, and their scores on held-out prompts."""
        if not self.members:
            return {}, None
        if not self._mode.needs_forward_pass:
            return embedding_rows_by_owner(self._gates, self._rows), None
        return fitted_rows(self._gates, self._layers)


def _key(part: Reading) -> tuple[Owner, int]:
    return part.owner, part.part
