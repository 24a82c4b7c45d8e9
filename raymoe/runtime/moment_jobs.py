"""The jobs that merge the backbone by what prompts give (`backbone: regmean`), before shards and gates read it.

    prompts of experts  --> inputs of attention's matrices: one object per expert and layer, in Ray's object store
    a layer             --> its objects of all experts, to an actor with room --> merged matrices, in the object store

A shard waits for the layers of its matrices, and the prompts of the gates wait for all of them; other shards do not
wait. Merged matrices never pass the coordinator. If some are lost with their node, prompts are read again for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.console import say
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Combine, MomentPlan, Shard
from raymoe.runtime.actor_status import BACKBONE_JOB, WorkKind, reading_label
from raymoe.runtime.router_jobs import FitLayerJob, PromptWork, ReadPromptsJob
from raymoe.runtime.transport import Transport

_NO_MOMENTS = MomentPlan(layers=0, hidden=1, experts=(), tokenizer_files=(), matrices=())


@dataclass(eq=False)
class ReadInputsJob(ReadPromptsJob):
    """Prompts that an expert's own model reads."""

    @property
    def label(self) -> str:
        return reading_label(self.readings, WorkKind.INPUTS)


@dataclass(eq=False)
class MergeLayerJob(FitLayerJob):
    """Merges the matrices of a layer. `merged` refers to them, once it has started."""

    merged: Any = None

    @property
    def label(self) -> str:
        return f"backbone of layer {self.layer}"

    @property
    def heartbeat_name(self) -> str:
        return BACKBONE_JOB


class MomentWork(PromptWork):
    """The queue of jobs that merge the backbone, and references to what they give."""

    reading_job, layer_job = ReadInputsJob, MergeLayerJob

    def __init__(
        self,
        plan: MomentPlan | None,
        readers: int,
        names: Mapping[Owner, str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        """`plan` is None if nothing is merged so: then it is done. Else as in `PromptWork`."""
        self._plan = plan or _NO_MOMENTS
        layers = [layer for layer, matrices in enumerate(self._plan.matrices) if matrices]
        super().__init__(self._plan, layers, readers, names, transport)
        self._shared_plan = self._transport.put(dataclasses.replace(self._plan, experts=())) if layers else None
        self._shard_layers: dict[str, frozenset[int]] = {}

    @property
    def layers(self) -> int:
        """The number of layers to merge."""
        return len(self._wanted_layers)

    @property
    def matrices(self) -> Mapping[int, Any]:
        """References to the merged matrices, by layer."""
        return dict(self._layers)

    def needed_by(self, shard: Shard) -> Mapping[int, Any]:
        """References to the merged matrices that a shard holds, by layer."""
        return {layer: self._layers[layer] for layer in self._layers_of(shard)}

    def has_all_for(self, shard: Shard) -> bool:
        """Whether all matrices of a shard are merged."""
        return self._layers_of(shard) <= self._layers.keys()

    def _layers_of(self, shard: Shard) -> frozenset[int]:
        if not self._wanted_layers:
            return frozenset()
        if shard.file_name not in self._shard_layers:
            self._shard_layers[shard.file_name] = merged_layers(shard)
        return self._shard_layers[shard.file_name]

    def start_reading(self, actor: Any, job: ReadPromptsJob) -> Any:
        name = f"backbone inputs of {', '.join(self._names.get(owner, str(owner)) for owner in job.owners)}"
        capture = actor.capture_inputs.options(name=name, num_returns=1 + self._plan.layers * len(job.readings))
        *job.states, done = capture.remote(self._shared_plan, job.readings, len(self.members))
        return done

    def start_layer(self, actor: Any, job: FitLayerJob) -> Any:
        assert isinstance(job, MergeLayerJob)
        counts, inputs = self._layer_inputs(job.layer)
        merge = actor.merge_layer.options(name=job.label, num_returns=2)
        job.merged, done = merge.remote(self._plan.matrices[job.layer], tuple(self._parts), counts, *inputs)
        return done

    def complete_layer(self, job: FitLayerJob, rows: Any) -> None:
        assert isinstance(job, MergeLayerJob)
        super().complete_layer(job, job.merged)

    def merge_again(self, lost: Mapping[int, Any]) -> None:
        """Merge the layers again of which these references no longer lead to anything. Layers that were merged again
        since then stay."""
        layers = [layer for layer, reference in lost.items() if self._layers.get(layer) is reference]
        if not layers:
            return
        say("merged matrices of the backbone were lost with their node: the prompts are read again")
        for layer in layers:
            del self._layers[layer]
        if self._all_captured:  # else prompts are being read again already, for all layers that are missing then
            self._read_again()


def merged_layers(shard: Shard) -> frozenset[int]:
    """The layers of the matrices in a shard that are merged before it can be written."""
    sources = (part.what for part in shard.parts)
    combined = (source.combination.moments for source in sources if isinstance(source, Combine))
    return frozenset(moments.layer for moments in combined if moments is not None)
