"""What engines make of a planned merge: reasons for the choice of its architecture, and warnings.

DenseSpec, MoeShape, MoeArchitecture --served_model--> config.json's features --judge--> rows of engines/rows.csv
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from raymoe.architectures import MOE_ARCHITECTURES, DenseSpec, MoeArchitecture, MoeShape
from raymoe.architectures.moe_architecture import moe_config
from raymoe.architectures.select_architecture import Requirement
from raymoe.engines import (
    ENGINES,
    FAILS,
    OTHERWISE,
    SAME,
    UNKNOWN,
    WARNED_ENGINES,
    ServedModel,
    Verdict,
    features_of,
    judge,
)
from raymoe.formatting import short_list


def merge_features(base: DenseSpec, moe: MoeShape, architecture: MoeArchitecture) -> tuple[str, ...]:
    """The features of a merge on which engines differ, sorted: names of `raymoe.engines.FEATURES`, and
    `layers_without_experts`, with which no engine was looked at."""
    config = moe_config(architecture, base, moe)
    has_o_bias = base.o_bias or (bool(config.get("attention_bias")) and "attn.o.bias" in architecture.backbone)
    model = ServedModel(
        config=config,
        experts=moe.experts,
        experts_per_token=moe.experts_per_token,
        shared=bool(moe.shared),
        has_qkv_bias=base.qkv_bias,
        has_o_bias=has_o_bias,
        has_head=not base.tied or architecture.stores_tied_head(base),
    )
    return tuple(sorted([*features_of(model), *(["layers_without_experts"] if moe.dense_layers else [])]))


def engine_requirement(engines: Sequence[str], base: DenseSpec, moe: MoeShape) -> Requirement | None:
    """What the config key `engines` asks of the architecture; None if it names no engine."""
    if not engines:
        return None

    def reasons(architecture: MoeArchitecture) -> list[str]:
        features = merge_features(base, moe, architecture)
        verdicts = {engine: judge(engine, architecture.name, features) for engine in engines}
        return [_why_not(engine, verdict, features) for engine, verdict in verdicts.items() if verdict.status != SAME]

    titles = " and ".join(ENGINES[engine].title for engine in engines)
    return Requirement(text=f"for {titles}", reasons=reasons, remedy="name fewer engines")


def _why_not(engine: str, verdict: Verdict, features: Collection[str]) -> str:
    title = ENGINES[engine].title
    if verdict.status == UNKNOWN:
        with_what = " with layers without experts (moe_layers)" if "layers_without_experts" in features else ""
        return f"{title} was not looked at{with_what}"
    if verdict.status == FAILS:
        return f"{title} {verdict.version} fails: {verdict.reason}"
    return f"{title} {verdict.version} computes it {verdict.reason}"


def engine_warnings(
    engines: Sequence[str], base: DenseSpec, moe: MoeShape, architecture: MoeArchitecture
) -> Iterator[str]:
    """One sentence for each engine that loads the merge and computes something else, with the remedy, or that needs an
    option.

    `engines` as in the config; empty: those that warn by default.
    """
    features, config = merge_features(base, moe, architecture), moe_config(architecture, base, moe)
    for engine in engines or WARNED_ENGINES:
        verdict = judge(engine, architecture.name, features)
        option = verdict.remedy(config)
        if verdict.status == OTHERWISE:
            how = "" if verdict.was_run else " (its source was read, not run)"
            yield (
                f"{ENGINES[engine].title} {verdict.version} computes this {architecture.title} {verdict.reason}{how}: "
                f"{_remedy(engine, option, base, moe)}"
            )
        elif verdict.status == SAME and option:
            yield (
                f"{ENGINES[engine].title} {verdict.version} needs an option for this {architecture.title}, {option}: "
                f"{verdict.reason}"
            )


def _remedy(engine: str, option: str, base: DenseSpec, moe: MoeShape) -> str:
    """The other architectures that are right there, and the option of the engine that helps, if there is one."""
    others = [
        other.name
        for other in MOE_ARCHITECTURES.values()
        if base.model_type in other.accepts
        and not other.reasons_against(base, moe)
        and judge(engine, other.name, merge_features(base, moe, other)).status == SAME
    ]
    remedies = [
        *([f"use architecture: {short_list(others, separator=' or ')}"] if others else []),
        *([f"serve it with {option}"] if option else []),
    ]
    return ", or ".join(remedies) or "serve it with another engine (raymoe archs --engine)"
