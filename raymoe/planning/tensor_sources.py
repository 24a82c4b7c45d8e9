"""Maps the merged model's tensors to their sources: matches the dense table with the MoE architecture's, by role."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

from raymoe.architectures import DenseSpec, MoeArchitecture, MoeShape
from raymoe.architectures.moe_architecture import ConstantRow
from raymoe.config import ExpertConfig
from raymoe.errors import Problem, first_few
from raymoe.formatting import plural, short_list
from raymoe.planning.owner import ALL_EXPERTS, ALL_SHARED, BASE, ROUTER, Owner, OwnerKind
from raymoe.planning.plan import (
    Columns,
    Combine,
    Constant,
    Copy,
    HeadPermutation,
    Part,
    PartSource,
    Reinit,
    Router,
    Transform,
    Transposed,
    WeightRef,
)
from raymoe.planning.shard_packing import OutputTensor, Piece
from raymoe.sources.dtypes import DTYPE_BYTES
from raymoe.sources.facts import AdapterFacts, LoraPair, ModelFacts, slice_rows
from raymoe.sources.lora import LORA_ON_TIED_HEAD, MERGE_WITH_PEFT
from raymoe.tensor_names import HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An expert or shared expert with its place in the config."""

    owner: Owner
    config: ExpertConfig
    facts: ModelFacts
    spec: DenseSpec

    @property
    def is_shared(self) -> bool:
        return self.owner.kind is OwnerKind.SHARED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """One matrix (or vector) of a dense model, with its transform: a stored tensor, or some rows of one."""

    role: str
    layer: int | None
    shape: tuple[int, ...]
    what: PartSource


def base_tensors(
    facts: ModelFacts,
    spec: DenseSpec,
    architecture: MoeArchitecture,
    dtype: str,
    merged: Mapping[str, WeightRef],
) -> Iterator[OutputTensor]:
    """Embeddings, norms, attention, head: the base's, except those that are `merged`, by their names in the base."""
    is_permuted = facts.mixture is not None and facts.mixture.has_permuted_heads
    heads = None if is_permuted else head_permutation(spec, architecture)
    for matrix in _matrices(facts, spec, dtype, ffn=False, instead=merged):
        what = _permute_heads(matrix.what, heads) if heads and matrix.role in ROTARY_ROLES else matrix.what
        for template in architecture.backbone_names(matrix.role, spec):
            output = template.format(layer=matrix.layer)
            yield OutputTensor(name=output, dtype=dtype, shape=matrix.shape, owner=BASE, what=what)


def head_permutation(spec: DenseSpec, architecture: MoeArchitecture) -> HeadPermutation | None:
    """The permutation of q and k rows for the MoE architecture's RoPE; None if it matches the family's."""
    if not spec.family.rope_is_interleaved or architecture.rope_is_interleaved:
        return None
    return HeadPermutation(head_dim=spec.head_dim, rotary_dim=spec.rotary_dim)


ROTARY_ROLES = ("attn.q", "attn.k", "attn.q.bias", "attn.k.bias")


def _permute_heads(what: PartSource, permutation: HeadPermutation) -> Transform | Combine:
    assert isinstance(what, (Copy, Transform, Combine))
    return (
        Transform(source=what.source, heads=permutation) if isinstance(what, Copy) else replace(what, heads=permutation)
    )


def plain_ffn_tensors(
    facts: ModelFacts, spec: DenseSpec, moe: MoeShape, architecture: MoeArchitecture, dtype: str
) -> Iterator[OutputTensor]:
    """The base's FFN in layers without experts."""
    if not moe.dense_layers or architecture.layer_rule is None:
        return
    for matrix in _matrices(facts, spec, dtype, ffn=True):
        if matrix.layer in moe.dense_layers:
            output = architecture.layer_rule.ffn[matrix.role].format(layer=matrix.layer)
            yield OutputTensor(name=output, dtype=dtype, shape=matrix.shape, owner=BASE, what=matrix.what)


