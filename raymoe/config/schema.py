"""What a merge config may say: the keys of mergekit-moe and raymoe's own, as frozen models.

A config that mergekit-moe accepts means the same here, with the same defaults; `null` for an optional key
is its default. What differs is strictness: an unknown key, a quoted number or a prompt that YAML read as a
date is an error and not a surprise in the merged model. The models check each value by itself; whether the
values go together is the business of `checks`. Names are cleaned on the way in (`hidden_last` is `hidden`,
`torch.bfloat16` is `bfloat16`), so that two configs that mean the same compare equal and have the same
`to_plain`.

Validators raise errors with a remedy in their context, which `problems` turns into what a person reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from raymoe.config.lines import excerpt, kind_of, shown
from raymoe.config.modes import MODES
from raymoe.config.storage import plain_storage, storage_options
from raymoe.objects.options import StorageOptions
from raymoe.sources.refs import parse_model_ref
from raymoe.sources.types import ModelRef

__all__ = ["NUMBER_KEYS", "Dtype", "ExpertConfig", "MergeConfig", "PromptModel"]

Dtype = Literal["float32", "float16", "bfloat16"]
PromptModel = Literal["base", "expert", "grafted"]

NUMBER_KEYS = frozenset({"noise_scale", "residual_scale"})
"""Keys that take a number with a fraction."""

_GATE_MODE_ALIASES = {"hidden_last": "hidden"}
# Names that are only suggested: mergekit does not know them, so no config relies on them.
_DTYPE_NICKNAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


def _error(what: str, remedy: str, *, quote: bool = False) -> PydanticCustomError:
    """An error of one value. `quote`: with quotes around it, YAML would have read the text that was meant."""
    return PydanticCustomError("raymoe", "{what}", {"what": what, "remedy": remedy, "quote": quote})


def _text(value: Any) -> str:
    if value is None:
        raise _error("expected text, got nothing", "write the text, or remove the entry", quote=True)
    if not isinstance(value, str):
        raise _error(f"expected text, got {kind_of(value)}", "put it in quotes", quote=True)
    try:
        # JSON may spell a character beyond U+FFFF as two escapes, which YAML reads as two halves of one.
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _error(
            f"{shown(value)} is not valid Unicode text", "remove the lone surrogate (\\uD800-\\uDFFF)"
        ) from None


def _one_of(value: Any, names: tuple[str, ...], nicknames: Mapping[str, str]) -> str:
    text = _text(value)
    if text in names:
        return text
    near = text.strip().lower()
    close = [nicknames[near]] if near in nicknames else get_close_matches(near, names, n=1)
    remedy = f"did you mean {close[0]}? (one of {', '.join(names)})" if close else f"use one of {', '.join(names)}"
    raise _error(f"{shown(text)} is not a known value", remedy)


def _gate_mode(value: Any) -> str:
    if value is None:
        return "hidden"
    names = (*MODES, *_GATE_MODE_ALIASES)
    name = _one_of(value, names, {})
    return _GATE_MODE_ALIASES.get(name, name)


def _dtype(value: Any) -> str | None:
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    return _one_of(name, get_args(Dtype), _DTYPE_NICKNAMES)


def _prompt_model(value: Any) -> str | None:
    return None if value is None else _one_of(value, get_args(PromptModel), {})


def _architecture(value: Any) -> str | None:
    if value is None:
        return None
    name = _text(value).strip().lower()
    if not name:
        raise _error("is blank", "name an output architecture, or leave the key out to have it chosen")
    return name


def _count(value: Any) -> int:
    if value is None:
        return 2
    if isinstance(value, str):
        raise _error(f"expected a whole number, got the text {shown(value)}", "write it as digits without quotes")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _error(f"expected a whole number, got {kind_of(value)}", "write a number, for example 2")
    if isinstance(value, float) and not value.is_integer():
        raise _error(f"expected a whole number, got {shown(value)}", "write a number without a fraction, for example 2")
    return int(value)


def _scale(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        number = _number_in(value)
        remedy = f"write it without quotes: {number}" if number is not None else "write a number, for example 0.1"
        raise _error(f"expected a number, got the text {shown(value)}", remedy)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _error(f"expected a number, got {kind_of(value)}", "write a number, for example 0.1")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _error(f"{shown(value)} is not a finite number", "write a number, for example 0.1")
    return number


def _noise_scale(value: Any) -> float | None:
    number = _scale(value)
    if number is not None and number < 0:
        raise _error(f"{shown(value)} is below zero", "write zero or more: it is a standard deviation")
    return number


def _number_in(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _model_ref(value: Any) -> ModelRef:
    if isinstance(value, ModelRef):
        return value
    ref = value if isinstance(value, Mapping) else _text(value)
    try:
        return parse_model_ref(ref)
    except ValueError as error:
        message = str(error)
        if isinstance(ref, str):
            message = message.replace(repr(ref.strip()), shown(ref.strip()))
        example = "name a local folder or a Hub model: org/name, org/name@revision, org/name+org/adapter"
        raise _error(excerpt(message, 400), example) from None


def _plain_ref(ref: ModelRef) -> str | dict[str, Any]:
    """A model as text; as mergekit's mapping if a name holds '+' or '@', which text would split off."""
    parts = {"model": ref.model} if ref.adapter is None else {"model": ref.model, "lora": ref.adapter}
    if not any(sign in f"{part.path}{part.revision}" for part in parts.values() for sign in "+@"):
        return str(ref)
    return {key: {"path": part.path, "revision": part.revision} for key, part in parts.items()}


