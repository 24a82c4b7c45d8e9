"""What a merge config may say: the keys of mergekit-moe and raymoe's own, as frozen models.

A config that mergekit-moe accepts means the same here, with the same defaults; `null` for an optional key is its
default. What differs is strictness: an unknown key, a quoted number or a prompt that YAML read as a date is an error
and not a surprise in the merged model. The models check each value by itself; `cross_checks` checks that the values fit
together. Names are normalized when they are read (`hidden_last` is `hidden`, `torch.bfloat16` is `bfloat16`), so that
two configs with the same meaning compare equal and have the same `to_plain`.

`coerce` reads values of common types, and `prompt_sources` reads prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, PlainValidator

from raymoe.config.backbone import BASE_BACKBONE, BackboneConfig, parse_backbone, plain_backbone
from raymoe.config.coerce import (
    optional,
    parse_choice,
    parse_finite,
    parse_flag,
    parse_integer,
    parse_text,
    value_error,
)
from raymoe.config.model_refs import SHARED_EXPERT, ModelRef, parse_expert, parse_model_ref, with_expert
from raymoe.config.prompt_sources import PromptFile, Prompts
from raymoe.config.source_positions import Loc, short_repr, short_text, yaml_kind
from raymoe.config.start_keys import (
    ALL_LAYERS,
    MoeLayers,
    parse_granularity,
    parse_moe_layers,
    parse_reinit,
    plain_moe_layers,
)
from raymoe.config.storage_block import plain_storage, storage_options
from raymoe.engines import ENGINES
from raymoe.gate_modes import ALIASES, DEFAULT_MODE, MODES
from raymoe.object_store.options import StorageOptions

Dtype = Literal["float32", "float16", "bfloat16"]
PromptModel = Literal["base", "expert", "grafted"]
Modality = Literal["text", "image-text"]

NUMBER_KEYS = frozenset({"noise_scale", "residual_scale", "reinit", "scale", "density"})
"""Keys that take a number with a fraction."""

_EXPERTS = ("experts", "shared_experts")
_PROMPTS = ("positive_prompts", "negative_prompts")
# Names that are only suggested: mergekit does not know them, so no config relies on them.
_DTYPE_NICKNAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
# Names of packages and commands. `engines` takes those of `ENGINES` only.
_ENGINE_NICKNAMES = {
    "mlx-lm": "mlx",
    "mlx_lm": "mlx",
    "llamacpp": "llama.cpp",
    "llama-cpp": "llama.cpp",
    "gguf": "llama.cpp",
    "mistral.rs": "mistralrs",
    "exllama": "exllamav3",
}


def _parse_gate_mode(value: Any) -> str:
    name = parse_choice(value, (*MODES, *ALIASES), {})
    return ALIASES.get(name, name)


def _parse_dtype(value: Any) -> str:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return parse_choice(name, get_args(Dtype), _DTYPE_NICKNAMES)


def _parse_prompt_model(value: Any) -> str:
    return parse_choice(value, get_args(PromptModel), {})


def _parse_modality(value: Any) -> str:
    return parse_choice(value, get_args(Modality), {})


def _parse_architecture(value: Any) -> str:
    name = parse_text(value).strip().lower()
    if not name:
        raise value_error("is blank", "name an output architecture, or leave the key out to have it chosen")
    return name


def _parse_engines(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise value_error(f"expected a list of engines, got {yaml_kind(value)}", "write [vllm, mlx], for example")
    return tuple(dict.fromkeys(parse_choice(name, tuple(ENGINES), _ENGINE_NICKNAMES) for name in names))


def _parse_count(value: Any) -> int:
    return parse_integer(value, example=2)


def _parse_noise_scale(value: Any) -> float:
    number = parse_finite(value)
    if number < 0:
        raise value_error(f"{short_repr(value)} is below zero", "write zero or more: it is a standard deviation")
    return number


def _parse_ref(value: Any) -> ModelRef:
    if isinstance(value, ModelRef):
        return value
    ref = value if isinstance(value, Mapping) else parse_text(value)
    try:
        return parse_model_ref(ref)
    except ValueError as error:
        message = str(error)
        if isinstance(ref, str):
            message = message.replace(repr(ref.strip()), short_repr(ref.strip()))
        example = "name a local folder or a Hub model: org/name, org/name@revision, org/name+org/adapter"
        raise value_error(short_text(message, 400), example) from None


def _plain_ref(ref: ModelRef) -> str | dict[str, Any]:
    """A model as text; as mergekit's mapping if a name holds '+', '@' or '#', since text is split there."""
    parts = {"model": ref.model} if ref.adapter is None else {"model": ref.model, "lora": ref.adapter}
    if not any(sign in f"{part.path}{part.revision}" for part in parts.values() for sign in "+@#"):
        return str(ref)
    plain: dict[str, Any] = {key: {"path": part.path, "revision": part.revision} for key, part in parts.items()}
    return plain if ref.expert is None else {**plain, "expert": ref.expert}


