"""The `backbone` key of a config: where attention, norms and embeddings of the merge come from.

    backbone: linear
    backbone: {method: ties, weights: [1, 1, 2], density: 0.2, include: [attention]}

Only the block itself is checked here; `cross_checks` checks that it fits the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator

from raymoe.config.coerce import optional, parse_choice, parse_finite, value_error
from raymoe.config.source_positions import short_repr, yaml_kind

BackboneMethod = Literal["base", "linear", "slerp", "ties", "regmean"]
BackboneGroup = Literal["attention", "norms", "embeddings"]
METHODS: tuple[BackboneMethod, ...] = get_args(BackboneMethod)
GROUPS: tuple[BackboneGroup, ...] = get_args(BackboneGroup)

DEFAULT_ALPHA = 0.9
"""The factor of `regmean` on off-diagonal second moments, as in most of its paper's experiments."""

_NICKNAMES = {"attn": "attention", "norm": "norms", "embedding": "embeddings", "embed": "embeddings"}


def _parse_method(value: Any) -> str:
    return parse_choice(value, METHODS, {"mean": "linear", "average": "linear"})


def _parse_weights(value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise value_error(f"expected a list of numbers, got {yaml_kind(value)}", "write one number for each expert")
    weights = tuple(map(parse_finite, value))
    if negative := [weight for weight in weights if weight < 0]:
        raise value_error(f"{short_repr(negative[0])} is below zero", "write shares of a mean: zero or more")
    if not any(weights):
        raise value_error("no weight is above zero", "give at least one expert a weight above zero")
    return weights


def _parse_density(value: Any) -> float:
    number = parse_finite(value)
    if not 0 < number <= 1:
        remedy = "write the share of differences to keep: above 0, up to 1; the paper of TIES takes 0.2"
        raise value_error(f"{short_repr(number)} is not a share", remedy)
    return number


def _parse_alpha(value: Any) -> float:
    number = parse_finite(value)
    if not 0 <= number < 1:
        remedy = "write 0 or more, and less than 1, so that the second moments can be inverted; the paper takes 0.9"
        raise value_error(f"{short_repr(number)} is not a factor of regmean", remedy)
    return number


def _parse_include(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise value_error(f"expected a list, got {yaml_kind(value)}", f"write a list of these: {', '.join(GROUPS)}")
    named = {parse_choice(each, GROUPS, _NICKNAMES) for each in value}
    if not named:
        raise value_error("names nothing", f"name one of {', '.join(GROUPS)}, or write backbone: base")
    return tuple(group for group in GROUPS if group in named)


class BackboneConfig(BaseModel):
    """How attention, norms and embeddings of the merge are made.

    `base` takes the base model's. The other methods merge those of the experts, and mean what they mean in
    mergekit-yaml, or in the paper of RegMean: `weights` are the experts' shares (`None`: equal ones), `scale` is a
    factor on the difference to the base, `density` the share of differences that `ties` keeps (`None`: all), `alpha`
    the factor of `regmean` on off-diagonal second moments (`None`: 0.9), `include` the groups that are merged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[BackboneMethod, BeforeValidator(_parse_method)]
    weights: Annotated[tuple[float, ...] | None, BeforeValidator(optional(_parse_weights))] = None
    scale: Annotated[float, PlainValidator(optional(parse_finite, 1.0))] = 1.0
    density: Annotated[float | None, PlainValidator(optional(_parse_density))] = None
    alpha: Annotated[float | None, PlainValidator(optional(_parse_alpha))] = None
    include: Annotated[tuple[BackboneGroup, ...], BeforeValidator(optional(_parse_include, GROUPS))] = GROUPS

    @property
    def is_merged(self) -> bool:
        """Whether the backbone is merged from those of the experts."""
        return self.method != "base"

    @property
    def needs_prompts(self) -> bool:
        """Whether the experts' own models have to read their prompts before the backbone can be merged."""
        return self.method == "regmean"

    @property
    def given(self) -> list[str]:
        """The keys besides `method` that differ from their defaults."""
        return [key for key in self.to_plain() if key != "method"]

    def to_plain(self) -> dict[str, Any]:
        """The keys that differ from their defaults, as in a config."""
        return {"method": self.method, **self.model_dump(mode="json", exclude_defaults=True)}


BASE_BACKBONE = BackboneConfig(method="base")


def parse_backbone(value: Any) -> BackboneConfig:
    """The block, or the name of a method."""
    if isinstance(value, (Mapping, BackboneConfig)):
        return BackboneConfig.model_validate(value)
    if not isinstance(value, str):
        remedy = f"write one of {', '.join(METHODS)}, or a mapping with the key method"
        raise value_error(f"expected the name of a method or a mapping, got {yaml_kind(value)}", remedy)
    return BackboneConfig(method=parse_choice(value, METHODS, {}))  # type: ignore[arg-type]


def plain_backbone(backbone: BackboneConfig) -> str | dict[str, Any]:
    """The key's value: only the name of the method if all else has its default."""
    return backbone.to_plain() if backbone.given else backbone.method