def expert_tensors(
    members: Sequence[Member], moe: MoeShape, architecture: MoeArchitecture, dtype: str, seed: int
) -> Iterator[OutputTensor]:
    """The FFNs of all experts and shared experts, in the tensors that the MoE architecture has for them."""
    experts = [member for member in members if not member.is_shared]
    shared = [member for member in members if member.is_shared]
    if architecture.is_fused:
        yield from _fuse_experts(experts, moe, architecture, dtype, seed)
    else:
        for member in experts:
            yield from _member_tensors(member, moe, architecture.expert, dtype, seed)
    if len(shared) > 1:
        yield from _widen_shared(shared, moe, architecture.shared, dtype, seed)
    else:
        for member in shared:
            yield from _member_tensors(member, moe, architecture.shared, dtype, seed)


def _member_tensors(
    member: Member, moe: MoeShape, names: Mapping[str, str], dtype: str, seed: int
) -> Iterator[OutputTensor]:
    """The FFN of one expert or shared expert. Roles with the same name share one tensor, row by row."""
    by_name = _roles_by_name(names)
    for number, matrices in _ffn_experts(member, moe, dtype, seed):
        for template, roles in by_name.items():
            output = template.format(layer=matrices[roles[0]].layer, expert=number)
            (width,) = {matrices[role].shape[1:] for role in roles}
            shape = (sum(matrices[role].shape[0] for role in roles), *width)
            what = matrices[roles[0]].what if len(roles) == 1 else _pieces(output, matrices, roles)
            yield OutputTensor(name=output, dtype=dtype, shape=shape, owner=member.owner, what=what)


def _fuse_experts(
    members: Sequence[Member], moe: MoeShape, architecture: MoeArchitecture, dtype: str, seed: int
) -> Iterator[OutputTensor]:
    """The FFNs of all experts of a layer as the architecture's few tensors of (experts, rows, columns). All layers have
    the width of the widest: narrower FFNs end with zeros."""
    width, count = max(members[0].spec.ffn_widths) // moe.granularity, moe.experts
    experts = sorted(
        (e for m in members for e in _ffn_experts(m, moe, dtype, seed)), key=lambda e: (_layer(e[1]), e[0])
    )
    for _, group in groupby(experts, key=lambda expert: _layer(expert[1])):
        of_layer = list(group)
        for template, roles in _roles_by_name(architecture.expert).items():
            output = template.format(layer=_layer(of_layer[0][1]))
            what = tuple(
                padded
                for number, matrices in of_layer
                for role, piece in zip(roles, _pieces(f"{output}[{number}]", matrices, roles), strict=True)
                for padded in _pad(piece, role, width, dtype)
            )
            if architecture.transposes_experts:
                each = [what[start : start + len(roles)] for start in range(0, len(what), len(roles))]
                what = tuple(_transpose(pieces, dtype) for pieces in each)
            rows = sum(piece.shape[0] for piece in what) // count
            shape = (count, rows, what[0].shape[1])
            yield OutputTensor(name=output, dtype=dtype, shape=shape, owner=ALL_EXPERTS, what=what)


def _transpose(pieces: Sequence[Piece], dtype: str) -> Piece:
    """Matrices one below the other, transposed."""
    matrices = tuple(_single_part(piece, dtype) for piece in pieces)
    shape = (pieces[0].shape[1], sum(piece.shape[0] for piece in pieces))
    return Piece(name=f"{pieces[0].name}.transposed", shape=shape, what=Transposed(matrices=matrices))


def _pad(piece: Piece, role: str, width: int, dtype: str) -> Iterator[Piece]:
    """A matrix of an FFN, filled up with zeros to `width`: rows below it, or beside `ffn.down` columns."""
    rows, columns = piece.shape
    is_down = role == "ffn.down"
    missing = width - (columns if is_down else rows)
    shape = (rows, missing) if is_down else (missing, columns)
    zeros = Piece(name=f"{piece.name}.zeros", shape=shape, what=Constant())
    if not missing:
        yield piece
    elif is_down:
        matrices = tuple(_single_part(each, dtype) for each in (piece, zeros))
        yield replace(piece, shape=(rows, width), what=Columns(matrices=matrices))
    else:
        yield from (piece, zeros)


