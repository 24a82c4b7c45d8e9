"""What makes the routers, as jobs for actors: the members' prompts, and then each layer's rows.

    prompts of members  --> an object for each member and layer, in Ray's store
    a layer             --> its objects of all members, to whoever has room --> rows, to the coordinator

So the states of prompts go from actor to actor, never through the coordinator, and layers are worked on side by side.
Modes that read no layers (`cheap_embed`) are done with the first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.config import MODES
from raymoe.gates.assemble import Rows, collected, embedding_rows_by_owner
from raymoe.gates.capture import readings
from raymoe.gates.summary import RouterSummary
from raymoe.planning.types import GatePlan, GatePrompts
from raymoe.report.display import say
from raymoe.sources.types import TensorEntry

__all__ = ["GateJob", "GateWork"]


@dataclass(eq=False)
class GateJob:
    """Prompts that one model reads, or the number of a layer. `failures`: how often an actor died over it or input was
    lost.

    `states` refer to what the prompts will leave, once they are being read: one layer after the other, by member.
    """

    what: tuple[GatePrompts, ...] | int
    failures: int = 0
    states: list[Any] = field(default_factory=list)

    @property
    def owners(self) -> tuple[str, ...]:
        """The members whose prompts these are."""
        return () if isinstance(self.what, int) else tuple(prompts.owner for prompts in self.what)

    @property
    def label(self) -> str:
        return f"router of layer {self.what}" if isinstance(self.what, int) else f"gates of {', '.join(self.owners)}"


class GateWork:
    """The queue of gate jobs and what came of them."""

    def __init__(
        self,
        gates: GatePlan,
        readers: int,
        names: Mapping[str, str] | None = None,
        written: Set[TensorEntry] = frozenset(),
    ) -> None:
        """`readers`: how many actors read prompts side by side; `names`: what Ray's dashboard calls the owners;
        `written`: tensors of objects that actors read for shards."""
        import ray

        self._written = written
        self._gates, self._mode, self._names = gates, MODES[gates.mode], names or {}
        self.members = [p for p in (*gates.experts, *gates.shared) if p.positive]
        self._readings = readings(self.members, readers)
        self._waiting = [GateJob(members) for members in self._readings]
        self._idle_readers = readers
        # What all jobs share; each gets its own prompts beside it.
        self._shared_plan = ray.put(dataclasses.replace(gates, experts=(), shared=())) if self.members else None
        self._losses = 0  # of states; jobs that come after one begin with as many failures, so that it has an end
        self._captured: dict[str, list[Any]] = {}
        self._layers: dict[int, Any] = {}
        self._rows: dict[str, npt.NDArray[np.float32]] = {}  # of the mode that reads no layers, (hidden,)

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def members_done(self) -> int:
        return len(self._captured) + len(self._rows)

    @property
    def layers_done(self) -> int:
        return len(self._layers)

    @property
    def is_done(self) -> bool:
        """Whether all rows are there."""
        if self._mode.reads_layers and self.members:
            return len(self._layers) == self._gates.layers
        return len(self._rows) == len(self.members)

    @property
    def _all_captured(self) -> bool:
        return self._mode.reads_layers and len(self._captured) == len(self.members)

    @property
    def waiting_owners(self) -> tuple[str, ...]:
        """The members whose prompts are to be read next."""
        return next((job.owners for job in self._waiting), ())

    def next_member(self, may_read: Callable[[GateJob], bool] = bool) -> GateJob | None:
        """The prompts that are to be read next, of those that may be read by whoever asks."""
        if not self._idle_readers:
            return None
        jobs = (job for job in self._waiting if not isinstance(job.what, int) and may_read(job))
        return next((self._take(job) for job in jobs), None)

    def next_layer(self) -> GateJob | None:
        """The layer whose router is to be made next, if all prompts have been read."""
        if not self._all_captured:
            return None
        while job := next((self._take(job) for job in self._waiting), None):
            if job.what not in self._layers:  # so if it was under way while states were captured again
                return job
        return None

    def _take(self, job: GateJob) -> GateJob:
        self._waiting.remove(job)
        self._idle_readers -= not isinstance(job.what, int)
        return job

    def send_back(self, job: GateJob) -> None:
        """Its actor died: it goes to the front of the queue."""
        self._idle_readers += not isinstance(job.what, int)
        if self._all_captured or not isinstance(job.what, int):  # else its layer will be asked for again anyway
            self._waiting.insert(0, job)

    def start(self, actor: Any, job: GateJob) -> Any:
        """Start a job on an actor; a reference that is ready when it is done."""
        experts = len(self._gates.experts)
        name = f"gates of {', '.join(self._names.get(owner, owner) for owner in job.owners)}"
        if isinstance(job.what, int):
            inputs = [self._captured[member.owner][job.what] for member in self.members]
            return actor.layer_rows.options(name=job.label).remote(self._gates.mode, experts, *inputs)
        if not self._mode.reads_layers:
            return actor.embedding_rows.options(name=name).remote(self._shared_plan, job.what)
        options = {"name": name, "num_returns": 1 + self._gates.layers * len(job.what)}
        capture = actor.capture.options(**options)
        both = self._also_written(job), self._also_written(*self._waiting)
        *job.states, done = capture.remote(self._shared_plan, job.what, experts, *both)
        return done

    def _also_written(self, *jobs: GateJob) -> tuple[TensorEntry, ...]:
        """Tensors that reading these prompts takes and shards too."""
        prompts = (each for job in jobs if not isinstance(job.what, int) for each in job.what)
        read = (ref.entry for each in prompts for ref in each.weights.values())
        return tuple(dict.fromkeys(entry for entry in read if entry in self._written))

    def came_back(self, job: GateJob, result: Any) -> None:
        """A job is done. `result` is None for prompts that were captured: they stay in Ray's store."""
        self._idle_readers += not isinstance(job.what, int)
        if isinstance(job.what, int):
            self._layers[job.what] = result
            for layers in self._captured.values():  # the store may have the room for others
                layers[job.what] = None
        elif self._mode.reads_layers:
            for number, owner in enumerate(job.owners):
                self._captured[owner] = job.states[number :: len(job.owners)]
            if self._all_captured:
                missing = [n for n in range(self._gates.layers) if n not in self._layers]
                self._waiting += [GateJob(layer, failures=self._losses) for layer in missing]
        else:
            self._rows |= dict(zip(job.owners, result, strict=True))

    def capture_again(self) -> None:
        """States of prompts were lost with their node: all are captured anew, for the layers that are not done."""
        if self._all_captured:  # else another layer has seen to it
            say("what prompts had left at the layers was lost with its node: they are read again")
            self._losses += 1
            self._captured.clear()
            self._waiting = [GateJob(members, failures=self._losses) for members in self._readings]

    def result(self) -> tuple[Rows, RouterSummary | None]:
        """Rows of all members with prompts, and how they did on held-out prompts."""
        if not self.members:
            return {}, None
        if not self._mode.reads_layers:
            return embedding_rows_by_owner(self._gates, self._rows), None
        return collected(self._layers, [member.owner for member in self._gates.experts])