def _prompts(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        raise _error(
            f"expected a list of prompts, got the text {shown(value)}",
            "make it a list: one prompt a line, each after '- '",
        )
    if not isinstance(value, (list, tuple)):
        raise _error(
            f"expected a list of prompts, got {kind_of(value)}",
            "make it a list: one prompt a line, each after '- '",
        )
    return value


def _prompt(value: Any) -> str:
    if isinstance(value, (Mapping, list)):
        # "- Note: this" is a mapping and "- [INST] ..." a list: the prompt as a whole has to be quoted.
        raise _error(
            f"expected text, got {kind_of(value)}",
            "quote the whole prompt: ': ' inside it, or '[' or '{' at its start, has a meaning in YAML",
        )
    return _text(value)


def _expert(value: Any) -> Any:
    if isinstance(value, (Mapping, ExpertConfig)):
        return value
    name = excerpt(value) if isinstance(value, str) else "org/name"
    raise _error(f"expected a mapping, got {kind_of(value)}", f"write '- source_model: {name}'")


def _experts(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _error(
            f"expected a list of experts, got {kind_of(value)}",
            "start each expert with '- source_model: ...'",
        )
    return value


def _shared_experts(value: Any) -> Any:
    return () if value is None else _experts(value)


def _storage(value: Any) -> StorageOptions:
    try:
        return storage_options(value)
    except ValueError as error:
        raise _error(str(error.args[0]), str(error.args[1])) from None


Model = Annotated[ModelRef, PlainValidator(_model_ref), PlainSerializer(_plain_ref)]
Prompts = Annotated[tuple[Annotated[str, PlainValidator(_prompt)], ...], BeforeValidator(_prompts)]


class ExpertConfig(BaseModel):
    """One expert: the model that gives its FFN weights, and the prompts it should be good at.

    `noise_scale` is the standard deviation of Gaussian noise added to the FFN weights; `residual_scale` is
    a factor on the FFN's output. `None` leaves the weights as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_model: Model
    positive_prompts: Prompts = ()
    negative_prompts: Prompts = ()
    noise_scale: Annotated[float | None, BeforeValidator(_noise_scale)] = None
    residual_scale: Annotated[float | None, BeforeValidator(_scale)] = None


Expert = Annotated[ExpertConfig, BeforeValidator(_expert)]


class MergeConfig(BaseModel):
    """A whole merge config. Each value is sound by itself; `check_config` says whether they go together.

    `dtype` is what the weights are stored in (`None`: what the base model's config names). `prompt_model`
    and `storage` are raymoe's own keys: which model reads the prompts, `None` being the gate mode's default;
    and how object stores are reached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: Model
    experts: Annotated[tuple[Expert, ...], BeforeValidator(_experts)]
    shared_experts: Annotated[tuple[Expert, ...], BeforeValidator(_shared_experts)] = ()
    gate_mode: Annotated[str, PlainValidator(_gate_mode)] = "hidden"
    dtype: Annotated[Dtype | None, BeforeValidator(_dtype)] = None
    experts_per_token: Annotated[int, PlainValidator(_count)] = Field(default=2)
    architecture: Annotated[str | None, PlainValidator(_architecture)] = None
    prompt_model: Annotated[PromptModel | None, BeforeValidator(_prompt_model)] = None
    storage: Annotated[StorageOptions, PlainValidator(_storage), PlainSerializer(plain_storage)] = StorageOptions()

    @property
    def needs_prompts(self) -> bool:
        """Whether the router is computed from the experts' prompts."""
        return MODES[self.gate_mode].needs_prompts

    def to_plain(self) -> dict[str, Any]:
        """All keys, defaults included, as values that JSON has. Equal configs give equal results."""
        return self.model_dump(mode="json")

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> MergeConfig:
        """The config that `to_plain` was called on. Raises pydantic's `ValidationError` for anything else."""
        return cls.model_validate(plain)
