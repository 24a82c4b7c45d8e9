"""The mixture that is edited: where it is, what it holds, and its record if raymoe wrote it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymoe.architectures import DenseSpec, MoeArchitecture, MoeShape, find_moe_architecture
from raymoe.architectures.mixture_config import as_saved, is_mixture
from raymoe.architectures.moe_architecture import PER_TOKEN_KEY
from raymoe.checkpoints.merge_record import MergeRecord, read_record, with_own_storage
from raymoe.checkpoints.open_checkpoint import open_checkpoint
from raymoe.config import MergeConfig
from raymoe.config.model_refs import ModelRef, PathRef, parse_model_ref
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import short_list
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.planning.owner import Owner
from raymoe.sources.facts import ModelFacts, TensorEntry
from raymoe.sources.folder_protocol import Folder
from raymoe.sources.hub import HubOptions, is_hub_id, open_hub_folder
from raymoe.sources.resolve import resolve_model
from raymoe.storage.file_names import RECORD_NAME
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import load_array

# Keys of a mixture's config.json that are about training, or that count the experts.
_FREE_KEYS = frozenset({"router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "router_z_loss_coef"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedMixture:
    """A finished mixture.

    Attributes:
        ref: How a config names it; a Hub repository at the commit that was opened.
        facts: Its files, with its own config and tensors.
        architecture: Its architecture, with the tensor names that it has.
        experts: How many experts it has.
        per_token: How many of them work on a token.
        record: Its record; None if it has none.
        config: The record's config, with the user's own settings of object stores; None without a record.
    """

    ref: PathRef
    facts: ModelFacts
    architecture: MoeArchitecture
    experts: int
    per_token: int
    record: MergeRecord | None
    config: MergeConfig | None

    def expert(self, number: int | str) -> ModelRef:
        """One of its experts as a source of a merge."""
        return ModelRef(model=self.ref, expert=number)

    def models(self) -> dict[Owner, str]:
        """The models of its experts that its record names."""
        if self.record is None:
            return {}
        return {source.owner: source.model for source in self.record.sources if source.owner is not None}


def open_mixture(old: str, hub: HubOptions, storage: StorageOptions, *, trust_record: bool = False) -> OpenedMixture:
    """Open a mixture that a user names: a folder, a URL, or a Hub id.

    Raises ProblemReport if it is no finished mixture of an architecture that raymoe writes.
    """
    ref = _parse(old)
    folder = _open_folder(ref, hub, storage)
    record = read_record(folder) if folder is not None and folder.find(RECORD_NAME) is not None else None
    facts = resolve_model(ModelRef(model=ref), hub, storage)
    if not is_mixture(facts.config):
        what = f"model_type is {facts.config.get('model_type')!r:.80}, which is not a mixture that raymoe writes"
        remedy = "name a mixture, or make one with raymoe merge"
        raise ProblemReport([Problem(where=facts.label, what=what, remedy=remedy)])
    found = find_moe_architecture(facts.config)
    assert found is not None  # it is a mixture
    experts, per_token = (found.entry(facts.config, key)[1] for key in (found.experts_key, PER_TOKEN_KEY))
    if not _is_count(experts) or not _is_count(per_token):
        what = f"its config.json gives it {experts!r:.40} experts, {per_token!r:.40} for a token"
        raise ProblemReport([Problem(where=facts.label, what=what, remedy="save it again with its own config")])
    config = None
    if record is not None:
        config = with_own_storage(record.config, storage, facts.label, trusts_record=trust_record)
        if config.granularity > 1:
            what = (
                f"each of its models was cut into {config.granularity} experts (granularity), which only a merge does"
            )
            raise ProblemReport([Problem(where=facts.label, what=what, remedy="merge the new list of experts instead")])
        if len(config.experts) != experts:
            what = f"it has {experts} experts, but its record (raymoe.json) names {len(config.experts)}"
            raise ProblemReport([Problem(where=facts.label, what=what, remedy="name a merge as raymoe wrote it")])
    return OpenedMixture(
        ref=replace(ref, revision=facts.revision) if facts.revision else ref,
        facts=facts,
        architecture=as_saved(found, facts.index.tensors),
        experts=experts,
        per_token=per_token,
        record=record,
        config=config,
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _parse(old: str) -> PathRef:
    try:
        ref = parse_model_ref(old)
    except ValueError as error:
        raise ProblemReport([Problem(where="OLD", what=str(error))]) from None
    if ref.adapter is not None or ref.expert is not None:
        what = f"{old}: it names more than a mixture"
        raise ProblemReport([Problem(where="OLD", what=what, remedy="name the mixture itself")])
    return ref.model


def _open_folder(ref: PathRef, hub: HubOptions, storage: StorageOptions) -> Folder | None:
    """The mixture's files; None if `resolve_model` is to say what is wrong. Raises ProblemReport if a merge is not
    finished."""
    if (location := ref.location) is not None:
        return open_checkpoint(location.text, storage)
    if os.path.isdir(os.path.expanduser(ref.path)):
        return open_checkpoint(Location.parse(os.path.expanduser(ref.path)).text, storage)
    try:
        return open_hub_folder(ref, hub) if is_hub_id(ref.path) else None
    except ProblemReport:
        return None


def has_shared_expert(mixture: OpenedMixture, reader: SourceReader) -> bool:
    """Whether it has a shared expert that computes something: some architectures need one, which may be of zeros."""
    name = mixture.architecture.shared.get("ffn.down", "")
    entry = mixture.facts.index.tensors.get(name.format(layer=0))
    return entry is not None and not _is_filled_with(entry, 0.0, reader)


def unknown_settings(
    mixture: OpenedMixture, spec: DenseSpec, output: Mapping[str, Any], reader: SourceReader
) -> Iterator[Problem]:
    """What a mixture of another program has, and a merge of raymoe has otherwise: keys of routing, trained biases.

    `spec` is the dense model with the FFNs of one of its experts, `output` the config.json of the edited mixture's text
    model.
    """
    shared = int(has_shared_expert(mixture, reader))
    moe = MoeShape(experts=mixture.experts, experts_per_token=mixture.per_token, shared=shared)
    own = mixture.architecture.config(spec, moe)
    counted = {mixture.architecture.experts_key, mixture.architecture.aliases.get(mixture.architecture.experts_key)}
    differing = [
        f"{key}: {mixture.facts.config[key]!r:.60} (it would be {output.get(key)!r:.60})"
        for key in sorted(own.keys() & mixture.facts.config.keys() - _FREE_KEYS - counted)
        if mixture.facts.config[key] != output.get(key)
    ]
    remedy = "merge its experts with a config of your own, and compare the results"
    if differing:
        what = f"its config.json has other settings than a merge: {short_list(differing, most=3)}"
        yield Problem(where=mixture.facts.label, what=what, remedy=remedy)
    for row in mixture.architecture.constants(spec, moe):
        names = dict.fromkeys(row.name.format(layer=layer) for layer in range(spec.layers))
        entries = [mixture.facts.index.tensors[name] for name in names if name in mixture.facts.index.tensors]
        trained = [entry.name for entry in entries if not _is_filled_with(entry, row.value, reader)]
        if trained:
            what = f"it has trained values in {short_list(trained, most=2)}, which a merge fills with {row.value:g}"
            yield Problem(where=mixture.facts.label, what=what, remedy=remedy)


def _is_filled_with(entry: TensorEntry, value: float, reader: SourceReader) -> bool:
    return bool(np.all(load_array(reader, entry).astype(np.float32) == value))
