"""A finished merge and its source models, from its record (`raymoe.json`).

The merge itself is read from its own files; base and experts from the locations in the record. A missing source is a
problem only for comparisons that need it, and the message says how to leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymoe.checkpoints.merge_record import read_record, with_own_storage
from raymoe.checkpoints.open_checkpoint import open_checkpoint
from raymoe.checkpoints.weight_table import CheckpointModel, mixture_model
from raymoe.config import MergeConfig
from raymoe.config.model_refs import ModelRef, PathRef
from raymoe.errors import Problem, ProblemReport
from raymoe.evaluation.options import EvaluationOptions, ReadingOptions
from raymoe.gate_modes import DEFAULT_MODE, MODES
from raymoe.object_store.location import Location
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan_merge import plan_merge
from raymoe.sources.facts import ModelFacts
from raymoe.sources.resolve import fetch_file, fetch_side_files, resolve_model
from raymoe.sources.tokenizer_files import with_tokenizer_code


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedMerge:
    """`facts` are of the merged checkpoint; `config` and `options` as recorded, with resolved model names."""

    facts: ModelFacts
    config: MergeConfig
    options: MergeOptions
    names: tuple[str, ...]
    plan_digest: str

    @property
    def has_prompts(self) -> bool:
        return all(expert.positive_prompts or expert.negative_prompts for expert in self.config.experts)

    @property
    def is_hidden(self) -> bool:
        """Whether its gate mode is `hidden`, which merges are compared with."""
        return self.config.gate_mode == DEFAULT_MODE and self.prompt_model == "base"

    @property
    def prompt_model(self) -> str | None:
        """The model that read the prompts for the gates; None if no model did."""
        mode = MODES[self.config.gate_mode]
        return (self.config.prompt_model or mode.default_prompt_model) if mode.needs_forward_pass else None


def open_merge(place: str | Path, options: ReadingOptions) -> EvaluatedMerge:
    """Open a finished merge. Raises ProblemReport if there is none with a record."""
    folder = open_checkpoint(place, options.storage)
    record = read_record(folder)
    merge_options = record.options
    config = with_own_storage(record.config, options.storage, folder.label, trusts_record=options.trust_record)
    ref = ModelRef(model=PathRef(path=Location.parse(place).text))
    facts = resolve_model(ref, options.hub, config.storage)
    return EvaluatedMerge(
        facts=facts,
        config=config,
        options=merge_options,
        names=record.expert_names,
        plan_digest=record.plan_digest,
    )


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Unique names: experts with the same name get their numbers appended."""
    return tuple(name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names))


def open_mixture(merge: EvaluatedMerge) -> CheckpointModel:
    """The merge as a table of weights. Raises ProblemReport if it is not as raymoe wrote it."""
    model = mixture_model(merge.facts)
    granularity = merge.config.granularity
    if model.rule is None:
        return model
    if model.rule.experts != len(merge.names) * granularity:
        parts = f" of {granularity} parts each" if granularity > 1 else ""
        what = f"it has {model.rule.experts} experts, but its record (raymoe.json) names {len(merge.names)}{parts}"
        remedy = "name a merge as raymoe wrote it"
        raise ProblemReport([Problem(where=merge.facts.label, what=what, remedy=remedy)])
    return replace(model, rule=replace(model.rule, granularity=granularity))


def open_tokenizer(merge: EvaluatedMerge, options: ReadingOptions) -> Any:
    """The merge's tokenizer, or the base's if the merge has none."""
    from raymoe.routers.tokenize import tokenizer_from_paths

    storage, facts = merge.config.storage, merge.facts
    if not merge.options.copy_tokenizer:
        facts = resolve_model(merge.config.base_model, options.hub, storage)
    facts = with_tokenizer_code(facts, lambda file: fetch_file(file, options.hub, storage).read_bytes())
    return tokenizer_from_paths(
        fetch_side_files(facts, options.hub, storage), trust_remote_code=options.trust_remote_code
    )


def resolve_sources(
    merge: EvaluatedMerge, wanted: Sequence[str], options: EvaluationOptions
) -> dict[Owner, ModelFacts]:
    """The base and experts that `wanted` needs. Raises ProblemReport with all that are not available."""
    owners = {BASE: merge.config.base_model} if {"base", "hidden"} & set(wanted) else {}
    if {"experts", "average", "hidden"} & set(wanted):
        owners |= {Owner.expert(number): expert.source_model for number, expert in enumerate(merge.config.experts)}
    problems: dict[Problem, list[Owner]] = {}
    found: dict[Owner, ModelFacts] = {}
    for owner, ref in owners.items():
        try:
            found[owner] = resolve_model(ref, options.hub, merge.config.storage)
        except ProblemReport as report:
            for problem in report.problems:
                problems.setdefault(problem, []).append(owner)
    if problems:
        raise ProblemReport([_skipped_problem(problem, missing, wanted) for problem, missing in problems.items()])
    return found


def _skipped_problem(problem: Problem, owners: Sequence[Owner], wanted: Sequence[str]) -> Problem:
    """The problem of a source, with a remedy that leaves out that source."""
    excluded = {
        "hidden",
        *(["base"] if BASE in owners else []),
        *(["experts", "average"] if {*owners} - {BASE} else []),
    }
    what = f"{', '.join(map(str, owners))} of this merge: {problem.what}"
    return replace(problem, what=what, remedy=without_comparisons(problem.remedy, wanted, excluded))


def without_comparisons(remedy: str, wanted: Sequence[str], without: set[str]) -> str:
    """The remedy, or an `--against` that leaves out some comparisons."""
    rest = ",".join(name for name in wanted if name not in without) or "none"
    return f"{remedy + ', or ' if remedy else ''}leave out the comparisons that need it: --against {rest}"


def plan_hidden(merge: EvaluatedMerge, wanted: Sequence[str], options: EvaluationOptions) -> MergePlan:
    """The plan of this merge with gate mode `hidden`, the default. Raises ProblemReport if it can't be computed."""
    config = merge.config.model_copy(update={"gate_mode": DEFAULT_MODE, "keep_routers": None})
    merge_options = replace(merge.options, quantize_gates=None)
    try:
        return plan_merge(config, merge_options, hub=options.hub, allow_all_same=True)
    except ProblemReport as report:
        problems = [replace(p, remedy=without_comparisons(p.remedy, wanted, {"hidden"})) for p in report.problems]
        raise ProblemReport(problems) from None
