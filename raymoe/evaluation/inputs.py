"""Opens and checks all inputs of an evaluation before anything is computed, with all problems in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.checkpoints.weight_table import CheckpointModel, dense_model
from raymoe.errors import ProblemCollector
from raymoe.evaluation.dataset import LabeledText, Labels, TokenizedTexts, read_texts, tokenize_texts
from raymoe.evaluation.finished_merge import (
    EvaluatedMerge,
    open_merge,
    open_mixture,
    open_tokenizer,
    plan_hidden_gates,
    resolve_sources,
    unique_names,
)
from raymoe.evaluation.options import EvaluationOptions, option_problems
from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import GatePlan
from raymoe.sources.facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInputs:
    """`names` are the experts' unique names. `dense` holds the base and experts to compare with, by the name of their
    loss; `gates` is the plan of the rows of mode `hidden`, if they are compared."""

    merge: EvaluatedMerge
    mixture: CheckpointModel
    names: tuple[str, ...]
    texts: tuple[LabeledText, ...]
    tokens: TokenizedTexts
    tokenizer: Any
    dense: Mapping[str, CheckpointModel]
    gates: GatePlan | None
    oracle: bool
    warnings: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The texts' distinct labels, in order of appearance."""
        return list(dict.fromkeys(text.label for text in self.texts))

    @property
    def label_experts(self) -> dict[str, int]:
        """The expert of each label."""
        return {text.label: text.expert for text in self.texts}


def open_evaluation(place: str | Path, data: str | Path, options: EvaluationOptions) -> EvaluationInputs:
    """Raises ProblemReport with all that is wrong with the merge, the texts, the sources and the options."""
    merge = open_merge(place, options)
    collector, warnings = ProblemCollector(option_problems(options)), []
    wanted = list(options.comparisons)
    if "hidden" in wanted and options.against is None and not merge.has_prompts:
        wanted.remove("hidden")
        warnings.append("not compared with gate mode hidden: the merge has no prompts")
    elif "hidden" in wanted and options.against is None and merge.is_hidden:
        wanted.remove("hidden")  # the merge has that gate mode
    mixture = collector.run(open_mixture, merge)
    texts = collector.run(read_texts, data, Labels(merge.names, options.labels), options)
    sources = collector.run(resolve_sources, merge, wanted, options)
    names = unique_names(merge.names)
    dense = _open_dense(sources or {}, names, wanted, collector)
    gates = None
    if sources is not None and "hidden" in wanted:
        gates = collector.run(plan_hidden_gates, merge, wanted, options)
    tokenizer = collector.run(open_tokenizer, merge, options)
    if collector.problems or mixture is None or texts is None:
        raise collector.report()
    tokens = tokenize_texts(texts, data, tokenizer, mixture.spec.vocab, options.max_tokens)
    dense, more = _with_all_tokens(dense, tokens)
    return EvaluationInputs(
        merge=merge,
        mixture=mixture,
        names=names,
        texts=tuple(texts),
        tokens=tokens,
        tokenizer=tokenizer,
        dense=dense,
        gates=gates,
        oracle="oracle" in wanted,
        warnings=(*merge.facts.warnings, *warnings, *_text_warnings(texts, tokens, names, options), *more),
    )


def _open_dense(
    sources: Mapping[Owner, ModelFacts], names: Sequence[str], wanted: Sequence[str], collector: ProblemCollector
) -> dict[str, CheckpointModel]:
    """Whole dense models by the name of their loss: `base`, `expert go`."""
    owners = {"base": BASE} if "base" in wanted else {}
    if "experts" in wanted:
        owners |= {f"expert {name}": Owner.expert(number) for number, name in enumerate(names)}
    found = {}
    for name, owner in owners.items():
        if owner in sources:
            model = collector.run(dense_model, sources[owner], str(owner))
            if model is not None:
                found[name] = model
    return found


def _with_all_tokens(
    dense: Mapping[str, CheckpointModel], tokens: TokenizedTexts
) -> tuple[dict[str, CheckpointModel], list[str]]:
    """The models with an embedding for every token; a warning for each other model."""
    largest = max(max(ids) for ids in tokens.ids)
    found = {name: model for name, model in dense.items() if model.spec.vocab > largest}
    return found, [
        f"{name} can't read the texts: token id {largest} is beyond its vocabulary of {model.spec.vocab}"
        for name, model in dense.items()
        if name not in found
    ]


def _text_warnings(
    texts: Sequence[LabeledText], tokens: TokenizedTexts, names: Sequence[str], options: EvaluationOptions
) -> list[str]:
    warnings = []
    reported = {text.label for text in texts}
    for pair in options.labels:
        if (label := pair.partition("=")[0].strip()) not in reported:
            warnings.append(f"--label {pair}: no text has the label {label!r}")
    if tokens.truncated:
        what = f"{tokens.truncated} of {len(texts)} texts were cut to {options.max_tokens} tokens (--max-tokens)"
        warnings.append(what)
    without = [name for number, name in enumerate(names) if number not in {text.expert for text in texts}]
    if without:
        warnings.append(f"no text is for {', '.join(without)}: the routing results leave out such texts")
    return warnings
