"""`evaluate_dense`: losses of a dense model, and of models that it is compared with, on labeled texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.compute import choose_device
from raymoe.errors import Problem, ProblemCollector
from raymoe.evaluation.dataset import (
    LabeledText,
    TokenizedTexts,
    data_summary,
    read_texts,
    tokenize_texts,
    truncation_warning,
)
from raymoe.evaluation.metrics import as_json_losses, loss_warnings, losses
from raymoe.evaluation.models import (
    OpenedModel,
    check_tokens,
    model_tokenizer,
    models_for_tokens,
    open_further_models,
    open_model,
)
from raymoe.evaluation.options import AGAINST, MODEL, EvaluationOptions, option_problems
from raymoe.evaluation.run import FORMAT
from raymoe.progress_line import ProgressLine, token_layers
from raymoe.storage.source_reader import SourceReader


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """`models` has the model and all that it is compared with, by the name of their loss."""

    opened: OpenedModel
    texts: tuple[LabeledText, ...]
    tokens: TokenizedTexts
    models: Mapping[str, CheckpointModel]
    warnings: tuple[str, ...]


def evaluate_dense(name: str, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate the dense model that is named so on a file of labeled texts; the result is what eval.json holds.

    Raises ProblemReport, before anything is computed, with everything that is wrong with the models, the texts and the
    options.
    """
    from raymoe.evaluation.passes import Passes, models_work

    inputs = _open_inputs(name, data, options)
    ids, labels = inputs.tokens.ids, [text.label for text in inputs.texts]
    with (
        SourceReader(options.hub, options.storage) as reader,
        ProgressLine(token_layers, total=models_work(inputs.models, ids), quiet=options.quiet) as progress,
    ):
        values = Passes(ids, choose_device(options.device), reader, progress).run_all(inputs.models)
    loss = {model: losses(of_texts, labels) for model, of_texts in values.items()}
    spec = inputs.opened.model.spec
    return {
        "format": FORMAT,
        "model": name,
        "architecture": spec.model_type,
        "layers": spec.layers,
        "data": data_summary(inputs.texts, inputs.tokens, str(data)),
        "compared": options.models,
        "loss": {each: as_json_losses(loss[each]) if each in loss else None for each in (MODEL, *options.models)},
        "warnings": [*inputs.warnings, *loss_warnings(loss)],
    }


def _open_inputs(name: str, data: str | Path, options: EvaluationOptions) -> _Inputs:
    collector = ProblemCollector([*option_problems(options, of_merge=False), *_merge_option_problems(name, options)])
    opened = collector.run(open_model, name, MODEL, options, options.storage)
    further = open_further_models(options.models, options, options.storage, collector)
    tokenizer = None
    if opened is not None:
        tokenizer = collector.run(model_tokenizer, opened.facts, options, options.storage)
    texts = collector.run(read_texts, data, None, options)
    if collector.problems or opened is None or texts is None:
        raise collector.report()
    tokens = tokenize_texts(texts, data, tokenizer, opened.model.spec.vocab, options.max_tokens)
    check_tokens([*further.values()], texts, data, tokens, options.max_tokens, options, options.storage)
    models, warnings = models_for_tokens({each: further[each].model for each in further}, tokens)
    return _Inputs(
        opened=opened,
        texts=tuple(texts),
        tokens=tokens,
        models={MODEL: opened.model, **models},
        warnings=(*opened.facts.warnings, *truncation_warning(texts, tokens, options.max_tokens), *warnings),
    )


def _merge_option_problems(name: str, options: EvaluationOptions) -> Iterator[Problem]:
    """Options that have an effect only with a merge."""
    if merges_only := [each for each in options.named or () if each in AGAINST]:
        what = f"{', '.join(merges_only)}: {name} is no merge, and has no experts and routers to compare with"
        yield Problem(where="--against", what=what, remedy="compare it with models: --against NAME=MODEL")
    if options.labels:
        what = f"has no effect, since {name} is no merge: its labels are names of kinds of text"
        yield Problem(where="--label", what=what, remedy="leave it out")
    if options.experts_per_token:
        what = f"has no effect, since {name} is no merge, and has no experts"
        yield Problem(where="--experts-per-token", what=what, remedy="leave it out")