def _parse_expert(value: Any) -> Any:
    """One entry of `experts`. Its key `expert` becomes a part of `source_model`: both name one model."""
    if isinstance(value, Mapping) and "expert" in value:
        others = {key: each for key, each in value.items() if key != "expert"}
        if value["expert"] is None or "source_model" not in others:
            return others
        try:
            number = parse_expert(value["expert"])
        except ValueError as error:
            raise value_error(str(error), "write expert: 0 for the first expert of the mixture") from None
        ref = _parse_ref(others["source_model"])
        try:
            return {**others, "source_model": with_expert(ref, number)}
        except ValueError as error:
            raise value_error(str(error), "leave out one of them") from None
    if isinstance(value, (Mapping, ExpertConfig)):
        return value
    name = short_text(value) if isinstance(value, str) else "org/name"
    raise value_error(f"expected a mapping, got {yaml_kind(value)}", f"write '- source_model: {name}'")


def _parse_experts(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise value_error(
            f"expected a list of experts, got {yaml_kind(value)}",
            "start each expert with '- source_model: ...'",
        )
    return value


def _parse_storage(value: Any) -> StorageOptions:
    try:
        return storage_options(value)
    except ValueError as error:
        raise value_error(str(error.args[0]), str(error.args[1])) from None


Model = Annotated[ModelRef, PlainValidator(_parse_ref), PlainSerializer(_plain_ref)]
OptionalModel = Annotated[
    ModelRef | None,
    PlainValidator(optional(_parse_ref)),
    PlainSerializer(lambda ref: None if ref is None else _plain_ref(ref)),
]


class ExpertConfig(BaseModel):
    """One expert: the model that gives its FFN weights, and the prompts it should be good at.

    In a config, `expert` beside `source_model` names one expert of a mixture; here it is a part of `source_model`.
    `noise_scale` is the standard deviation of Gaussian noise added to the FFN weights; `residual_scale` is a factor on
    the FFN's output. `None` leaves the weights as they are. `reinit`, the share of channels that are drawn anew, and
    `chat_template` are raymoe's own keys: `None` means that of the whole config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_model: Model
    positive_prompts: Prompts = ()
    negative_prompts: Prompts = ()
    noise_scale: Annotated[float | None, BeforeValidator(optional(_parse_noise_scale))] = None
    residual_scale: Annotated[float | None, BeforeValidator(optional(parse_finite))] = None
    reinit: Annotated[float | None, BeforeValidator(optional(parse_reinit))] = None
    chat_template: Annotated[bool | None, PlainValidator(optional(parse_flag))] = None


Expert = Annotated[ExpertConfig, BeforeValidator(_parse_expert)]


class MergeConfig(BaseModel):
    """A whole merge config. Each value is valid by itself; `check_config` checks that they fit together.

    `dtype` is what the weights are stored in (`None`: what the base model's config names). `engines`, `prompt_model`,
    `chat_template`, `modality`, `backbone`, `granularity`, `reinit`, `moe_layers`, `keep_routers` and `storage` are
    raymoe's own keys: which engines must compute the output right; which model reads the prompts (`None`: the gate
    mode's default); whether it reads them as a user turn of its chat template; whether the output reads images (`None`:
    if its base does and there is a MoE architecture with its encoder); how attention, norms and embeddings are made; in
    how many experts each FFN is cut; which share of its channels is drawn anew; which layers have experts; the mixture
    whose experts keep their router rows; and how object stores are reached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: Model
    experts: Annotated[tuple[Expert, ...], BeforeValidator(_parse_experts)]
    shared_experts: Annotated[tuple[Expert, ...], BeforeValidator(optional(_parse_experts, ()))] = ()
    gate_mode: Annotated[str, PlainValidator(optional(_parse_gate_mode, DEFAULT_MODE))] = DEFAULT_MODE
    dtype: Annotated[Dtype | None, BeforeValidator(optional(_parse_dtype))] = None
    experts_per_token: Annotated[int, PlainValidator(optional(_parse_count, 2))] = 2
    architecture: Annotated[str | None, PlainValidator(optional(_parse_architecture))] = None
    engines: Annotated[tuple[str, ...], BeforeValidator(optional(_parse_engines, ()))] = ()
    prompt_model: Annotated[PromptModel | None, BeforeValidator(optional(_parse_prompt_model))] = None
    chat_template: Annotated[bool, PlainValidator(optional(parse_flag, False))] = False
    modality: Annotated[Modality | None, BeforeValidator(optional(_parse_modality))] = None
    backbone: Annotated[
        BackboneConfig, PlainValidator(optional(parse_backbone, BASE_BACKBONE)), PlainSerializer(plain_backbone)
    ] = BASE_BACKBONE
    granularity: Annotated[int, PlainValidator(optional(parse_granularity, 1))] = 1
    reinit: Annotated[float | None, BeforeValidator(optional(parse_reinit))] = None
    moe_layers: Annotated[
        MoeLayers, PlainValidator(optional(parse_moe_layers, ALL_LAYERS)), PlainSerializer(plain_moe_layers)
    ] = ALL_LAYERS
    keep_routers: OptionalModel = None
    storage: Annotated[StorageOptions, PlainValidator(_parse_storage), PlainSerializer(plain_storage)] = (
        StorageOptions()
    )

    @property
    def all_experts(self) -> tuple[ExpertConfig, ...]:
        """The experts, then the shared experts."""
        return (*self.experts, *self.shared_experts)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models of the base and of all experts, in that order."""
        return (self.base_model, *(expert.source_model for expert in self.all_experts))

    @property
    def needs_prompts(self) -> bool:
        """Whether the router is computed from the experts' prompts."""
        return MODES[self.gate_mode].needs_prompts and not self.keeps_all_rows

    @property
    def keeps_all_rows(self) -> bool:
        """Whether no router row is computed: all experts keep those of their mixture."""
        return bool(self.experts) and all(map(self.keeps_row, self.experts))

    def keeps_row(self, expert: ExpertConfig) -> bool:
        """Whether an expert keeps its router row: it is an expert of the mixture that `keep_routers` names."""
        ref = expert.source_model
        is_kept = self.keep_routers is not None and ref.model == self.keep_routers.model
        return is_kept and ref.adapter is None and isinstance(ref.expert, int)

    @property
    def keeps_shared_gate(self) -> bool:
        """Whether the shared expert is that of the mixture that `keep_routers` names, and keeps its gate."""
        if self.keep_routers is None or len(self.shared_experts) != 1:
            return False
        ref = self.shared_experts[0].source_model
        return ref.model == self.keep_routers.model and ref.adapter is None and ref.expert == SHARED_EXPERT

    @property
    def reads_shared_prompts(self) -> bool:
        """Whether the gate of the shared experts is computed from their prompts, if they have any."""
        return self.needs_prompts and not self.keeps_shared_gate

    def needs_prompts_of(self, expert: ExpertConfig) -> bool:
        """Whether rows are computed from the prompts of one of the `experts`. A mode that fits all rows together needs
        those of experts that keep their rows too."""
        return self.needs_prompts and (MODES[self.gate_mode].fits_together or not self.keeps_row(expert))

    @property
    def reads_prompts(self) -> bool:
        """Whether the router or the backbone is computed from the experts' prompts."""
        return self.needs_prompts or self.backbone.needs_prompts

    def reinit_of(self, expert: ExpertConfig, experts: str) -> float:
        """The share of channels of one of this config's experts that are drawn anew. `experts` is the key that it is
        under: the share of the whole config is that of `experts` only."""
        share = self.reinit if expert.reinit is None and experts == "experts" else expert.reinit
        return share or 0.0

    def uses_chat_template(self, expert: ExpertConfig) -> bool:
        """Whether the prompts of one of this config's experts are put into the chat template."""
        return self.chat_template if expert.chat_template is None else expert.chat_template

    @property
    def prompt_files(self) -> dict[Loc, PromptFile]:
        """The files to draw prompts from, by location in the config; empty if nothing reads prompts."""
        return {
            (experts, number, key): prompts
            for experts in _EXPERTS
            for number, expert in enumerate(getattr(self, experts))
            for key in _PROMPTS
            if self._reads(experts, key, expert) and isinstance(prompts := getattr(expert, key), PromptFile)
        }

    def _reads(self, experts: str, key: str, expert: ExpertConfig) -> bool:
        """Whether anything is computed from these prompts. The backbone needs the experts' positive ones."""
        is_of_backbone = (experts, key) == ("experts", "positive_prompts")
        is_of_gates = self.needs_prompts_of(expert) if experts == "experts" else self.reads_shared_prompts
        return is_of_gates or (self.backbone.needs_prompts and is_of_backbone)

    def with_prompts(self, texts: Mapping[Loc, tuple[str, ...]]) -> MergeConfig:
        """This config with the prompts at the locations of `texts` replaced."""
        changed = {
            experts: tuple(
                expert.model_copy(update={k: texts[experts, n, k] for k in _PROMPTS if (experts, n, k) in texts})
                for n, expert in enumerate(getattr(self, experts))
            )
            for experts in _EXPERTS
        }
        return self.model_copy(update=changed)

    def to_plain(self) -> dict[str, Any]:
        """All keys, defaults included, as values that JSON has. Equal configs give equal results."""
        return self.model_dump(mode="json")

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> MergeConfig:
        """The config that `to_plain` was called on. Raises pydantic's `ValidationError` for anything else."""
        return cls.model_validate(plain)
