"""Sums over a plan: parameters, bytes by owner and by kind of part, bytes that are read for prompts and held."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from raymoe.architectures import MoeShape
from raymoe.planning.owner import Owner, OwnerKind
from raymoe.planning.plan import GatePlan, GatePrompts, MomentPlan, PromptPlan, Shard, Totals, WeightRef
from raymoe.sources.facts import TensorEntry
from raymoe.tensor_names import layer_of


def compute_totals(
    shards: Sequence[Shard], moe: MoeShape, gates: GatePlan, moments: MomentPlan | None = None
) -> Totals:
    parameters, expert_parameters = 0, 0
    by_owner: dict[Owner, int] = {}
    by_kind: dict[str, int] = {}
    for shard in shards:
        by_owner[shard.owner] = by_owner.get(shard.owner, 0) + shard.nbytes
        for part in shard.parts:
            count = math.prod(part.shape)
            parameters += count
            expert_parameters += count if shard.owner.kind in (OwnerKind.EXPERT, OwnerKind.ALL_EXPERTS) else 0
            kind = type(part.what).__name__.lower()
            by_kind[kind] = by_kind.get(kind, 0) + part.nbytes
    idle = expert_parameters * (moe.experts - moe.experts_per_token) // moe.experts
    # Of the embedding, only the rows of the prompts' tokens are read.
    return Totals(
        parameters=parameters,
        active_parameters=parameters - idle,
        output_bytes=sum(by_owner.values()),
        bytes_by_owner=by_owner,
        bytes_by_kind=by_kind,
        gate_bytes=sum(map(_layer_bytes, _distinct_readers(gates.members))),
        backbone_bytes=sum(map(_layer_bytes, _distinct_readers(moments.members))) if moments is not None else 0,
        peak_gate_bytes=largest_layer(gates, lambda entry: entry.nbytes),
    )


def _distinct_readers(readers: Sequence[GatePrompts]) -> list[GatePrompts]:
    """One reader per model: readers that differ only by adapters read together (`routers.prompt_passes`)."""
    by_object = {id(reader.weights): reader for reader in readers}  # those that the base reads share one mapping
    models = {tuple((name, ref.entry) for name, ref in reader.weights.items()): reader for reader in by_object.values()}
    return list(models.values())


def _layer_bytes(reader: GatePrompts) -> int:
    return sum(_bytes_read(ref) for name, ref in reader.weights.items() if layer_of(name) is not None)


def _bytes_read(ref: WeightRef) -> int:
    """Adapters are not counted: their factors are small."""
    if ref.combined is None:
        return ref.entry.nbytes
    if ref.combined.moments is not None:  # it is in Ray's object store
        return 0
    return sum(model.entry.nbytes for model in (ref.combined.base, *ref.combined.experts))


def largest_layer(plan: PromptPlan, size: Callable[[TensorEntry], int]) -> int:
    """The size of the largest layer that prompts pass. The embedding does not count, since it is read row by row."""
    found = 0
    for reader in _distinct_readers(plan.members):
        layers: Counter[int] = Counter()
        for name, ref in reader.weights.items():
            if (layer := layer_of(name)) is not None:
                layers[layer] += size(ref.entry)
        found = max([found, *layers.values()])
    return found
