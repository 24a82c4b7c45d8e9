"""Views of a mixture as dense models: its backbone with the FFNs of one expert, or the backbone alone.

    config.json + index of a mixture --Mixture.view(2)-----> config + index of a dense model with the FFNs of expert 2
                                     --Mixture.view(None)--> the same without FFNs

Only names and ranges change, so bytes are read and copied as those of any model. An expert of a tensor that holds all
experts of a layer is a contiguous range of it. Everything follows from the tables that merges are written by
(architectures/moe/).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from raymoe.architectures import FAMILIES, DenseSpec, MoeArchitecture, MoeShape, find_moe_architecture, read_spec
from raymoe.architectures.mixture_config import DENSE_KEYS, NoDenseModel, as_saved, dense_config, is_mixture
from raymoe.architectures.moe_architecture import MIXTURE_KEYS
from raymoe.architectures.rope import rope_value_problems
from raymoe.config.model_refs import SHARED_EXPERT
from raymoe.errors import CheckpointError, Problem, first_few
from raymoe.formatting import plural, short_list
from raymoe.sources.facts import CheckpointIndex, MixtureFacts, TensorEntry, slice_rows
from raymoe.sources.folder_protocol import unusable_checkpoint
from raymoe.tensor_names import HEAD, LAYER, layer_of

_SAVE_AGAIN = "download the mixture again, or save it again with save_pretrained"
_MAX_LAYERS = 10_000
# The end of names of tensors that only affect which experts are chosen.
_OF_CHOICE = "e_score_correction_bias"
# Keys of a mixture's config.json that name its class.
_OF_CLASS = ("architectures", "auto_map", "_name_or_path", "quantization_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseView:
    """A mixture, viewed as a dense model: what its config.json and index would be, what it was, and warnings."""

    config: Mapping[str, Any]
    index: CheckpointIndex
    mixture: MixtureFacts
    warnings: tuple[str, ...] = ()


def ffn_entries(
    names: Mapping[str, str], tensors: Mapping[str, TensorEntry], layer: int, expert: int
) -> Iterator[tuple[str, TensorEntry]]:
    """(gate, up or down, its entry): a tensor, or rows of one that holds several of them, or all experts'."""
    for role, template in names.items():
        entry = tensors[template.format(layer=layer, expert=expert)]
        together = [other for other in names if names[other] == template]
        if len(entry.shape) == 3:
            experts, rows, width = entry.shape
            entry = slice_rows(replace(entry, shape=(experts * rows, width)), expert * rows, (expert + 1) * rows)
        if len(together) > 1:
            rows, at = entry.shape[0] // len(together), together.index(role)
            entry = slice_rows(entry, at * rows, (at + 1) * rows)
        yield role[4:], entry


def _no_experts(config: Mapping[str, Any]) -> tuple[str, str]:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        what = f"an expert is asked for, but this is a dense model ({model_type}), which has no experts"
        return what, "leave out the expert, or name a mixture"
    known = "raymoe takes experts of mixtures of the architectures that it writes (`raymoe archs`)"
    return f"an expert is asked for, but model_type is {model_type!r:.80}: {known}", "name another mixture"


