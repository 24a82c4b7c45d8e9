"""The facts about a checkpoint that planning needs, from configs and file headers: no tensors and no handles.

    ModelRef (as written in a config) --resolve--> ModelFacts
        .index     CheckpointIndex   tensor name -> file, byte range, dtype, shape
        .adapter   AdapterFacts      the same for a PEFT LoRA, and which tensor each pair of factors changes

All of it is plain data: it is pickled to Ray actors and compared in tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raymoe.object_store.location import LocationKind


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """Tells a local file from a later version of it: modification time (ns) and inode number.

    `view` names the machine and mount namespace in which the stamp was taken. In another view the same path can be a
    copy with another time and inode, so stamps are compared in their own view only. `inode` is 0 on filesystems without
    lasting inode numbers (FUSE).
    """

    mtime_ns: int
    inode: int
    view: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a checkpoint.

    `location` is an absolute local path, `hf://org/name@<commit>/file`, or the URL of an object; `kind` is derived from
    it once. `size` is in bytes. `etag` identifies the content of an object, if its store has such a thing; None
    elsewhere. `content` is the checksum of a small local file (`xxh3-128:hex`), None elsewhere. `stamp` is taken before
    the file is read for the first time. It says nothing about the content, so files with different stamps compare
    equal, and plans with different stamps have the same digest.
    """

    location: str
    size: int
    etag: str | None = None
    content: str | None = None
    stamp: FileStamp | None = field(default=None, compare=False)
    kind: LocationKind = field(init=False, repr=False, compare=False)  # follows from `location`: in no digest

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", LocationKind.of(self.location))

    @property
    def name(self) -> str:
        return self.location.rsplit("/", 1)[-1]

    @property
    def is_pinned(self) -> bool:
        """Whether its ETag or commit, which the plan's digest covers, fixes the content that is read. False for local
        files."""
        return self.etag is not None or self.kind is LocationKind.HUB


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A small file that travels with a model. `name` is relative to the model's folder: `chat_templates/tool.jinja`."""

    name: str
    file: SourceFile


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor is stored: bytes `[start, end)` of `file`, row-major and little-endian.

    `dtype` is the safetensors code (`BF16`, `F16`, `F32`, ...), `start` and `end` are offsets in the file itself
    (the length of a safetensors header included).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def slice_rows(entry: TensorEntry, first: int, last: int) -> TensorEntry:
    """Rows [first, last) of a tensor as a tensor of its own: they are contiguous in its file."""
    width = entry.nbytes // entry.shape[0]
    return replace(
        entry,
        shape=(last - first, *entry.shape[1:]),
        start=entry.start + first * width,
        end=entry.start + last * width,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """All tensors of one checkpoint by name, and the files that hold them."""

    files: tuple[SourceFile, ...]
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The two factors of one weight's delta: W' = W + scaling * (B @ A).

    `a` has shape (rank, in_features), `b` has shape (out_features, rank). With DoRA, `magnitude` (out_features,) gives
    the length of each row of W'. Sources of the formulas: Hu et al. 2021, https://arxiv.org/abs/2106.09685, and Liu et
    al. 2024, https://arxiv.org/abs/2402.09353; scaling is alpha / rank, or alpha / sqrt(rank) for rsLoRA
    (https://arxiv.org/abs/2312.03732).
    """

    a: TensorEntry
    b: TensorEntry
    scaling: float
    magnitude: TensorEntry | None = None

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The tensors to read, by their names here."""
        entries = {"a": self.a, "b": self.b}
        return entries if self.magnitude is None else {**entries, "magnitude": self.magnitude}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """A PEFT LoRA adapter. `pairs` maps the name of the changed tensor in the model to its factors.

    `replaced` are whole tensors that replace the model's, by name. `left_out` are modules that the adapter changes in
    an unsupported way, and a description of the change. This is no problem if a merge does not use these modules.
    `outside` are tensors that change a part of an image-text model other than its text part, and which part.
    """

    label: str
    revision: str | None
    config: Mapping[str, Any]
    index: CheckpointIndex
    pairs: Mapping[str, LoraPair]
    replaced: Mapping[str, TensorEntry] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureFacts:
    """The mixture of experts that a dense model is a view of (`sources.mixture`).

    Attributes:
        title: Its architecture and number of experts, for messages.
        architecture: The name of its MoE architecture.
        experts: How many experts it has.
        expert: The one that gives the FFNs: a number, or `SHARED_EXPERT`. None: the view has no FFNs.
        families: The dense families that the architecture takes experts of.
        routers: The router of each layer that has one, (experts, hidden).
        shared_routers: The gate of the shared experts of each layer, (1, hidden); empty if they have none.
        has_permuted_heads: Rows of q and k are in the order that the RoPE of the architecture has, and not in that of
            the dense family.
        output_factor: What the mixture multiplies the output of its experts by.
        has_shared: Shared experts run for every token, beyond the others.
        adds_shared: The output of shared experts is added to that of the others, without a gate.
        fixed: Tensors beyond router and experts that the dense family lacks, and the value with which each of them has
            no effect.
    """

    title: str
    architecture: str
    experts: int
    expert: int | str | None
    families: tuple[str, ...]
    routers: Mapping[int, TensorEntry] = field(default_factory=dict)
    shared_routers: Mapping[int, TensorEntry] = field(default_factory=dict)
    has_permuted_heads: bool = False
    output_factor: float = 1.0
    has_shared: bool = False
    adds_shared: bool = True
    fixed: tuple[tuple[TensorEntry, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One resolved model.

    `label` is its name in messages and records (a local path, `org/name@<commit>`, a URL), `revision` the Hub commit.
    `config` is its config.json. `side_files` are the small files that belong to a model: tokenizer files (for the base,
    with the code that they name), chat templates, generation_config.json, never weights. `python_files` are all Python
    files at the top of its folder. `folders` are the folders of the model and its adapter (absolute paths or URLs); for
    a Hub model they are in the cache. `own_head`: it holds an lm_head.weight that differs from its embedding, even if
    config.json ties them. `wrapper_config` is the config.json of the image-text checkpoint that the model was taken
    out of (empty for a text model), and `rest` are that checkpoint's other tensors by their names there; `config` and
    `index` are those of the text model. `mixture`: the model is an expert of a mixture, or a mixture's backbone; its
    `config` and `index` are those of a dense model, and its label ends with the expert (`org/name@<commit>#2`).
    """

    label: str
    revision: str | None
    config: Mapping[str, Any]
    index: CheckpointIndex
    side_files: tuple[SideFile, ...] = ()
    python_files: tuple[SideFile, ...] = ()
    adapter: AdapterFacts | None = None
    warnings: tuple[str, ...] = field(default=())
    folders: tuple[str, ...] = ()
    own_head: bool = False
    wrapper_config: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, TensorEntry] = field(default_factory=dict)
    mixture: MixtureFacts | None = None

    @property
    def has_ffn(self) -> bool:
        """Whether it has FFNs: the backbone of a mixture has none."""
        return self.mixture is None or self.mixture.expert is not None