def _widen_shared(
    members: Sequence[Member], moe: MoeShape, names: Mapping[str, str], dtype: str, seed: int
) -> Iterator[OutputTensor]:
    """Several shared experts as one of their total width, which is exactly their sum: rows of gate and up stacked,
    columns of down side by side."""
    for experts in zip(*(_ffn_experts(member, moe, dtype, seed) for member in members), strict=True):
        of_layer = [matrices for _, matrices in experts]
        for template, roles in _roles_by_name(names).items():
            output = template.format(layer=_layer(of_layer[0]))
            blocks = [
                Piece(name=f"{output}[{member.owner.index}].{role[4:]}", shape=found[role].shape, what=found[role].what)
                for role in roles
                for member, found in zip(members, of_layer, strict=True)
            ]
            rows, columns = blocks[0].shape
            what: PartSource | tuple[Piece, ...]
            if roles == ["ffn.down"]:
                shape = (rows, columns * len(members))
                what = Columns(matrices=tuple(_single_part(block, dtype) for block in blocks))
            else:
                shape, what = (rows * len(blocks), columns), tuple(blocks)
            yield OutputTensor(name=output, dtype=dtype, shape=shape, owner=ALL_SHARED, what=what)


def _single_part(piece: Piece, dtype: str) -> Part:
    nbytes = math.prod(piece.shape) * DTYPE_BYTES[dtype]
    return Part(name=piece.name, dtype=dtype, shape=piece.shape, start=0, end=nbytes, what=piece.what)


def _layer(matrices: Mapping[str, _Matrix]) -> int:
    """The layer of a FFN."""
    layer = next(iter(matrices.values())).layer
    assert layer is not None
    return layer


def _ffn_experts(member: Member, moe: MoeShape, dtype: str, seed: int) -> Iterator[tuple[int, Mapping[str, _Matrix]]]:
    """The experts that a member's FFN is cut into, layer by layer: their numbers, and their matrices by role. A shared
    expert is whole."""
    granularity, reinit = 1 if member.is_shared else moe.granularity, member.config.reinit
    first = (member.owner.index or 0) * granularity
    for matrices in _ffn_layers(member, moe, dtype, seed):
        for part in range(granularity):
            number = first + part
            expert = _cut(matrices, part, granularity, seed) if granularity > 1 else matrices
            if reinit:
                channels = f"layer {_layer(matrices)} {member.owner.kind.value} {number}"
                expert = {role: _redrawn(each, reinit, channels, seed) for role, each in expert.items()}
            yield number, expert


def _cut(matrices: Mapping[str, _Matrix], part: int, parts: int, seed: int) -> dict[str, _Matrix]:
    """One of the experts of equal width that a FFN is cut into: rows of gate and up, columns of down, times `parts`.

    The experts' outputs add up to `parts` times that of the FFN: each of them gets 1 / `parts` of the router's weight.
    The factor is on down alone, where it is exact whatever the activation is.
    """
    found = {}
    for role, matrix in matrices.items():
        rows, columns = matrix.shape
        width = (columns if role == "ffn.down" else rows) // parts
        first, last = part * width, (part + 1) * width
        what = matrix.what
        assert isinstance(what, (Copy, Transform))
        if role == "ffn.down":
            whole = what if isinstance(what, Transform) else Transform(source=what.source, seed=seed)
            scale = parts * (1.0 if whole.scale is None else whole.scale)
            cut = replace(whole, columns=(first, last), scale=scale)
            found[role] = replace(matrix, shape=(rows, width), what=cut)
        else:
            changes: dict[str, Any] = {"source": slice_rows(what.source, first, last)}
            if isinstance(what, Transform) and what.lora is not None:
                changes["lora"] = slice_lora(what.lora, first, last)
            found[role] = replace(matrix, shape=(width, columns), what=replace(what, **changes))
    return found


def _redrawn(matrix: _Matrix, share: float, channels: str, seed: int) -> _Matrix:
    """A matrix of an expert with a share of its channels drawn anew."""
    what = matrix.what
    assert isinstance(what, (Copy, Transform))
    whole = what if isinstance(what, Transform) else Transform(source=what.source, seed=seed)
    reinit = Reinit(share=share, channels=channels, of_columns=matrix.role == "ffn.down")
    return replace(matrix, what=replace(whole, reinit=reinit))