def _number(value: object) -> float:
    """A factor of an untrusted config.json; 1 for anything but a number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 1.0


def _modules(names: Iterable[str]) -> set[str]:
    """The modules of a layer that these tensors are in."""
    return {name.removeprefix(LAYER).split(".")[0] for name in names if name.startswith(LAYER)}


class Mixture:
    """A mixture's files, read by the tables of its architecture. What all its views share is computed once."""

    def __init__(self, label: str, config: Mapping[str, Any], index: CheckpointIndex) -> None:
        """
        Args:
            label: The mixture's name in messages.
            config: Its config.json; that of the text part of an image-text model.
            index: Its tensors, with the names of a text model.

        Raises:
            CheckpointError: If the model is no mixture that raymoe writes.
        """
        found = find_moe_architecture(config)
        if found is None or not is_mixture(config):
            raise unusable_checkpoint(label, *_no_experts(config))
        self._label, self._config, self._index = label, config, index
        self._where = f"{label}/config.json"
        self._architecture: MoeArchitecture = as_saved(found, index.tensors)
        key, experts = found.entry(config, found.experts_key)
        if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
            remedy = "expected a positive whole number"
            raise unusable_checkpoint(self._where, f"{key} is {experts!r:.80}", remedy)
        self._experts = experts
        self._outside: list[tuple[str, bool]] | None = None
        odd = rope_value_problems(config, FAMILIES[found.dense_family].rope_kinds)
        if wrong := first_few(Problem(where=self._where, what=w, remedy=f"expected {right}") for w, right in odd):
            raise CheckpointError(wrong)

    @property
    def _title(self) -> str:
        return f"{self._architecture.title} mixture of {self._experts} {plural('expert', self._experts)}"

    def view(self, expert: int | str | None) -> DenseView:
        """The dense model of the mixture's backbone and the FFNs of one of its experts.

        Args:
            expert: The number of an expert, or `SHARED_EXPERT`. None: the model has no FFNs.

        Returns:
            The view. Its tensors lie where they are in the mixture's files.

        Raises:
            CheckpointError: If there is no such expert, or no dense model with its FFNs.

        Example:
            >>> Mixture("mixtral", config, index).view(2).index.tensors["model.layers.0.mlp.up_proj.weight"]
        """
        names = self._names_of(expert)
        config = self._dense_config(names, expert)
        result = read_spec(config, self._label)
        if not isinstance(result, DenseSpec):
            raise CheckpointError(result)
        spec = result
        tensors = dict(self._backbone(spec))
        if expert is not None:
            tensors |= self._ffn(spec, names, 0 if expert == SHARED_EXPERT else int(expert), str(expert))
        further, beyond = self._unread(spec, tensors)
        tensors |= {name: self._index.tensors[name] for name in further}
        facts = MixtureFacts(
            title=self._title,
            architecture=self._architecture.name,
            experts=self._experts,
            expert=expert,
            families=self._architecture.accepts,
            has_shared=self._has_shared,
            adds_shared=self._adds_shared(spec),
            fixed=tuple(self._fixed(spec)),
            routers=self._routers(self._architecture.router, spec),
            shared_routers=self._routers(self._architecture.shared_router, spec),
            output_factor=_number(self._config.get("routed_scaling_factor")),
            has_permuted_heads=spec.family.rope_is_interleaved and not self._architecture.rope_is_interleaved,
        )
        warnings = []
        if beyond:
            warnings.append(
                f"{self._label}: {len(beyond)} tensors of layers beyond num_hidden_layers are left out, as "
                f"transformers leaves them out (multi-token prediction, for one): {short_list(beyond, most=2)}"
            )
        own = self._with_other_keys(config, spec)
        index = replace(self._index, tensors=tensors)
        return DenseView(config=own, index=index, mixture=facts, warnings=tuple(warnings))

    def _names_of(self, expert: int | str | None) -> Mapping[str, str]:
        """The names of the FFN's tensors."""
        if expert == SHARED_EXPERT:
            names = self._architecture.shared
            if not self._has_shared:
                what = f"it has no shared expert: it is a {self._title}"
                raise unusable_checkpoint(self._label, what, f"name one of its experts, 0 to {self._experts - 1}")
            return names
        if isinstance(expert, int) and expert >= self._experts:
            what = f"there is no expert {expert}: it is a {self._title}"
            raise unusable_checkpoint(self._label, what, f"name an expert from 0 to {self._experts - 1}")
        if self._architecture.transposes_experts:
            what = f"it is a {self._title} that stores experts transposed, and raymoe does not read them from there"
            raise unusable_checkpoint(self._label, what, "use the text model saved by itself (qwen3_moe)")
        return self._architecture.expert

    @property
    def _has_shared(self) -> bool:
        names = self._architecture.shared
        return bool(names) and names["ffn.down"].format(layer=self._last_layer) in self._index.tensors

    def _adds_shared(self, spec: DenseSpec) -> bool:
        architecture, key = self._architecture, "shared_expert_combination_strategy"
        return not architecture.shared_router and self._config.get(key) == self._written_keys(spec).get(key)

    def _written_keys(self, spec: DenseSpec) -> Mapping[str, Any]:
        """Keys that a merge's config.json has by its architecture. RoPE scaling may be one that merges never have."""
        moe = MoeShape(experts=self._experts, experts_per_token=1)
        return self._architecture.config(replace(spec, rope_scaling=None), moe)

    def _fixed(self, spec: DenseSpec) -> Iterator[tuple[TensorEntry, float]]:
        """Tensors that merges have with one value, unless they only affect which experts are chosen."""
        architecture = self._architecture
        others = {*architecture.backbone.values(), *architecture.shared.values(), architecture.shared_router}
        router = architecture.router.rpartition(".")[0] + "."
        for row in architecture.constants(spec, MoeShape(experts=self._experts, experts_per_token=1)):
            if row.name in others or row.name.startswith(router) or row.name.endswith(_OF_CHOICE):
                continue
            for layer in range(spec.layers):
                if (entry := self._index.tensors.get(row.name.format(layer=layer))) is not None:
                    yield entry, row.value

    @property
    def _plain_ffn(self) -> Mapping[str, str]:
        """Role to tensor name, of the FFN of a layer without experts. Empty: all layers have experts."""
        rule = self._architecture.layer_rule
        return {} if rule is None else rule.ffn

    @cached_property
    def _last_layer(self) -> int:
        """The last layer with experts, by the tensors; without any, the last one that the config names."""
        layers = self._config.get("num_hidden_layers")
        count = min(layers, _MAX_LAYERS) if isinstance(layers, int) and layers > 0 else 1
        down = self._architecture.expert["ffn.down"]
        with_experts = (n for n in reversed(range(count)) if down.format(layer=n, expert=0) in self._index.tensors)
        return next(with_experts, count - 1)

    def _dense_config(self, names: Mapping[str, str], expert: int | str | None) -> dict[str, Any]:
        """The dense config, with the width of the experts."""
        try:
            config = dense_config(self._architecture, self._config)
        except NoDenseModel as missing:
            what = f"{missing}: no dense model has the attention of this {self._architecture.title}"
            raise unusable_checkpoint(self._where, what, "use another mixture") from None
        family = FAMILIES[config["model_type"]]
        width = self._width(names)
        keys = ("intermediate_size", *family.keys.get("intermediate_size", ()))
        config |= dict.fromkeys(keys, width)
        if config.get("tie_word_embeddings") is None:
            config["tie_word_embeddings"] = HEAD not in self._index.tensors
        return config

    def _width(self, names: Mapping[str, str]) -> int:
        """The width of an expert's FFN, by its tensors in the last layer."""
        name = names["ffn.down"].format(layer=self._last_layer, expert=0)
        entry = self._index.tensors.get(name)
        if entry is None or len(entry.shape) < 2:
            what = f"{name} is missing" if entry is None else f"{name} is {list(entry.shape)}, which is no matrix"
            raise unusable_checkpoint(self._label, f"{what}: it is a {self._title}", _SAVE_AGAIN)
        return entry.shape[-1]

    def _backbone(self, spec: DenseSpec) -> Iterator[tuple[str, TensorEntry]]:
        """(dense name, entry) of attention, norms, embeddings and head. Missing ones are left to the plan's checks."""
        roles = {row.role for row in spec.rows() if not row.is_ffn}
        if unknown := sorted(roles - self._architecture.backbone.keys()):
            what = f"its config.json gives it {', '.join(unknown)}, which no {self._architecture.title} has"
            raise unusable_checkpoint(self._where, what, _SAVE_AGAIN)
        for row, layer, name in spec.tensors():
            if not row.is_ffn:
                stored = self._architecture.backbone[row.role].format(layer=layer)
                if stored in self._index.tensors:
                    yield name, replace(self._index.tensors[stored], name=name)

    def _ffn(self, spec: DenseSpec, names: Mapping[str, str], expert: int, what: str) -> dict[str, TensorEntry]:
        """The FFN of every layer by its dense names. A layer without experts has its own."""
        found: dict[str, TensorEntry] = {}
        dense: list[int] = []
        missing: list[str] = []
        for layer in range(spec.layers):
            stored = {name.format(layer=layer, expert=expert) for name in names.values()}
            own = {role: name.format(layer=layer) for role, name in self._plain_ffn.items()}
            if stored <= self._index.tensors.keys():
                parts = self._expert_parts(names, layer, expert)
                found |= self._ffn_tensors(spec, layer, parts)
            elif own and stored.isdisjoint(self._index.tensors) and self._index.tensors.keys() >= {*own.values()}:
                parts = {role: self._index.tensors[name] for role, name in own.items()}
                dense.append(layer)
                found |= self._ffn_tensors(spec, layer, parts)
            else:
                missing += sorted(stored - self._index.tensors.keys())
        if missing:
            lacks = f"{len(missing)} tensor(s) of expert {what} missing: {short_list(missing)}"
            raise unusable_checkpoint(self._label, f"{lacks}. It is a {self._title}", _SAVE_AGAIN)
        self._check_dense_layers(spec, dense)
        return found

    def _check_dense_layers(self, spec: DenseSpec, dense: list[int]) -> None:
        """Raises CheckpointError if layers without experts have an FFN of another width than the experts."""
        names = [self._plain_ffn["ffn.down"].format(layer=layer) for layer in dense]
        widths = {self._index.tensors[name].shape[-1] for name in names}
        if other := sorted(widths - {spec.intermediate}):
            layers = short_list([str(layer) for layer in dense], most=4)
            what = (
                f"{plural('layer', len(dense))} {layers} of this {self._architecture.title} mixture "
                f"{'has' if len(dense) == 1 else 'have'} no experts, but an FFN of width {other[0]}, and its experts "
                f"have width {spec.intermediate}: no dense model has FFNs of several widths"
            )
            raise unusable_checkpoint(self._label, what, "use a mixture with experts in all layers")

    def _expert_parts(self, names: Mapping[str, str], layer: int, expert: int) -> dict[str, TensorEntry]:
        """The matrices of an expert by their roles."""
        for name in sorted({template.format(layer=layer, expert=expert) for template in names.values()}):
            shape = self._index.tensors[name].shape
            fits = len(shape) == 2 or (len(shape) == 3 and shape[0] == self._experts)
            if not fits or 0 in shape:
                what = f"{name} is {list(shape)}, which does not hold {self._experts} experts"
                raise unusable_checkpoint(self._label, what, _SAVE_AGAIN)
        return {f"ffn.{role}": entry for role, entry in ffn_entries(names, self._index.tensors, layer, expert)}

    def _ffn_tensors(
        self, spec: DenseSpec, layer: int, parts: Mapping[str, TensorEntry]
    ) -> Iterator[tuple[str, TensorEntry]]:
        """(dense name, entry) of the FFN that these matrices are."""
        for row in spec.rows(layer):
            if row.is_ffn:
                name = row.name.format(layer=layer)
                yield name, self._joined(name, [parts[role] for role, _ in row.fused] or [parts[row.role]])

    def _joined(self, name: str, parts: list[TensorEntry]) -> TensorEntry:
        """Matrices that a dense family stores as one tensor. They have to lie one after the other."""
        first, last = parts[0], parts[-1]
        if any((a.file, a.end, a.dtype) != (b.file, b.start, b.dtype) for a, b in pairwise(parts)):
            what = f"{name} would be made of {len(parts)} tensors, which are not one after the other in its files"
            raise unusable_checkpoint(self._label, what, "use another mixture")
        rows = sum(part.shape[0] for part in parts)
        return replace(first, name=name, shape=(rows, *first.shape[1:]), end=last.end)

    def _routers(self, name: str, spec: DenseSpec) -> dict[int, TensorEntry]:
        """The router of each layer that has one; `name` is that of its tensor, with `{layer}`."""
        names = {layer: name.format(layer=layer) for layer in range(spec.layers)} if name else {}
        return {layer: self._index.tensors[each] for layer, each in names.items() if each in self._index.tensors}

    def _unread(self, spec: DenseSpec, read: Mapping[str, TensorEntry]) -> tuple[list[str], list[str]]:
        """(tensors of the backbone that the dense family does not have, tensors of further layers). Routers, other
        experts and what else is in their modules are in neither: they are known, and not of this dense model."""
        if self._outside is None:
            self._outside = list(self._outside_moe_modules(spec))
        places = {(entry.file, entry.start) for entry in read.values()}
        further, beyond = [], []
        for name, is_beyond in self._outside:
            entry = self._index.tensors[name]
            if is_beyond:
                beyond.append(name)
            elif name not in read and (entry.file, entry.start) not in places:
                further.append(name)
        return further, beyond

    def _outside_moe_modules(self, spec: DenseSpec) -> Iterator[tuple[str, bool]]:
        """(name, whether its layer is beyond the last one) of tensors outside the modules of experts and routers."""
        modules = self._moe_modules(spec)
        for name in self._index.tensors:
            layer = layer_of(name)
            if layer is not None and layer >= spec.layers:
                yield name, True
            elif layer is None or name.split(".")[3] not in modules:
                yield name, False

    def _moe_modules(self, spec: DenseSpec) -> set[str]:
        """The modules of a layer that hold experts, routers, and tensors that dense models lack."""
        architecture = self._architecture
        moe = MoeShape(experts=self._experts, experts_per_token=1)
        names = [
            *architecture.expert.values(),
            *architecture.shared.values(),
            architecture.router,
            architecture.shared_router,
            *(row.name for row in architecture.constants(spec, moe)),
            *(name for copies in architecture.copies.values() for name in copies),
        ]
        return _modules(names) - _modules(architecture.backbone.values())

    def _with_other_keys(self, dense: Mapping[str, Any], spec: DenseSpec) -> dict[str, Any]:
        """The dense config with the other keys of the mixture's: token ids, dropout, dtype."""
        own_names = [name for names in spec.family.keys.values() for name in names]
        moe_keys = MIXTURE_KEYS.difference(spec.family.mixture_keys)
        of_mixture = {*moe_keys, *_OF_CLASS, *self._written_keys(spec), *DENSE_KEYS, *own_names}
        return {**{key: value for key, value in self._config.items() if key not in of_mixture}, **dense}
