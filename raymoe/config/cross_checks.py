"""Checks that the values of a config fit together, which no key shows by itself.

Each check is a function from a config to problems, and all of them run, so that one report holds everything. They do
not depend on files: `check_config(config)` checks a config made in Python, and `SourcePositions` adds line numbers for
one from a file. If the schema refused a value, its location is `unread`, and the checks that need it are skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from raymoe.config.prompt_sources import PromptFile, file_format
from raymoe.config.schema import ExpertConfig, MergeConfig
from raymoe.config.source_positions import NO_POSITIONS, Finding, Loc, format_loc, short_repr
from raymoe.errors import Problem
from raymoe.formatting import plural
from raymoe.gate_modes import MODES

ALL_SAME_FLAG = "--i-understand-this-is-not-useful-without-training"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReadConfig:
    """A config, and which of its values were read."""

    config: MergeConfig
    unread: frozenset[Loc]

    def has(self, *locs: Loc) -> bool:
        """Whether all of `locs` were read, each with all values inside it and around it."""
        return not any(a[: len(b)] == b[: len(a)] for a in self.unread for b in locs)


def check_config(config: MergeConfig, *, allow_all_same: bool = False) -> list[Problem]:
    """All combinations of values in `config` that cannot give a sensible merge.

    `allow_all_same` is the flag for merges that are to be trained: all experts may be the same model.
    """
    return NO_POSITIONS.problems(find_invalid(config, allow_all_same=allow_all_same))


def find_invalid(config: MergeConfig, *, allow_all_same: bool, unread: Collection[Loc] = ()) -> list[Finding]:
    """As `check_config`, without places. `unread` are the places where `config` holds placeholders."""
    checked = _ReadConfig(config=config, unread=frozenset(unread))
    found = [
        *_expert_findings(checked),
        *_prompt_findings(checked),
        *_shared_prompt_findings(checked),
        *_identical_prompt_findings(checked),
        *_backbone_findings(checked),
        *_kept_router_findings(checked),
    ]
    if not allow_all_same:
        found += _all_same_findings(checked)
    return [Finding(loc=loc, what=what, remedy=remedy) for loc, what, remedy in found]


_Findings = Iterator[tuple[Loc, str, str]]


def _expert_findings(checked: _ReadConfig) -> _Findings:
    per_token, count = checked.config.experts_per_token, len(checked.config.experts)
    # A partial config has as many experts as the file, so their count is wrong only if the list was not read at all.
    experts_read = ("experts",) not in checked.unread
    if experts_read and not count:
        yield ("experts",), "there are no experts", "list at least one, each as '- source_model: ...'"
    if not checked.has(("experts_per_token",)):
        return
    if per_token < 1:
        yield (
            ("experts_per_token",),
            "must be 1 or more",
            "write how many experts work on each token, usually 2",
        )
    elif experts_read and 0 < count < per_token:
        given = "experts_per_token" in checked.config.model_fields_set
        how = "" if given else " by default"
        what = f"experts_per_token is {short_repr(per_token)}{how}, but there {_count_with_verb(count)}"
        loc: Loc = ("experts_per_token",) if given else ("experts",)
        at_most = f"{count} or less" if count > 1 else str(count)
        yield loc, what, f"write experts_per_token: {at_most}, or add experts"


def _count_with_verb(count: int) -> str:
    return "is only 1 expert" if count == 1 else f"are only {count} experts"


def _lacks_prompts(expert: ExpertConfig, *, needs_text: bool) -> bool:
    """Whether there is nothing to compute from in this expert's positive prompts.

    A blank prompt is read as the beginning of a text (the BOS token), as mergekit-moe reads it. With `needs_text`,
    other tokens than BOS are needed.
    """
    prompts = expert.positive_prompts
    if isinstance(prompts, PromptFile):  # what a file holds is known when it is read; these checks run again then
        return False
    return not any(prompt.strip() for prompt in prompts) if needs_text else not prompts


def _lacks_gate_prompts(config: MergeConfig, expert: ExpertConfig) -> bool:
    """Whether the router can't be computed from this expert's positive prompts."""
    return _lacks_prompts(expert, needs_text=MODES[config.gate_mode].needs_text)


def _prompt_findings(checked: _ReadConfig) -> _Findings:
    config = checked.config
    if not checked.has(("gate_mode",)) or not config.needs_prompts:
        return
    for index, expert in enumerate(config.experts):
        loc: Loc = ("experts", index, "positive_prompts")
        if config.needs_prompts_of(expert) and checked.has(loc) and _lacks_gate_prompts(config, expert):
            what = "has only blank prompts" if expert.positive_prompts else "has no prompts"
            yield (
                loc,
                f"the expert {what}, but gate_mode {config.gate_mode} computes the router from them",
                "add texts this expert is good at, or use gate_mode: random and train the router",
            )


def _shared_prompt_findings(checked: _ReadConfig) -> _Findings:
    """Either all shared experts have a gate, or none has: the architecture decides."""
    config = checked.config
    if not checked.has(("gate_mode",), ("shared_experts",)) or not config.needs_prompts:
        return
    without = [i for i, expert in enumerate(config.shared_experts) if _lacks_gate_prompts(config, expert)]
    for index in without:
        expert = config.shared_experts[index]
        loc: Loc = ("shared_experts", index, "positive_prompts")
        if len(without) < len(config.shared_experts):
            yield (
                loc,
                "this shared expert has no prompts, but others have",
                "give all of them prompts, or none",
            )
        elif expert.negative_prompts:
            yield (
                loc,
                "there are negative prompts but no positive ones",
                "add positive_prompts, or remove both",
            )


def _identical_prompt_findings(checked: _ReadConfig) -> _Findings:
    config = checked.config
    if not checked.has(("gate_mode",), ("experts",)) or not config.needs_prompts or len(config.experts) < 2:
        return
    if any(_lacks_gate_prompts(config, expert) for expert in config.experts):
        return  # already reported for each expert
    if len({_prompts_of(config, expert) for expert in config.experts}) == 1:
        yield (
            ("experts",),
            f"all {len(config.experts)} experts have the same prompts, so the router cannot tell them apart",
            "give each expert prompts of what it, and not the others, is good at",
        )


def _prompts_of(config: MergeConfig, expert: ExpertConfig) -> tuple[object, ...]:
    return expert.positive_prompts, expert.negative_prompts, config.uses_chat_template(expert)


def _kept_router_findings(checked: _ReadConfig) -> _Findings:
    config = checked.config
    if config.keep_routers is None or not checked.has(("keep_routers",), ("experts",), ("shared_experts",)):
        return
    if config.keep_routers.expert is not None or config.keep_routers.adapter is not None:
        yield (
            ("keep_routers",),
            "it names more than a mixture",
            "name the mixture itself, without an expert or an adapter",
        )
    elif not any(map(config.keeps_row, config.experts)):
        what = f"no expert is one of {config.keep_routers}"
        yield ("keep_routers",), what, "write source_model with this mixture and expert: 0, or remove the key"
    if config.granularity > 1:
        what = "with granularity, each expert has several rows"
        yield ("keep_routers",), what, "remove granularity, or keep_routers"
    prompted = any(expert.positive_prompts or expert.negative_prompts for expert in config.shared_experts)
    if prompted and MODES[config.gate_mode].needs_prompts and not config.keeps_shared_gate:
        what = "the gate of the shared experts would be computed from prompts, in another scale than the rows that stay"
        yield ("keep_routers",), what, "remove the prompts of the shared experts, or keep_routers"


def _backbone_findings(checked: _ReadConfig) -> _Findings:
    """Checks the keys of `backbone` against its method and the number of experts."""
    backbone, count = checked.config.backbone, len(checked.config.experts)
    if not checked.has(("backbone",)):
        return
    if not backbone.is_merged and backbone.given:
        remedy = "remove it, or write method: linear, slerp, ties or regmean"
        yield ("backbone",), f"{backbone.given[0]} has no effect with method base: the base's backbone is taken", remedy
    if backbone.density is not None and backbone.is_merged and backbone.method != "ties":
        what = f"density is for ties, which drops small differences; method {backbone.method} takes all of them"
        yield ("backbone", "density"), what, "remove density, or write method: ties"
    if backbone.method == "regmean":
        yield from _regmean_findings(checked)
    elif backbone.alpha is not None and backbone.is_merged:
        what = f"alpha is for regmean, which reads prompts; method {backbone.method} reads none"
        yield ("backbone", "alpha"), what, "remove alpha, or write method: regmean"
    if ("experts",) in checked.unread:
        return
    if backbone.weights is not None and len(backbone.weights) != count:
        what = (
            f"{len(backbone.weights)} {plural('weight', len(backbone.weights))} for {count} {plural('expert', count)}"
        )
        yield ("backbone", "weights"), what, "write one weight for each of experts; shared_experts have none"
    if backbone.method == "slerp" and count != 2:
        what = f"slerp interpolates between two models: it takes 2 experts, not {count}"
        yield ("backbone",), what, "write method: linear or ties"


def _regmean_findings(checked: _ReadConfig) -> _Findings:
    """`regmean` merges attention, by what each expert's own model makes of the expert's prompts."""
    config = checked.config
    backbone = config.backbone
    if "attention" not in backbone.include:
        what = "regmean merges the matrices of attention, and include leaves them out; the rest is averaged"
        yield ("backbone", "include"), what, "include attention, or write method: linear"
    weights = backbone.weights or (1.0,) * len(config.experts)
    if sum(weight != 0 for weight in weights) == 1:
        return  # a copy, for which nothing is measured
    for index, (expert, weight) in enumerate(zip(config.experts, weights, strict=False)):
        loc: Loc = ("experts", index, "positive_prompts")
        if weight and checked.has(loc) and _lacks_prompts(expert, needs_text=True):
            what = "has only blank prompts" if expert.positive_prompts else "has no prompts"
            yield (
                loc,
                f"the expert {what}, but backbone: regmean measures with them what its attention works on",
                "add texts this expert is good at, give it weight 0 in the backbone, or use backbone: linear",
            )


def _is_all_same(config: MergeConfig) -> bool:
    # References are compared whole: one model with two adapters is two experts.
    return len(config.experts) > 1 and len({expert.source_model for expert in config.experts}) == 1


def _all_same_findings(checked: _ReadConfig) -> _Findings:
    """With random gates this is sparse upcycling, which is trained afterwards anyway: a warning is enough."""
    config = checked.config
    if not checked.has(("gate_mode",)) or not config.needs_prompts or not _is_all_same(config):
        return
    if checked.has(*(("experts", index, "source_model") for index in range(len(config.experts)))):
        yield (
            ("experts",),
            f"all {len(config.experts)} experts are the same model: the merge is larger and no better",
            f"use different models, or pass {ALL_SAME_FLAG} if you mean to train the merge",
        )


def config_warnings(config: MergeConfig) -> list[str]:
    """Warnings for what is allowed, but probably a mistake."""
    return [*_same_expert_warnings(config), *_blank_prompt_warnings(config), *_unused_key_warnings(config)]


def _same_expert_warnings(config: MergeConfig) -> Iterator[str]:
    if _is_all_same(config):
        yield f"all {len(config.experts)} experts are the same model: not useful before the merge is trained"
        return
    groups: dict[object, list[str]] = defaultdict(list)
    for index, expert in enumerate(config.experts):
        groups[(expert.source_model, _prompts_of(config, expert))].append(format_loc(("experts", index)))
    for names in groups.values():
        if len(names) > 1:
            yield f"{', '.join(names)} have the same source_model and prompts: one expert {len(names)} times"


def _blank_prompt_warnings(config: MergeConfig) -> Iterator[str]:
    for index, expert in enumerate(config.experts):
        for key in ("positive_prompts", "negative_prompts"):
            prompts: tuple[str, ...] | PromptFile = getattr(expert, key)
            for number, prompt in enumerate(() if isinstance(prompts, PromptFile) else prompts):
                if not prompt.strip() and config.reads_prompts:
                    yield (
                        f"{format_loc(('experts', index, key, number))} is blank: only the beginning of a text is read"
                    )


def _unused_key_warnings(config: MergeConfig) -> Iterator[str]:
    if config.prompt_model and not config.needs_prompts:
        yield f"prompt_model has no effect: gate_mode {config.gate_mode} reads no prompts"
    if not config.reads_prompts and any(map(config.uses_chat_template, config.all_experts)):
        yield f"chat_template has no effect: gate_mode {config.gate_mode} reads no prompts"
    for loc, prompts in config.prompt_files.items():
        if "field" in prompts.model_fields_set and file_format(prompts.file) == "txt":
            yield f"{format_loc((*loc, 'field'))} has no effect: a text file has one prompt per line"