def _ffn_layers(member: Member, moe: MoeShape, dtype: str, seed: int) -> Iterator[Mapping[str, _Matrix]]:
    """The matrices of the FFN of each layer with experts, by their roles."""
    config = member.config
    matrices = _matrices(
        member.facts, member.spec, dtype, ffn=True, noise=config.noise_scale, scale=config.residual_scale, seed=seed
    )
    for layer, of_layer in groupby(matrices, key=lambda matrix: matrix.layer):
        if layer not in moe.dense_layers:
            yield {matrix.role: matrix for matrix in of_layer}


def _roles_by_name(names: Mapping[str, str]) -> dict[str, list[str]]:
    roles: dict[str, list[str]] = {}
    for role, name in names.items():
        roles.setdefault(name, []).append(role)
    return roles


def _pieces(tensor: str, matrices: Mapping[str, _Matrix], roles: Sequence[str]) -> tuple[Piece, ...]:
    return tuple(
        Piece(name=f"{tensor}.{role[4:]}", shape=matrices[role].shape, what=matrices[role].what) for role in roles
    )


def _matrices(
    facts: ModelFacts,
    spec: DenseSpec,
    dtype: str,
    *,
    ffn: bool,
    noise: float | None = None,
    scale: float | None = None,
    seed: int = 0,
    instead: Mapping[str, WeightRef] = MappingProxyType({}),
) -> Iterator[_Matrix]:
    """The matrices of a model's FFNs, or all others, in the order of its table; `instead` replaces some tensors."""
    for row, layer, name in spec.tensors():
        if row.is_ffn is not ffn:
            continue
        ref = instead.get(name) or weight_ref(facts, name)
        entry, lora = ref.entry, ref.lora
        for role, first, last in spec.fused_parts(row):
            shape = (last - first, *spec.shape_of(row)[1:])
            part = entry if shape == entry.shape else slice_rows(entry, first, last)
            part_lora = lora if lora is None or part is entry else slice_lora(lora, first, last)
            # residual_scale applies where the FFN adds to the residual stream, on its last matrix.
            own_scale = scale if role == "ffn.down" else None
            what: PartSource
            if ref.combined is not None:
                what = Combine(combination=ref.combined, first_row=first)
            elif part.dtype == dtype and lora is None and not noise and own_scale is None:
                what = Copy(source=part)
            else:
                what = Transform(source=part, lora=part_lora, noise_scale=noise or None, scale=own_scale, seed=seed)
            yield _Matrix(role=role, layer=layer, shape=shape, what=what)


def slice_lora(lora: LoraPair, first: int, last: int) -> LoraPair:
    """The changes of rows [first, last) of a tensor."""
    magnitude = slice_rows(lora.magnitude, first, last) if lora.magnitude is not None else None
    return replace(lora, b=slice_rows(lora.b, first, last), magnitude=magnitude)


def computed_tensors(
    spec: DenseSpec, moe: MoeShape, architecture: MoeArchitecture, dtype: str
) -> Iterator[OutputTensor]:
    """Routers, gates of shared experts, and tensors that the MoE architecture requires and the dense model lacks."""
    constant_rows, factor = architecture.constants(spec, moe), architecture.router_factor(spec.hidden)
    for layer in moe.dense_layers:
        for row in constant_rows:
            if row.is_of_attention:
                yield _constant_tensor(row, spec, layer, dtype)
    for layer in moe.layers(spec):
        repeat = moe.granularity if moe.granularity > 1 else None
        router = Router(layer=layer, factor=None if factor == 1.0 else factor, repeat=repeat)
        yield _computed_tensor(architecture.router.format(layer=layer), (moe.experts, spec.hidden), dtype, router)
        if moe.shared and architecture.shared_router:
            name = architecture.shared_router.format(layer=layer)
            yield _computed_tensor(name, (1, spec.hidden), dtype, Router(layer=layer, shared=True))
        for row in constant_rows:
            yield _constant_tensor(row, spec, layer, dtype)


def _constant_tensor(row: ConstantRow, spec: DenseSpec, layer: int, dtype: str) -> OutputTensor:
    shape = tuple(s if isinstance(s, int) else spec.size_of(s) for s in row.shape)
    return _computed_tensor(row.name.format(layer=layer), shape, dtype, Constant(value=row.value))


