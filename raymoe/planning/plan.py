"""A merge as data: which bytes are written where, and from which sources. No tensors or handles; nothing can fail
later.

    MergePlan
      .shards      Shard: one output file, its header final, its parts back to back
        .parts     Part: one output tensor, or one expert's share of it; bytes [start, end) of the shard
          .what    Copy | Transform | Combine | Columns | Transposed | Router | Constant: where those bytes come from
      .gates       GatePlan: which prompts are read by which model to make the router rows
      .moments     MomentPlan: the same for a backbone that is merged by what prompts give; None for others
      .side_files  small files taken over from the base byte for byte

Everything but the router's values is known here, from configs and file headers, before any weight is read.
Sizes are bytes, intervals half-open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES
from raymoe.architectures.wrappers import has_encoder, text_part
from raymoe.formatting import human_bytes, human_count, plural
from raymoe.gate_modes import MODES
from raymoe.html_repr import html_table
from raymoe.planning.owner import ROUTER, Owner
from raymoe.sources.dtypes import DTYPE_BYTES
from raymoe.sources.facts import LoraPair, SideFile, SourceFile, TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """The options, besides the config, that decide the bytes of the output."""

    max_shard_bytes: int = 5_000_000_000
    seed: int = 0
    allow_crimes: bool = False
    copy_tokenizer: bool = True
    model_card: bool = True
    quantize_gates: str | None = None  # None, "8bit" or "4bit": how the gate pass loads its weights
    strict: bool = False  # NaN and infinity are rejected; the bytes are the same, but every number is checked

    @classmethod
    def from_record(cls, recorded: Mapping[str, Any]) -> MergeOptions:
        """The options in a record, which keeps the spelling of its keys. Raises TypeError for invalid ones."""
        renamed = {"quantise_gates": "quantize_gates"}
        return cls(**{renamed.get(key, key): value for key, value in dict(**recorded).items()})

    def to_record(self) -> dict[str, Any]:
        """The options as records have them."""
        renamed = {"quantize_gates": "quantise_gates"}
        return {renamed.get(key, key): value for key, value in asdict(self).items()}

    def __post_init__(self) -> None:
        """Raises TypeError for wrong types: a record from an untrusted source may hold anything."""
        for name, kind in (("max_shard_bytes", int), ("seed", int), ("quantize_gates", (str, type(None)))):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r:.80}")
        for name in ("allow_crimes", "copy_tokenizer", "model_card", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r:.80}, not true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The bytes of `source`, unchanged."""

    source: TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPermutation:
    """Permutes the rows of q or k within each head of `head_dim`: RoPE rotates the first `rotary_dim` of them.

    An interleaved RoPE rotates neighbours (0 with 1, 2 with 3, ...). With permuted rows, a half-split RoPE, which
    rotates the first half with the second, computes the same: products of q and k do not depend on the order.
    `inverse`: the other way, from half-split heads to interleaved ones; None: no.
    """

    head_dim: int
    rotary_dim: int
    inverse: bool | None = None

    @property
    def order(self) -> list[int]:
        """For each row of a head of the result, its index in the head that is read."""
        return self.to_interleaved if self.inverse else self.to_half_split

    @property
    def to_half_split(self) -> list[int]:
        """For each row of a half-split head, its index in the interleaved head."""
        return [*range(0, self.rotary_dim, 2), *range(1, self.rotary_dim, 2), *range(self.rotary_dim, self.head_dim)]

    @property
    def to_interleaved(self) -> list[int]:
        """For each row of an interleaved head, its index in the half-split head."""
        return sorted(range(self.head_dim), key=self.to_half_split.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reinit:
    """Channels of an expert's FFN that are drawn anew: rows of its gate and up matrices, columns of its down matrix.

    Attributes:
        share: The share of channels, rounded down to whole ones.
        channels: The name from which, with the seed, the channels are drawn: the same for the matrices of an expert.
        of_columns: The channels are columns.
    """

    share: float
    channels: str
    of_columns: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """The tensor of `source`, plus its LoRA delta, of it the `columns` from the first to before the last, with channels
    drawn anew, plus noise, times `scale`, with rows permuted by `heads`, cast to the part's dtype, in this order.

    Computed in float32. `noise_scale` is the standard deviation of Gaussian noise drawn from (seed, output name).
    """

    source: TensorEntry
    lora: LoraPair | None = None
    noise_scale: float | None = None
    scale: float | None = None
    seed: int = 0
    heads: HeadPermutation | None = None
    columns: tuple[int, int] | None = None
    reinit: Reinit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixMoments:
    """The inputs of a matrix of attention, whose second moments are measured for `regmean`.

    Attributes:
        layer: The layer.
        module: The module of the layer that multiplies by the matrix: `self_attn.q_proj`.
        experts: The experts, in the order of `Combination.experts`, whose prompts give the inputs.
        alpha: The factor on off-diagonal second moments.
    """

    layer: int
    module: str
    experts: tuple[Owner, ...]
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One tensor of the backbone, made of the same tensor of the base and of several experts.

    Computed in float32 and rounded to `dtype`, in the layout that the base stores (`storage.combine` has the formulas).

    Attributes:
        method: `linear`, `slerp`, `ties` or `regmean`.
        base: The base's tensor. The result has its shape.
        experts: The experts' tensors, in the config's order. One may have more or fewer rows than the base's: then it
            counts for the rows that both have.
        weights: One per expert, above 0.
        scale: A factor on the difference to the base.
        density: `ties`: the share of each expert's differences that counts: the largest ones.
        dtype: The output's dtype.
        together: This many rows are computed together, since heads are permuted as a whole.
        moments: `regmean`: which inputs the matrix is merged by. The result is computed once, before shards are
            written (`routers.regmean`).
    """

    method: str
    base: WeightRef
    experts: tuple[WeightRef, ...]
    weights: tuple[float, ...]
    scale: float
    density: float
    dtype: str
    together: int = 1
    moments: MatrixMoments | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.entry.shape

    @property
    def entries(self) -> Iterator[TensorEntry]:
        """All tensors that are read for it."""
        for ref in (self.base, *self.experts):
            yield from ref.entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """The rows of `combination` from `first_row` on, as many as the part has, in the order of `heads`."""

    combination: Combination
    first_row: int = 0
    heads: HeadPermutation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Rows of the router of `layer`: one per expert, or with `shared` the one row of the shared experts' gate. They are
    multiplied by `factor`; None: by 1. Each row is there `repeat` times, one after the other; None: once."""

    layer: int
    shared: bool = False
    factor: float | None = None
    repeat: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A tensor with the same value everywhere."""

    value: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Matrices side by side: each row is that of the first, then that of the second, and so on.

    Each is a part of its own, copied or transformed, at bytes [0, its size); they agree in dtype and number of rows.
    """

    matrices: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed:
    """Matrices one below the other, transposed: the columns of the first, then those of the second, and so on, lie side
    by side in each row.

    Each is a part of its own, as in `Columns`; they agree in dtype and number of columns.
    """

    matrices: tuple[Part, ...]


PartSource = Copy | Transform | Combine | Columns | Transposed | Router | Constant


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTensor:
    """A tensor of the file that consists of several parts, one after another."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One output tensor at bytes [start, end) of its shard file, or a block of the rows of `whole`.

    Some MoE architectures have one tensor for all experts of a layer. Each of its parts has one source.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    what: PartSource
    whole: WholeTensor | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def sources_read(self) -> tuple[Copy | Transform, ...]:
        """The sources that are read for it, except for combinations, which read their tensors several times."""
        if isinstance(self.what, (Columns, Transposed)):
            return tuple(source for matrix in self.what.matrices for source in matrix.sources_read)
        return (self.what,) if isinstance(self.what, (Copy, Transform)) else ()

    @property
    def files_read(self) -> Iterator[SourceFile]:
        """The files that are read for it, including files of adapters."""
        if isinstance(self.what, Combine):
            yield from (entry.file for entry in self.what.combination.entries)
        for read in self.sources_read:
            yield read.source.file
            if isinstance(read, Transform) and read.lora is not None:
                yield from (entry.file for entry in read.lora.entries.values())

    @property
    def tensor(self) -> WholeTensor:
        """The tensor in the file's header that these bytes belong to, with its shape there."""
        return self.whole or WholeTensor(name=self.name, shape=self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One output file. All its bytes come from the models that `owner` names. If the config merges the backbone, the
    base's shards hold the tensors that are made of the base's and the experts'."""

    file_name: str
    owner: Owner
    header: bytes
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return self.parts[-1].end


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRef:
    """A tensor to load for computing: where it is stored, and its LoRA delta.

    With `combined`, the tensor is the result of that combination; `entry` is the base's tensor, which has the same
    shape.
    """

    entry: TensorEntry
    lora: LoraPair | None = None
    combined: Combination | None = None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensors that are read for it."""
        if self.combined is not None:
            return tuple(self.combined.entries)
        return (self.entry, *(self.lora.entries.values() if self.lora is not None else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePrompts:
    """The prompts of one expert and the model that reads them.

    `weights` maps parameter names (`model.layers.0.mlp.up_proj.weight`) to the tensors to load: the base's, the
    expert's, or grafted ones (the base with this expert's FFN). Empty if no model reads the prompts. With
    `chat_template` each prompt is read as a user's turn in the base's template.
    """

    owner: Owner
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    config: Mapping[str, Any]
    weights: Mapping[str, WeightRef]
    chat_template: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentPlan:
    """The prompts that are read before the backbone is merged by `regmean`: each expert's, by the expert's own model.

    Attributes:
        layers: The number of layers that prompts pass.
        hidden: The width of the states between layers.
        experts: The prompts and the model of each expert that has a part in the matrices.
        tokenizer_files: The base's tokenizer.
        matrices: The matrices to merge, by layer. The shards name them too.
    """

    layers: int
    hidden: int
    experts: tuple[GatePrompts, ...]
    tokenizer_files: tuple[SideFile, ...]
    matrices: tuple[tuple[Combination, ...], ...] = field(compare=False)

    needs_prompts: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    runs_model: ClassVar[bool] = True

    @property
    def members(self) -> tuple[GatePrompts, ...]:
        """The experts, as `GatePlan.members`."""
        return self.experts

    @property
    def prompted(self) -> tuple[GatePrompts, ...]:
        """The experts: all of them have prompts."""
        return self.experts

    @property
    def tensors(self) -> Iterator[Combination]:
        """All matrices to merge."""
        for of_layer in self.matrices:
            yield from of_layer

    @property
    def nbytes(self) -> int:
        """Bytes of all merged matrices."""
        return sum(math.prod(each.shape) * DTYPE_BYTES[each.dtype] for each in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRows:
    """The router rows that an expert of a mixture keeps: for each layer its row there, (1, hidden). Under `ALL_SHARED`,
    the gate of the shared experts."""

    owner: Owner
    layers: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePlan:
    """How the router rows are made: one `GatePrompts` per expert, then one per shared expert with a gate.

    `layers` is the number of layers up to the last one with a router, which prompts pass; `router_layers` are those
    with a router, if not all of them have one (`layers_with_router`).
    `kept`: rows that are taken from a mixture, as they are there; the others are scaled to their mean length
    (`routers.kept_rows`). None: no rows are.
    """

    mode: str
    prompt_model: str
    layers: int
    hidden: int
    experts: tuple[GatePrompts, ...]
    shared: tuple[GatePrompts, ...]
    tokenizer_files: tuple[SideFile, ...]
    vocab: int
    seed: int
    quantize: str | None
    kept: tuple[KeptRows, ...] | None = None
    router_layers: tuple[int, ...] | None = None

    @property
    def layers_with_router(self) -> tuple[int, ...]:
        """The layers whose routers are made, in ascending order."""
        return tuple(range(self.layers)) if self.router_layers is None else self.router_layers

    @property
    def needs_prompts(self) -> bool:
        """Whether rows are computed from prompts."""
        return MODES[self.mode].needs_prompts and not self.keeps_all

    @property
    def needs_text(self) -> bool:
        """Whether positive prompts need tokens other than BOS."""
        return MODES[self.mode].needs_text

    @property
    def runs_model(self) -> bool:
        """Whether a model reads the prompts, layer by layer."""
        return MODES[self.mode].needs_forward_pass and not self.keeps_all

    @property
    def keeps_all(self) -> bool:
        """Whether no row is computed."""
        owners = {kept.owner for kept in self.kept or ()}
        return bool(owners) and all(expert.owner in owners for expert in self.experts)

    @property
    def fitted(self) -> tuple[GatePrompts, ...]:
        """The experts with rows that are computed from prompts: all of them if no rows are kept."""
        return tuple(expert for expert in self.experts if self.kept is None or expert.positive)

    @property
    def members(self) -> tuple[GatePrompts, ...]:
        """Experts, then shared experts."""
        return (*self.experts, *self.shared)

    @property
    def prompted(self) -> tuple[GatePrompts, ...]:
        """The members with prompts to read; none in modes that read no prompts."""
        return tuple(member for member in self.members if member.positive)


PromptPlan = GatePlan | MomentPlan
"""Prompts, and the models that read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that takes part, for records and displays. `folders` are absolute paths or URLs of its own folders."""

    owner: Owner
    label: str
    revision: str | None
    adapter: str | None
    files: tuple[SourceFile, ...]
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedBackbone:
    """The part of an expert's backbone that is not in the merge.

    Attributes:
        owner: The expert or shared expert.
        groups: The groups (attention, norms, embeddings) that are stored elsewhere than the base's.
        differing: The groups that are known to differ from the base's: by shape, by dtype, by an adapter's changes, or
            by samples of local files. Other groups may differ too.
        by_adapter: Whether they differ only by the changes of the expert's adapter.
    """

    owner: Owner
    groups: tuple[str, ...]
    differing: tuple[str, ...] = ()
    by_adapter: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneReport:
    """A description of the merge's backbone, for displays: no bytes depend on it.

    Attributes:
        method: How it is made: `base`, `linear`, `slerp`, `ties` or `regmean`.
        experts: The number of experts that count.
        include: The groups that are merged.
        combined: The number of tensors that are computed from several models.
        kept: The number of tensors of these groups that are the same in all models, or the base's.
        notes: Which tensors of which expert could not be merged, one line each.
        unused: The parts that are not in the merge, by expert.
    """

    method: str
    experts: int = 0
    include: tuple[str, ...] = ()
    combined: int = 0
    kept: int = 0
    notes: tuple[str, ...] = ()
    unused: tuple[UnusedBackbone, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the plan. Parameters are counted in the output's own tensors; `active` for one token. `gate_bytes` and
    `backbone_bytes` of weights are read for the prompts of the gates and of the backbone."""

    parameters: int
    active_parameters: int
    output_bytes: int
    bytes_by_owner: Mapping[Owner, int]
    bytes_by_kind: Mapping[str, int]
    gate_bytes: int
    peak_gate_bytes: int
    backbone_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Everything an executor needs. `digest` names the weights, config and side files: equal digests, equal bytes.

    `granularity` is the number of experts that each FFN is cut into. `features` are those on which engines differ
    (`raymoe.engines.FEATURES`). `engine_warnings` name the engines that load the merge and compute something else, one
    sentence each.
    """

    architecture: str
    config: Mapping[str, Any]
    dtype: str
    shards: tuple[Shard, ...]
    side_files: tuple[SideFile, ...]
    gates: GatePlan
    sources: tuple[Source, ...]
    totals: Totals
    options: MergeOptions
    warnings: tuple[str, ...]
    backbone: BackboneReport
    digest: str
    moments: MomentPlan | None = None
    granularity: int = 1
    features: tuple[str, ...] = ()
    engine_warnings: tuple[str, ...] = ()

    @property
    def runs_model(self) -> bool:
        """Whether a model reads prompts, for routers or for the backbone."""
        return self.gates.runs_model or self.moments is not None

    @property
    def prompt_plans(self) -> tuple[PromptPlan, ...]:
        """The prompts of the backbone, if it needs any, then those of the gates."""
        return (self.gates,) if self.moments is None else (self.moments, self.gates)

    def __repr__(self) -> str:
        return f"MergePlan({self.architecture}, {', '.join(text for _, text in self._facts)})"

    def _repr_html_(self) -> str:
        sources = [(str(source.owner), source.label) for source in self.sources]
        warnings = [("warning", warning) for warning in (*self.warnings, *self.engine_warnings)]
        return html_table(f"Plan of a {self.architecture} merge", [*self._facts, *warnings, *sources])

    @property
    def _facts(self) -> tuple[tuple[str, str], ...]:
        """The summary that a notebook shows: a plan itself lists every tensor."""
        totals, experts, shards = self.totals, self.experts, len(self.shards)
        active = human_count(totals.active_parameters)
        return (
            ("experts", f"{experts} {plural('expert', experts)}"),
            ("parameters", f"{human_count(totals.parameters)} {self.dtype} parameters, {active} active for a token"),
            ("output", f"{human_bytes(totals.output_bytes)} in {shards} {plural('shard', shards)}"),
            ("gates", f"gate mode {self.gates.mode}"),
            ("digest", f"digest {self.digest[:12]}"),
        )

    @property
    def title(self) -> str:
        """The title of what is written: of a MoE architecture, or of the dense family of an extracted expert."""
        found = MOE_ARCHITECTURES.get(self.architecture)
        return found.title if found is not None and self.gates.experts else FAMILIES[self.architecture].title

    @property
    def experts(self) -> int:
        """How many experts a layer has."""
        return len(self.gates.experts) * self.granularity

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the mixture itself: `config`, or the part of it that is not of the images that it reads."""
        return text_part(self.config)

    @property
    def reads_images(self) -> bool:
        """Whether the output has the encoder of an image-text base."""
        return has_encoder(self.config)

    @property
    def worker_shards(self) -> tuple[Shard, ...]:
        """The shards that actors write: all but those of the router."""
        return tuple(shard for shard in self.shards if shard.owner != ROUTER)

    @property
    def router_shards(self) -> tuple[Shard, ...]:
        """The shards that the driver writes, since it has the router's values."""
        return tuple(shard for shard in self.shards if shard.owner == ROUTER)

    @property
    def index(self) -> dict[str, Any]:
        """Content of model.safetensors.index.json."""
        weight_map = {part.tensor.name: shard.file_name for shard in self.shards for part in shard.parts}
        total = sum(part.nbytes for shard in self.shards for part in shard.parts)
        metadata = {"total_size": total, "total_parameters": self.totals.parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
