"""Opens and checks all inputs of an evaluation before anything is computed, with all problems in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymoe.architectures.mixture_config import is_mixture
from raymoe.checkpoints.average_model import average_model
from raymoe.checkpoints.weight_table import CheckpointModel, dense_model, mixture_model
from raymoe.errors import ProblemCollector, ProblemReport
from raymoe.evaluation.dataset import (
    LabeledText,
    Labels,
    TokenizedTexts,
    read_texts,
    tokenize_texts,
    truncation_warning,
)
from raymoe.evaluation.finished_merge import (
    EvaluatedMerge,
    open_merge,
    open_mixture,
    open_tokenizer,
    plan_hidden,
    resolve_sources,
    unique_names,
    without_comparisons,
)
from raymoe.evaluation.models import check_tokens, models_for_tokens, open_further_models
from raymoe.evaluation.options import EvaluationOptions, option_problems, top_k_problems
from raymoe.gate_modes import DEFAULT_MODE, MODES
from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import MergePlan
from raymoe.sources.facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInputs:
    """`names` are the experts' unique names. `models` holds all models that the merge is compared with, by the name of
    their loss; `hidden` is the plan of this merge with gate mode `hidden`, if that is compared."""

    merge: EvaluatedMerge
    mixture: CheckpointModel
    names: tuple[str, ...]
    texts: tuple[LabeledText, ...]
    tokens: TokenizedTexts
    tokenizer: Any
    models: Mapping[str, CheckpointModel]
    hidden: MergePlan | None
    oracle: bool
    warnings: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The texts' distinct labels, in order of appearance."""
        return list(dict.fromkeys(text.label for text in self.texts))

    @property
    def text_experts(self) -> list[int]:
        """The expert of each text."""
        return [text.expert for text in self.texts if text.expert is not None]  # those of a merge all have one

    @property
    def label_experts(self) -> dict[str, int]:
        """The expert of each label."""
        return dict(zip((text.label for text in self.texts), self.text_experts, strict=True))


def open_evaluation(place: str | Path, data: str | Path, options: EvaluationOptions) -> EvaluationInputs:
    """Raises ProblemReport with all that is wrong with the merge, the texts, the sources and the options."""
    merge = open_merge(place, options)
    collector, warnings = ProblemCollector(option_problems(options)), []
    wanted = list(options.comparisons)
    if "hidden" in wanted and options.named is None and not merge.has_prompts:
        wanted.remove("hidden")
        warnings.append("not compared with gate mode hidden: the merge has no prompts")
    elif "hidden" in wanted and options.named is None and merge.is_hidden:
        wanted.remove("hidden")  # the merge has that gate mode
    mixture = collector.run(open_mixture, merge)
    experts = len(merge.names) if mixture is not None and mixture.rule is not None else None
    collector.problems += top_k_problems(options, experts)
    texts = collector.run(read_texts, data, Labels(merge.names, options.labels), options)
    sources = collector.run(resolve_sources, merge, wanted, options)
    names = unique_names(merge.names)
    models = _open_sources(sources or {}, names, wanted, collector)
    warnings += _add_average(models, names, wanted, options, collector)
    further = open_further_models(options.models, options, merge.config.storage, collector)
    hidden = None
    if "hidden" in wanted and options.named is None and _lacks_reader(merge, (sources or {}).get(BASE)):
        wanted.remove("hidden")
        warnings.append("not compared with gate mode hidden: the base is a mixture, and only its backbone is used")
    if sources is not None and "hidden" in wanted:
        hidden = collector.run(plan_hidden, merge, wanted, options)
    tokenizer = collector.run(open_tokenizer, merge, options)
    if collector.problems or mixture is None or texts is None:
        raise collector.report()
    tokens = tokenize_texts(texts, data, tokenizer, mixture.spec.vocab, options.max_tokens)
    check_tokens([*further.values()], texts, data, tokens, options.max_tokens, options, merge.config.storage)
    models |= {name: each.model for name, each in further.items()}
    models, more = models_for_tokens(models, tokens)
    return EvaluationInputs(
        merge=merge,
        mixture=mixture,
        names=names,
        texts=tuple(texts),
        tokens=tokens,
        tokenizer=tokenizer,
        models=models,
        hidden=hidden,
        oracle="oracle" in wanted,
        warnings=(*merge.facts.warnings, *warnings, *_text_warnings(texts, tokens, names, options), *more),
    )


def _lacks_reader(merge: EvaluatedMerge, base: ModelFacts | None) -> bool:
    """Whether gate mode hidden would read prompts with the backbone of a mixture, which has no FFNs."""
    reader = merge.config.prompt_model or MODES[DEFAULT_MODE].default_prompt_model
    return base is not None and is_mixture(base.config) and reader == "base"


def _open_sources(
    sources: Mapping[Owner, ModelFacts], names: Sequence[str], wanted: Sequence[str], collector: ProblemCollector
) -> dict[str, CheckpointModel]:
    """Whole dense models by the name of their loss: `base`, `expert go`."""
    owners = {"base": BASE} if "base" in wanted else {}
    if {"experts", "average"} & set(wanted):
        owners |= {f"expert {name}": Owner.expert(number) for number, name in enumerate(names)}
    found = {}
    for name, owner in owners.items():
        if owner in sources:
            facts = sources[owner]
            if is_mixture(facts.config):  # the base: of experts, one is named
                model = collector.run(mixture_model, facts)
            else:
                model = collector.run(dense_model, facts, str(owner))
            if model is not None:
                found[name] = model
    return found


def _add_average(
    models: dict[str, CheckpointModel],
    names: Sequence[str],
    wanted: Sequence[str],
    options: EvaluationOptions,
    collector: ProblemCollector,
) -> list[str]:
    """Add the average of the experts to `models` if it is wanted, and remove the experts if they are not.

    Experts that can't be averaged are a problem if the average was asked for by name, and else a warning.
    """
    experts = [models[f"expert {name}"] for name in names if f"expert {name}" in models]
    if "experts" not in wanted:
        for name in names:
            models.pop(f"expert {name}", None)
    if "average" not in wanted or len(experts) < len(names):  # then there is a problem already
        return []
    try:
        models["average"] = average_model(experts)
    except ProblemReport as report:
        (problem,) = report.problems
        if options.named is None:
            return [f"not compared with the average of the experts: {problem.where}: {problem.what}"]
        remedy = without_comparisons(problem.remedy, wanted, {"average"})
        collector.problems.append(replace(problem, remedy=remedy))
    return []


def _text_warnings(
    texts: Sequence[LabeledText], tokens: TokenizedTexts, names: Sequence[str], options: EvaluationOptions
) -> list[str]:
    warnings = []
    reported = {text.label for text in texts}
    for pair in options.labels:
        if (label := pair.partition("=")[0].strip()) not in reported:
            warnings.append(f"--label {pair}: no text has the label {label!r}")
    warnings += truncation_warning(texts, tokens, options.max_tokens)
    without = [name for number, name in enumerate(names) if number not in {text.expert for text in texts}]
    if without:
        warnings.append(f"no text is for {', '.join(without)}: the routing results leave out such texts")
    return warnings
