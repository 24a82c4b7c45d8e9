"""Plans the backbone of a merge: the base's attention, norms and embeddings, or a combination with the experts'.

A tensor of the backbone comes from the base, from one model (if all others that count have the same), or from a
`Combination`. It is described by the base's layout and name for it. So fused tensors, permuted heads and renamed
tensors work as they do for the base (`tensor_sources.base_tensors`), and prompts are read with the same tensors.

`regmean` merges the matrices of attention by the inputs that they have in the experts' own models, and all else by the
mean. `plan_moments` says which prompts those models have to read for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from raymoe.architectures import DenseSpec, MoeArchitecture
from raymoe.architectures.dense_family import TensorRow
from raymoe.config import BackboneConfig, MergeConfig
from raymoe.config.backbone import DEFAULT_ALPHA, GROUPS
from raymoe.config.prompt_sources import expand_prompts
from raymoe.formatting import short_list
from raymoe.planning.owner import CONFIG_KEYS, Owner
from raymoe.planning.plan import (
    BackboneReport,
    Combination,
    GatePrompts,
    MatrixMoments,
    MomentPlan,
    UnusedBackbone,
    WeightRef,
)
from raymoe.planning.tensor_sources import ROTARY_ROLES, Member, head_permutation, weight_ref, weight_refs
from raymoe.sources.dtypes import FLOAT_DTYPES
from raymoe.sources.facts import ModelFacts, SideFile, TensorEntry
from raymoe.tensor_names import EMBEDDING, HEAD, LAYER_INPUTS, layer_of

_EMBEDDING_ROLES = ("embed", "embed_per_layer", "lm_head")
_NAMED = 3  # tensors per note


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """The backbone of a merge.

    Attributes:
        refs: The tensors that differ from the base's, by their names there.
        used: The names of each expert's tensors that are part of it.
        report: A description for displays.
    """

    refs: Mapping[str, WeightRef]
    used: Mapping[Owner, Collection[str]]
    report: BackboneReport

    def used_of(self, owner: Owner) -> Collection[str]:
        return self.used.get(owner, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contribution:
    """An expert's tensor that can be combined with the base's. `name` is its name in the expert."""

    owner: Owner
    name: str
    ref: WeightRef
    weight: float


def group_of(row: TensorRow) -> str:
    """The group of a tensor: attention (or the layer's substitute, with its own norms), norms, or embeddings and
    head."""
    if row.role in _EMBEDDING_ROLES:
        return "embeddings"
    return "norms" if row.role.startswith("norm.") else "attention"


def plan_backbone(
    config: BackboneConfig,
    facts: ModelFacts,
    spec: DenseSpec,
    members: Sequence[Member],
    architecture: MoeArchitecture,
    dtype: str,
    differing: Mapping[str, Collection[str]],
) -> Backbone:
    """Decide how each tensor of the backbone is made.

    Args:
        config: The config's `backbone`.
        facts: The base.
        spec: The base's sizes.
        members: Experts and shared experts. Only experts count.
        architecture: The MoE architecture: it says whether heads are permuted.
        dtype: The output's dtype.
        differing: For each model's label, its tensors that are known to differ from the base's, as samples show.

    Returns:
        The tensors that differ from the base's, and notes for the user.
    """
    planner = _BackbonePlanner(config, facts, spec, members, architecture, dtype)
    refs = planner.plan_refs() if config.is_merged else {}
    report = BackboneReport(
        method=config.method,
        experts=len(planner.experts()) if config.is_merged else 0,
        include=config.include if config.is_merged else (),
        combined=sum(ref.combined is not None for ref in refs.values()),
        kept=planner.kept,
        notes=tuple(planner.notes()),
        unused=tuple(_find_unused(facts, spec, members, planner.used, differing)),
    )
    return Backbone(refs=refs, used=planner.used, report=report)


@dataclass(slots=True)
class _BackbonePlanner:
    """Visits the base's tensors once, which fills the last fields."""

    config: BackboneConfig
    facts: ModelFacts
    spec: DenseSpec
    members: Sequence[Member]
    architecture: MoeArchitecture
    dtype: str
    used: dict[Owner, set[str]] = field(default_factory=dict)
    kept: int = 0
    _remarks: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (place in the config, remark) -> tensors

    def plan_refs(self) -> dict[str, WeightRef]:
        found = {}
        for row, layer, name in self.spec.tensors():
            if row.is_ffn or group_of(row) not in self.config.include:
                continue
            base = weight_ref(self.facts, name)
            contributions = list(self._contributions(row, name, base.entry))
            ref = self._combine(row, layer, base, contributions)
            if ref == base:
                self.kept += 1
                continue
            found[name] = ref
            for each in contributions:
                self.used.setdefault(each.owner, set()).add(each.name)
        return found

    def experts(self) -> list[tuple[Member, float]]:
        """The experts that count, with their weights."""
        experts = [member for member in self.members if not member.is_shared]
        weights = self.config.weights or (1.0,) * len(experts)
        return [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight > 0]

    def _contributions(self, row: TensorRow, name: str, base: TensorEntry) -> Iterator[_Contribution]:
        for member, weight in self.experts():
            # In a model with tied embeddings, the head is the embedding.
            own_name = EMBEDDING if name == HEAD and member.spec.tied else name
            entry = member.facts.index.tensors.get(own_name)
            if obstacle := combination_obstacle(row, base, entry, member.spec, self.spec):
                result = "the base's is used" if self.config.method == "slerp" else "it has no part in these tensors"
                self._note(member, f"{result}, since {obstacle}", name)
                continue
            ref = weight_ref(member.facts, own_name)
            if ref.entry.shape != base.shape:
                rows = min(ref.entry.shape[0], base.shape[0])
                what = f"only rows 0 to {rows - 1} are merged, since it has {ref.entry.shape[0]} and the base"
                self._note(member, f"{what} {base.shape[0]}; a token has to have one id in both models", name)
            yield _Contribution(owner=member.owner, name=own_name, ref=ref, weight=weight)

    def _combine(
        self, row: TensorRow, layer: int | None, base: WeightRef, contributions: Sequence[_Contribution]
    ) -> WeightRef:
        """One tensor from all contributions; if they are all the same and the method does not change it, that
        tensor."""
        refs, method = tuple(each.ref for each in contributions), self.config.method
        if not refs or set(refs) == {base}:
            return base
        if method == "slerp" and len(refs) < len(self.experts()):
            return base
        if method == "slerp" and len(refs) == 1:
            method = "linear"
        is_one = len(set(refs)) == 1 and refs[0].entry.shape == base.entry.shape
        if is_one and method != "ties" and self.config.scale == 1.0:
            return refs[0]
        moments = None
        if method == "regmean":
            moments = self._moments(row, layer, base.entry.name, contributions)
            method = "linear" if moments is None else method
        heads = head_permutation(self.spec, self.architecture)
        rotates = any(role in ROTARY_ROLES for role, _, _ in self.spec.fused_parts(row))
        combination = Combination(
            method=method,
            base=base,
            experts=refs,
            weights=tuple(each.weight for each in contributions),
            scale=self.config.scale,
            density=self.config.density or 1.0,
            dtype=self.dtype,
            together=heads.head_dim if heads is not None and rotates else 1,
            moments=moments,
        )
        return WeightRef(entry=base.entry, combined=combination)

    def _moments(
        self, row: TensorRow, layer: int | None, name: str, contributions: Sequence[_Contribution]
    ) -> MatrixMoments | None:
        """Which inputs a tensor is merged by; None if the mean is taken: of tensors that are no matrices of attention,
        and of one tensor."""
        entry = contributions[0].ref.entry
        if layer is None or not is_matrix_of_attention(row, entry) or len({each.ref for each in contributions}) == 1:
            return None
        return MatrixMoments(
            layer=layer,
            module=module_of(name, layer),
            experts=tuple(each.owner for each in contributions),
            alpha=DEFAULT_ALPHA if self.config.alpha is None else self.config.alpha,
        )

    def _note(self, member: Member, remark: str, name: str) -> None:
        self._remarks.setdefault((_place(member), remark), []).append(name)

    def notes(self) -> Iterator[str]:
        """What could not be merged, one line per expert and reason."""
        for (place, remark), names in self._remarks.items():
            yield f"{place}: {short_list(names, _NAMED)}: {remark}"
        if self.config.is_merged and any(member.is_shared for member in self.members):
            yield "shared_experts have no part in the backbone"


def is_matrix_of_attention(row: TensorRow, entry: TensorEntry) -> bool:
    """Whether a tensor is a matrix that attention, or what a layer has in its place, multiplies its inputs by. Those of
    inputs per layer are none: they run after the FFN, which the last layer does not run here."""
    return group_of(row) == "attention" and len(entry.shape) == 2 and not row.role.startswith("inputs.")


def module_of(name: str, layer: int) -> str:
    """The module of a layer, by its name there, that has the weight `name`.

    Example:
        >>> module_of("model.layers.3.self_attn.q_proj.weight", 3)
        'self_attn.q_proj'
    """
    return name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")


def plan_moments(
    config: MergeConfig, members: Sequence[Member], backbone: Backbone, tokenizer: Sequence[SideFile]
) -> MomentPlan | None:
    """Plan what is read before matrices can be merged by `regmean`; None if none is.

    Each expert that has a part in a matrix reads its own positive prompts, as a dense model with its own attention.

    Args:
        config: The config, with the prompts of its files.
        members: Experts and shared experts.
        backbone: The planned backbone.
        tokenizer: The base's tokenizer.
    """
    matrices: dict[int, list[Combination]] = {}
    owners: set[Owner] = set()
    for ref in backbone.refs.values():
        if ref.combined is not None and (moments := ref.combined.moments) is not None:
            matrices.setdefault(moments.layer, []).append(ref.combined)
            owners.update(moments.experts)
    if not matrices:
        return None
    layers = max(matrices) + 1

    def prompts(member: Member) -> GatePrompts:
        return GatePrompts(
            owner=member.owner,
            positive=expand_prompts(member.config.positive_prompts),
            negative=(),
            config=member.facts.config,
            weights=_weights_before_ffn(member, layers),
            chat_template=config.uses_chat_template(member.config),
        )

    return MomentPlan(
        layers=layers,
        hidden=next(member.spec.hidden for member in members if member.owner in owners),
        experts=tuple(prompts(member) for member in members if member.owner in owners),
        tokenizer_files=tuple(tokenizer),
        matrices=tuple(tuple(matrices.get(layer, ())) for layer in range(layers)),
    )


def _weights_before_ffn(member: Member, layers: int) -> dict[str, WeightRef]:
    """The parameters that a model needs to run until the FFN of the last of `layers` layers."""
    ffn = f".{member.spec.family.ffn}."

    def is_needed(name: str) -> bool:
        layer = layer_of(name)
        if layer is None:
            return name == EMBEDDING or name in LAYER_INPUTS
        return layer < layers - 1 or (layer == layers - 1 and ffn not in name)

    return {name: ref for name, ref in weight_refs(member.facts, member.spec).items() if is_needed(name)}


def _place(member: Member) -> str:
    return f"{CONFIG_KEYS[member.owner.kind]}[{member.owner.index}]"


def combination_obstacle(
    row: TensorRow,
    base: TensorEntry,
    entry: TensorEntry | None,
    spec: DenseSpec,
    base_spec: DenseSpec,
    other: str = "the base's",
) -> str | None:
    """Why a model's tensor can't be combined with the base's, or with that of `other`; None if it can. Embeddings may
    differ in rows."""
    if spec.model_type != base_spec.model_type:
        return f"it is a {spec.model_type} model"
    if group_of(row) == "attention" and _head_sizes(spec) != _head_sizes(base_spec):
        return f"its attention has other heads or other kinds of layers than {other}"
    if entry is None:
        return "it has no such tensor"
    if entry.dtype not in FLOAT_DTYPES:
        return f"it is of type {entry.dtype}"
    first = 1 if group_of(row) == "embeddings" else 0
    if entry.shape[first:] != base.shape[first:] or not entry.nbytes:
        return f"its shape is {list(entry.shape)}, {other} {list(base.shape)}"
    return None


def _head_sizes(spec: DenseSpec) -> tuple[object, ...]:
    return spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim, spec.kinds


def _find_unused(
    facts: ModelFacts,
    spec: DenseSpec,
    members: Sequence[Member],
    used: Mapping[Owner, Collection[str]],
    differing: Mapping[str, Collection[str]],
) -> Iterator[UnusedBackbone]:
    """The tensors of each expert's backbone that are not in the merge, unless they equal the base's."""
    base = {name: weight_ref(facts, name) for row, _, name in spec.tensors() if not row.is_ffn}
    base_groups = {name: group_of(row) for row, _, name in spec.tensors()}
    tables: dict[int, list[tuple[str, str]]] = {}  # by the object's id: members share their specs
    for member in members:
        adapter, by_adapter = member.facts.adapter, True
        # By group: whether it is known to differ.
        found = {_group_of_module(module, base_groups): True for module in (adapter.left_out if adapter else ())}
        known, names = differing.get(member.facts.label, ()), used.get(member.owner, ())
        if id(member.spec) not in tables:
            tables[id(member.spec)] = [(name, group_of(r)) for r, _, name in member.spec.tensors() if not r.is_ffn]
        for name, group in tables[id(member.spec)]:
            if (found.get(group) and not by_adapter) or name in names or name not in member.facts.index.tensors:
                continue
            own, other = weight_ref(member.facts, name), base.get(name)
            if other is None or not _is_same(own, other):
                is_replaced = adapter is not None and name in adapter.replaced
                by_adapter = by_adapter and (is_replaced or (other is not None and own.entry == other.entry))
                found[group] = found.get(group, False) or name in known or _differs(own, other)
        if found:
            yield UnusedBackbone(
                owner=member.owner,
                groups=tuple(group for group in GROUPS if group in found),
                differing=tuple(group for group in GROUPS if found.get(group)),
                by_adapter=by_adapter,
            )


def _group_of_module(module: str, groups: Mapping[str, str]) -> str:
    """The group of a module that an adapter changes. A head that the base does not have belongs to the embeddings."""
    return groups.get(f"{module}.weight", "embeddings")


def _is_same(one: WeightRef, other: WeightRef) -> bool:
    """Whether both are the same bytes of one file, or of two objects with equal content."""
    a, b = one.entry, other.entry
    of_one_content = a.file == b.file or (a.file.etag is not None and a.file.etag == b.file.etag)
    same = of_one_content and (a.file.size, a.dtype, a.start, a.end) == (b.file.size, b.dtype, b.start, b.end)
    return same and one.lora == other.lora


def _differs(one: WeightRef, other: WeightRef | None) -> bool:
    """Whether headers and adapters show that two weights differ."""
    if other is None or one.entry.shape != other.entry.shape or one.entry.dtype != other.entry.dtype:
        return True
    return one.lora != other.lora and one.entry == other.entry