def weight_refs(
    facts: ModelFacts, spec: DenseSpec, merged: Mapping[str, WeightRef] = MappingProxyType({})
) -> dict[str, WeightRef]:
    """Parameter name -> tensor to load, for a model that reads prompts; `merged` as in `base_tensors`. The backbone of
    a mixture gives those outside FFNs only."""
    return {
        name: merged.get(name) or weight_ref(facts, name)
        for row, _, name in spec.tensors()
        if facts.has_ffn or not row.is_ffn
    }


def graft_ffn(
    refs: Mapping[str, WeightRef], spec: DenseSpec, moe: MoeShape, member: Member, is_needed: Callable[[str], bool]
) -> dict[str, WeightRef]:
    """The parameters of a model that reads prompts, with an expert's FFN instead of its own in layers with experts, as
    far as needed."""
    ffn = [
        name for row, layer, name in spec.tensors() if row.is_ffn and layer not in moe.dense_layers and is_needed(name)
    ]
    return {**refs, **{name: weight_ref(member.facts, name) for name in ffn}}


def weight_ref(facts: ModelFacts, name: str) -> WeightRef:
    """A model's tensor, with its adapter's changes."""
    return WeightRef(entry=facts.index.tensors[name], lora=_lora(facts, name))


def _computed_tensor(name: str, shape: tuple[int, ...], dtype: str, what: PartSource) -> OutputTensor:
    return OutputTensor(name=name, dtype=dtype, shape=shape, owner=ROUTER, what=what)


def adapter_problems(
    facts: ModelFacts,
    spec: DenseSpec,
    where: str,
    *,
    ffn_only: bool,
    instead: str = "use prompt_model: base or grafted",
) -> list[Problem]:
    """Changes of an adapter that raymoe does not support, if the merge needs them: those of its FFNs, or all of them.
    `instead` names config keys with which fewer would be needed."""
    if facts.adapter is None:
        return []
    label = f"{where} ({facts.label})"
    return first_few(_adapter_problems(facts.adapter, spec, label, ffn_only=ffn_only, instead=instead))


def _adapter_problems(
    adapter: AdapterFacts, spec: DenseSpec, label: str, *, ffn_only: bool, instead: str
) -> Iterator[Problem]:
    left_out = dict(adapter.left_out)
    if spec.tied and HEAD in adapter.pairs:  # the file holds a duplicate of the embedding, which is not used
        left_out["lm_head"] = LORA_ON_TIED_HEAD
    for module, what in left_out.items():
        if _is_of_ffn(f"{module}.weight", spec):
            what = f"its adapter has {what} for {module}, a part of the FFN; this is not supported"
            yield Problem(where=label, what=what, remedy=MERGE_WITH_PEFT)
        elif not ffn_only:
            what = f"its adapter has {what} for {module}; this is not supported where more than the FFN is used"
            remedy = f"{instead}, or {MERGE_WITH_PEFT}"
            yield Problem(where=label, what=what, remedy=remedy)


def adapter_warnings(member: Member, where: str, used: Collection[str] = ()) -> list[str]:
    """Changes of an adapter that are not in the merge. `used` are the names of tensors outside the FFN that are."""
    adapter = member.facts.adapter
    if adapter is None:
        return []
    changed = [*adapter.pairs, *adapter.replaced]
    if not any(_is_of_ffn(name, member.spec) or name in used for name in changed):
        return [
            f"{where}: its adapter {adapter.label} changes no weight of an FFN, and an expert contributes nothing "
            f"else: it is the same as {member.config.source_model.model} without it"
        ]
    unused = [
        *(name.rpartition(".")[0] for name in changed if not _is_of_ffn(name, member.spec) and name not in used),
        *adapter.left_out,
    ]
    if not unused:
        return []
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in unused))
    count = f"{len(unused)} {plural('module', len(unused))}"
    given = "an expert contributes only its FFN" if not used else "they are not in what the backbone is made of"
    return [
        f"{where}: its adapter {adapter.label} also changes {count} outside the FFN "
        f"({short_list(names, 8)}). These changes are not in the merge: {given}"
    ]


def _is_of_ffn(name: str, spec: DenseSpec) -> bool:
    return f".{spec.family.ffn}." in name


def _lora(facts: ModelFacts, name: str) -> LoraPair | None:
    return facts.adapter.pairs.get(name) if facts.adapter else None
