"""Which tensors the merged model has and where each comes from: the dense table met with the host's, role by role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raymoe.architectures import DenseSpec, MoeHost, MoeShape
from raymoe.config import ExpertConfig
from raymoe.planning.shards import OutputTensor
from raymoe.planning.types import Copy, PartSource, Router, Transform, WeightRef, Zeros
from raymoe.sources.types import LoraPair, ModelFacts

__all__ = ["Member", "base_tensors", "computed_tensors", "member_tensors", "weight_refs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An expert or shared expert in its place: owner `expert 2` or `shared 0`."""

    owner: str
    number: int
    is_shared: bool
    config: ExpertConfig
    facts: ModelFacts
    spec: DenseSpec


def base_tensors(facts: ModelFacts, spec: DenseSpec, host: MoeHost, dtype: str) -> Iterator[OutputTensor]:
    """Embeddings, norms, attention, head."""
    for row, layer, name in spec.tensors():
        if row.is_ffn:
            continue
        output = host.backbone[row.role].format(layer=layer)
        what = _from_source(facts, name, dtype)
        yield OutputTensor(name=output, dtype=dtype, shape=spec.shape_of(row), owner="base", what=what)


def member_tensors(member: Member, host: MoeHost, dtype: str, seed: int) -> Iterator[OutputTensor]:
    """The FFN of one expert, or of one shared expert."""
    names = host.shared if member.is_shared else host.expert
    config = member.config
    for row, layer, name in member.spec.tensors():
        if not row.is_ffn:
            continue
        output = names[row.role].format(layer=layer, expert=member.number)
        # residual_scale acts where the FFN adds to the residual stream, on its last matrix.
        scale = config.residual_scale if row.role == "ffn.down" else None
        noise = config.noise_scale or None
        what = _from_source(member.facts, name, dtype, noise=noise, scale=scale, seed=seed)
        shape = member.spec.shape_of(row)
        yield OutputTensor(name=output, dtype=dtype, shape=shape, owner=member.owner, what=what)


def computed_tensors(spec: DenseSpec, moe: MoeShape, host: MoeHost, dtype: str) -> Iterator[OutputTensor]:
    """Routers, gates of shared experts, and what the host demands and the dense model lacks."""
    zero_rows = host.zeros(spec, moe)
    for layer in range(spec.layers):
        yield _computed(host.router.format(layer=layer), (moe.experts, spec.hidden), dtype, Router(layer=layer))
        if moe.shared and host.shared_router:
            name = host.shared_router.format(layer=layer)
            yield _computed(name, (moe.shared, spec.hidden), dtype, Router(layer=layer, shared=True))
        for row in zero_rows:
            shape = tuple(s if isinstance(s, int) else spec.size_of(s) for s in row.shape)
            yield _computed(row.name.format(layer=layer), shape, dtype, Zeros())


def weight_refs(facts: ModelFacts, spec: DenseSpec, *, ffn_from: Member | None = None) -> dict[str, WeightRef]:
    """Parameter name -> what to load, for a model that reads prompts; `ffn_from` grafts an expert's FFN onto it."""
    refs = {}
    for row, _, name in spec.tensors():
        source = ffn_from.facts if ffn_from and row.is_ffn else facts
        refs[name] = WeightRef(entry=source.index.tensors[name], lora=_lora(source, name))
    return refs


def _computed(name: str, shape: tuple[int, ...], dtype: str, what: PartSource) -> OutputTensor:
    return OutputTensor(name=name, dtype=dtype, shape=shape, owner="router", what=what)


def _lora(facts: ModelFacts, name: str) -> LoraPair | None:
    return facts.adapter.pairs.get(name) if facts.adapter else None


def _from_source(
    facts: ModelFacts,
    name: str,
    dtype: str,
    *,
    noise: float | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> PartSource:
    entry, lora = facts.index.tensors[name], _lora(facts, name)
    if entry.dtype == dtype and lora is None and noise is None and scale is None:
        return Copy(source=entry)
    return Transform(source=entry, lora=lora, noise_scale=noise, scale=scale, seed=seed)
