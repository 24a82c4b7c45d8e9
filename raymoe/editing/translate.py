"""The config of an edited mixture: an ordinary merge, in which experts that stay are experts of the old mixture.

base        the record's, so that NEW is, byte for byte, the merge that would have made it of the sources
            OLD's backbone, if that base can't be read and no prompt passes its FFNs
experts     `source_model: OLD, expert: 2` with the prompts of the record; the original model if prompts are read with
            its FFNs and OLD has other values of them (an adapter, another dtype)
all else    as in the record
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raymoe.architectures import DenseSpec, read_spec
from raymoe.checkpoints.edit_record import Edit, EditedExpert
from raymoe.config import ExpertConfig, MergeConfig, make_config
from raymoe.config.backbone import BASE_BACKBONE
from raymoe.config.model_refs import SHARED_EXPERT, ModelRef, parse_model_ref
from raymoe.editing.backbone_check import backbone_problems
from raymoe.editing.mixture import OpenedMixture, has_shared_expert, open_mixture, unknown_settings
from raymoe.editing.request import EditRequest
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import plural
from raymoe.gate_modes import ALIASES, DEFAULT_MODE, MODES
from raymoe.object_store.options import StorageOptions
from raymoe.planning.owner import Owner
from raymoe.planning.plan import MergeOptions, MergePlan
from raymoe.planning.plan_merge import plan_merge
from raymoe.sources.dtypes import NAME_OF_DTYPE
from raymoe.sources.facts import ModelFacts
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import resolve_model, resolve_models
from raymoe.storage.source_reader import SourceReader

_GIVE_BASE = "give --base-model PATH with the dense model that it was made from"
_GIVE_RIDGE = "--gate-mode ridge, whose prompts are read with the experts' FFNs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """An edit as a merge.

    Attributes:
        mixture: The mixture that is edited.
        config: The config of the result.
        options: The options of the merge: those of the mixture's record.
        edit: What is done, for record and card.
        notes: What a user should know, one line each.
    """

    mixture: OpenedMixture
    config: MergeConfig
    options: MergeOptions
    edit: Edit
    notes: tuple[str, ...] = ()


def translate_edit(
    old: str,
    request: EditRequest,
    hub: HubOptions | None = None,
    storage: StorageOptions | None = None,
    *,
    trust_record: bool = False,
) -> Translation:
    """The config of an edited mixture. Reads the mixture's record and headers, and headers of models in the record.

    Args:
        old: Folder, URL or Hub id of a mixture.
        request: What to change.
        hub, storage: How models are reached.
        trust_record: Use the S3 endpoint and profile in the mixture's record.

    Returns:
        The config, and what was done. `plan_merge` checks the added models.

    Raises:
        ProblemReport: With everything that is wrong with the mixture, the request, or the sources that it needs.

    Example:
        >>> translate_edit("out", make_request(remove=[3])).config.experts[0].source_model.expert
        0
    """
    hub, storage = hub or HubOptions(), storage or StorageOptions()
    mixture = open_mixture(old, hub, storage, trust_record=trust_record)
    if problems := _request_problems(mixture, request):
        raise ProblemReport(problems)
    return _Translator(mixture, request, hub, storage).translation()


def _request_problems(mixture: OpenedMixture, request: EditRequest) -> list[Problem]:
    problems = []
    if request.is_empty:
        what = "nothing is to be changed"
        problems.append(Problem(where="raymoe edit", what=what, remedy="give --add, --remove or --replace"))
    of_option = {"--remove": request.remove, "--replace": request.replace, "--prompts": request.prompts}
    for name, numbers in of_option.items():
        for number in sorted(numbers):
            if number >= mixture.experts or number < 0:
                what = f"there is no expert {number}: {mixture.facts.label} has {mixture.experts}"
                remedy = f"give a number from 0 to {mixture.experts - 1}"
                problems.append(Problem(where=name, what=what, remedy=remedy))
    if problems:
        return problems
    left, per_token = mixture.experts - len(request.remove) + len(request.add), request.experts_per_token
    used = mixture.per_token if per_token is None else per_token
    if left < 1:
        what = f"all {mixture.experts} experts are removed"
        problems.append(Problem(where="--remove", what=what, remedy="leave one or more, or add others"))
    elif per_token is not None and per_token < 1:
        what, remedy = f"{per_token} is below one", "give 1 or more"
        problems.append(Problem(where="--experts-per-token", what=what, remedy=remedy))
    elif left < used:
        what = f"{left} {plural('expert', left)} would be left, and {used} work on each token"
        remedy = f"give --experts-per-token {left}, or remove fewer"
        problems.append(Problem(where="--remove", what=what, remedy=remedy))
    mode = request.gate_mode
    if mode is not None and mode not in MODES and mode not in ALIASES:
        what = f"there is no gate mode {mode!r:.80}"
        problems.append(Problem(where="--gate-mode", what=what, remedy=f"any of {', '.join(MODES)}"))
    if mixture.config is not None and mixture.config.backbone.is_merged and not request.keep_backbone:
        method = mixture.config.backbone.method
        what = f"its backbone was merged from all its experts (backbone: {method}), so it would change with them"
        remedy = (
            "give --keep-backbone to keep it as it is, or merge again with the new list of experts (the config is in "
            "its README.md)"
        )
        problems.append(Problem(where=mixture.facts.label, what=what, remedy=remedy))
    return problems


class _Translator:
    """Makes one translation. `_notes` and `_problems` are collected on the way."""

    def __init__(self, mixture: OpenedMixture, request: EditRequest, hub: HubOptions, storage: StorageOptions) -> None:
        self._mixture, self._request, self._hub = mixture, request, hub
        self._recorded = mixture.config
        self._storage = mixture.config.storage if mixture.config is not None else storage
        self._resolved: dict[ModelRef, ModelFacts | None] = {}
        self._notes: list[str] = []
        self._problems: list[Problem] = []
        recorded_mode = mixture.config.gate_mode if mixture.config is not None else DEFAULT_MODE
        name = request.gate_mode or recorded_mode
        self._mode = MODES[ALIASES.get(name, name)]
        self._prompt_model = mixture.config.prompt_model if mixture.config is not None else None
        if request.gate_mode is not None and self._mode.name != recorded_mode:
            self._prompt_model = None

    def translation(self) -> Translation:
        kept = [number for number in range(self._mixture.experts) if number not in self._request.remove]
        self._resolve_at_once([number for number in kept if number not in self._request.replace])
        experts: list[Any] = [self._entry(number) for number in kept] + list(self._request.add)
        shared = self._shared()
        config = self._whole(experts, shared)
        if self._problems:
            raise ProblemReport(self._problems)
        made = make_config(config)
        record = self._mixture.record
        options = record.options if record is not None else MergeOptions()
        return Translation(
            mixture=self._mixture,
            config=made,
            options=options,
            edit=self._edit(kept, made),
            notes=tuple(self._notes),
        )

    # --- the experts

    @property
    def _reads_ffns(self) -> bool:
        """Whether prompts of experts that stay are read with their own FFNs."""
        return self._computes_kept_rows and self._mode.needs_forward_pass and self._reader != "base"

    @property
    def _reader(self) -> str:
        return self._prompt_model or self._mode.default_prompt_model

    @property
    def _computes_kept_rows(self) -> bool:
        """Whether prompts of experts that stay are read."""
        if not self._mode.needs_prompts:
            return False
        return not self._request.keep_routers or (self._mode.fits_together and self._has_new_rows)

    @property
    def _has_new_rows(self) -> bool:
        return bool(self._request.add or self._request.replace)

    def _entry(self, number: int) -> Any:
        """The entry of an expert that stays or is replaced."""
        recorded = self._recorded.experts[number] if self._recorded is not None else None
        if (new := self._request.replace.get(number)) is not None:
            # It is an expert for the same texts, unless others are given.
            own = {} if recorded is None else {"positive_prompts": recorded.positive_prompts}
            own |= {} if recorded is None else {"negative_prompts": recorded.negative_prompts}
            given = {"positive_prompts": self._request.prompts[number]} if number in self._request.prompts else {}
            return {**own, **given, **new}
        entry = self._kept(Owner.expert(number), number, recorded)
        if number in self._request.prompts:
            return {**_as_mapping(entry), "positive_prompts": self._request.prompts[number]}
        return entry

    def _kept(self, owner: Owner, expert: int | str, recorded: ExpertConfig | None) -> ExpertConfig:
        """An expert of the mixture as a source, or the model that it was made of if prompts need that."""
        view = self._mixture.expert(expert)
        if recorded is None:
            return ExpertConfig(source_model=view)
        # What was done to its weights is in them already.
        done = {"noise_scale": None, "residual_scale": None, "reinit": 0.0 if self._reinit else None}
        as_view = recorded.model_copy(update={"source_model": view, **done})
        # With the mixture's backbone, the result is no merge of the sources.
        if not self._reads_ffns or (self._request.keep_backbone and self._reader != "expert"):
            return as_view
        original = self._resolve(recorded.source_model)
        if self._reader == "expert":
            if original is None:
                what = (
                    f"{owner}, {recorded.source_model}, can't be read, and its own attention is needed for its prompts"
                )
                self._problems.append(Problem(where=self._label, what=what, remedy="give --keep-routers"))
            return recorded
        is_drawn = bool(recorded.noise_scale or (self._reinit if recorded.reinit is None else recorded.reinit))
        is_changed = is_drawn or recorded.residual_scale is not None
        if original is not None and not is_changed and self._has_same_ffn(original, as_view):
            return as_view
        if original is not None and not is_drawn:
            self._notes.append(
                f"{owner} is read from {recorded.source_model}: its prompts are read with its own weights"
            )
            return recorded
        why = (
            f"{recorded.source_model} can't be read"
            if original is None
            else "some of its weights were drawn (noise_scale, reinit)"
        )
        self._notes.append(
            f"{owner}: {why}, so its prompts are read with the weights in the mixture; router rows may differ by "
            "rounding from those of a merge of its sources"
        )
        return as_view

    def _has_same_ffn(self, original: ModelFacts, as_view: ExpertConfig) -> bool:
        """Whether the mixture has the FFNs of an expert's source with the same names and values."""
        view = self._resolve(as_view.source_model)
        return view is not None and original.adapter is None and _ffn(view) == _ffn(original)

    @property
    def _reinit(self) -> float:
        """The share of channels that the record's config draws anew."""
        return (self._recorded.reinit or 0.0) if self._recorded is not None else 0.0

    @property
    def _dtype(self) -> str:
        """The dtype of the mixture's experts."""
        name = self._mixture.architecture.expert["ffn.down"].format(layer=0, expert=0)
        entry = self._mixture.facts.index.tensors.get(name)
        return entry.dtype if entry is not None else ""

    def _shared(self) -> list[Any]:
        recorded = self._recorded.shared_experts if self._recorded is not None else ()
        if self._recorded is None:
            with SourceReader(self._hub, self._storage) as reader:
                if not has_shared_expert(self._mixture, reader):
                    return []
            if self._mixture.architecture.shared_router and not self._request.keep_routers:
                what = "its shared expert has a gate, which can't be computed anew without a record"
                self._problems.append(Problem(where=self._label, what=what, remedy="give --keep-routers"))
            return [ExpertConfig(source_model=self._mixture.expert(SHARED_EXPERT))]
        if len(recorded) == 1:
            entry = self._kept(Owner.shared(0), SHARED_EXPERT, recorded[0])
            if not self._request.keep_routers:
                return [entry]
            without = {"positive_prompts": (), "negative_prompts": ()}
            return [entry.model_copy(update={**without, "source_model": self._mixture.expert(SHARED_EXPERT)})]
        for number, expert in enumerate(recorded):
            if self._resolve(expert.source_model) is None:
                what = f"shared expert {number}, {expert.source_model}, can't be read"
                remedy = "bring it back: several shared experts are one in the mixture"
                self._problems.append(Problem(where=self._label, what=what, remedy=remedy))
        return list(recorded)

    # --- the rest of the config

    def _whole(self, experts: list[Any], shared: list[Any]) -> dict[str, Any]:
        recorded = self._recorded
        if recorded is not None:
            config = {key: getattr(recorded, key) for key in type(recorded).model_fields}
        else:
            config = {"architecture": self._mixture.architecture.name, "storage": self._storage}
            config["experts_per_token"] = self._mixture.per_token
        config |= {"experts": experts, "shared_experts": shared, "gate_mode": self._mode.name}
        config |= {"prompt_model": self._prompt_model if self._mode.needs_forward_pass else None}
        config["keep_routers"] = ModelRef(model=self._mixture.ref) if self._request.keep_routers else None
        if self._request.experts_per_token is not None:
            config["experts_per_token"] = self._request.experts_per_token
        config["base_model"], is_own = self._base()
        if is_own:
            config["backbone"] = BASE_BACKBONE
            config["dtype"] = NAME_OF_DTYPE.get(self._dtype)
        return config

    @property
    def _label(self) -> str:
        return self._mixture.facts.label

    def _base(self) -> tuple[ModelRef, bool]:
        """The base model, and whether it is the mixture itself, as the backbone of the result."""
        own = ModelRef(model=self._mixture.ref)
        if self._request.base_model is not None:
            try:
                return parse_model_ref(self._request.base_model), False
            except ValueError as error:
                self._problems.append(Problem(where="--base-model", what=str(error)))
                return own, True
        reads_base = self._mode.needs_forward_pass and self._mode.needs_prompts and self._reader == "base"
        is_needed = reads_base and (not self._request.keep_routers or self._has_new_rows)
        base = self._recorded.base_model if self._recorded is not None else None
        if self._request.keep_backbone or base is None:
            if is_needed:
                why = "with --keep-backbone, no dense model has" if base is not None else "it has no record of"
                what = f"gate_mode {self._mode.name} reads prompts with the dense base model, and {why} it"
                remedy = f"give {_GIVE_RIDGE}{self._or_keep_routers}"
                if base is None:
                    remedy = f"{_GIVE_BASE}{self._or_keep_routers}, or {_GIVE_RIDGE}"
                self._problems.append(Problem(where=self._label, what=what, remedy=remedy))
            return own, True
        if self._resolve(base) is not None:
            return base, False
        if is_needed:
            what = f"its base model {base}, with which gate_mode {self._mode.name} reads prompts, can't be read"
            self._problems.append(Problem(where=self._label, what=what, remedy=f"{_GIVE_BASE}{self._or_keep_routers}"))
        else:
            self._notes.append(f"the base model {base} can't be read: the backbone is that of {self._label}")
        return own, True

    @property
    def _or_keep_routers(self) -> str:
        """The end of a remedy, where the option is not given already."""
        return "" if self._request.keep_routers else ", or --keep-routers"

    def _resolve(self, ref: ModelRef) -> ModelFacts | None:
        """A model of the record, or an expert of the mixture; None if it can't be read."""
        if ref not in self._resolved:
            try:
                self._resolved[ref] = resolve_model(ref, self._hub, self._storage)
            except ProblemReport:
                self._resolved[ref] = None
        return self._resolved[ref]

    def _resolve_at_once(self, kept: list[int]) -> None:
        """Read all models that are compared with the mixture's experts. Those of one folder are read once."""
        if self._recorded is None or not self._reads_ffns or self._request.keep_backbone:
            return
        refs = [self._recorded.experts[number].source_model for number in kept]
        refs += [self._mixture.expert(number) for number in kept]
        with suppress(ProblemReport):  # then they are read one by one
            self._resolved |= resolve_models(refs, self._hub, self._storage)

    # --- what was done

    def _edit(self, kept: list[int], config: MergeConfig) -> Edit:
        models, record = self._mixture.models(), self._mixture.record
        names = record.expert_names if record is not None else ()
        done = []
        for place, number in enumerate(kept):
            before = models.get(Owner.expert(number))
            if number in self._request.replace:
                name = str(config.experts[place].source_model)
                done.append(EditedExpert(how="replaced", number=number, model=name, before=before))
            else:
                name = names[number] if number < len(names) else ""
                done.append(EditedExpert(how="kept", number=number, model=before, name=name))
        for expert in config.experts[len(kept) :]:
            done.append(EditedExpert(how="added", number=None, model=str(expert.source_model)))
        return Edit(
            mixture=self._label,
            plan_digest=record.plan_digest if record is not None else None,
            routers="kept" if self._request.keep_routers else "computed",
            backbone="kept" if config.base_model.model == self._mixture.ref else "base",
            experts=tuple(done),
            removed=tuple((number, models.get(Owner.expert(number))) for number in sorted(self._request.remove)),
        )


def _ffn(facts: ModelFacts) -> dict[str, str] | None:
    """The dtypes of a model's FFN weights by their names; None if it is of no family that raymoe knows."""
    spec = read_spec(facts.config, facts.label)
    if not isinstance(spec, DenseSpec):
        return None
    names = [name for row, _, name in spec.tensors() if row.is_ffn]
    return {name: facts.index.tensors[name].dtype for name in names if name in facts.index.tensors}


def _as_mapping(expert: ExpertConfig) -> Mapping[str, Any]:
    return {key: getattr(expert, key) for key in type(expert).model_fields}


def check_plan_of_edit(translation: Translation, plan: MergePlan, hub: HubOptions) -> None:
    """Check what the plan of an edit takes from elsewhere than the mixture.

    Raises ProblemReport if the base has another backbone than the mixture; or, for a mixture that raymoe has no record
    of, if it has what the merge would lose: other settings of routing, trained biases of routers.
    """
    mixture, config = translation.mixture, translation.config
    view = resolve_model(mixture.expert(0), hub, config.storage)
    problems: list[Problem] = []
    with SourceReader(hub, config.storage) as reader:
        if config.base_model.model.path != mixture.ref.path:
            problems += backbone_problems(view, resolve_model(config.base_model, hub, config.storage), reader)
        if mixture.record is None:
            spec = read_spec(view.config, view.label)
            assert isinstance(spec, DenseSpec)  # the plan was made with it
            problems += unknown_settings(mixture, spec, plan.text_config, reader)
    if problems:
        raise ProblemReport(problems)


def plan_translation(translation: Translation, hub: HubOptions) -> MergePlan:
    """Plan the merge that an edit is. Raises ProblemReport."""
    plan = plan_merge(translation.config, translation.options, hub=hub)
    check_plan_of_edit(translation, plan, hub)
    return plan
