"""Models that are evaluated as they are: a dense model, or a mixture as a further model of a comparison.

They are named as a config names its models: a folder, a Hub id, a URL, or `model+adapter`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.architectures.mixture_config import is_mixture
from raymoe.checkpoints.merge_record import read_record
from raymoe.checkpoints.open_checkpoint import open_checkpoint
from raymoe.checkpoints.weight_table import CheckpointModel, dense_model, mixture_model
from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import Problem, ProblemCollector, ProblemReport
from raymoe.evaluation.dataset import LabeledText, TokenizedTexts, tokenize_texts
from raymoe.evaluation.options import ReadingOptions
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.sources.facts import ModelFacts
from raymoe.sources.folder_protocol import has_vocabulary, read_json_object
from raymoe.sources.resolve import fetch_file, fetch_side_files, resolve_model
from raymoe.sources.tokenizer_files import with_tokenizer_code
from raymoe.storage.file_names import RECORD_NAME

_ANY_TOKEN = 1 << 62  # more than any vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """`name` is what messages call it."""

    name: str
    facts: ModelFacts
    model: CheckpointModel


def is_merge(place: str | Path, storage: StorageOptions) -> bool:
    """Whether a name means a merge: a folder or URL with a record or a mixture in it. Others are names of models.

    Raises ProblemReport if there is an unfinished merge, or a URL can't be read.
    """
    try:
        ref = parse_model_ref(str(place))
        if ref.adapter is not None or ref.expert is not None:
            return False
    except ValueError:
        pass  # the URL of a merge may have characters that names of models can't have
    try:
        location = Location.parse(place)
    except ValueError:
        return False
    if not location.kind.is_object and not os.path.isdir(location.text):
        return False
    folder = open_checkpoint(place, storage)
    if folder.find(RECORD_NAME) is not None:
        return read_record(folder).extracted is None
    return folder.find("config.json") is not None and is_mixture(read_json_object(folder, "config.json"))


def open_model(name: str, where: str, options: ReadingOptions, storage: StorageOptions) -> OpenedModel:
    """Open the model that is named so. Raises ProblemReport; `where` is the option that names it."""
    try:
        ref = parse_model_ref(name)
    except ValueError as error:
        raise ProblemReport([Problem(where=where, what=str(error))]) from None
    facts = resolve_model(ref, options.hub, storage)
    if not is_mixture(facts.config):
        return OpenedModel(name=where, facts=facts, model=dense_model(facts, where))
    if facts.adapter is not None:
        what, remedy = "adapters on mixtures are not supported", "name a mixture without an adapter"
        raise ProblemReport([Problem(where=f"{where} ({facts.label})", what=what, remedy=remedy)])
    return OpenedModel(name=where, facts=facts, model=mixture_model(facts))


def model_tokenizer(facts: ModelFacts, options: ReadingOptions, storage: StorageOptions) -> Any:
    """The tokenizer that a model has in its folder. Raises ProblemReport if it has none, or it can't be loaded."""
    from raymoe.routers.tokenize import tokenizer_from_paths

    if not has_vocabulary(facts.side_files):
        what, remedy = "there are no tokenizer files", "put the model's tokenizer files into its folder"
        raise ProblemReport([Problem(where=facts.label, what=what, remedy=remedy)])
    facts = with_tokenizer_code(facts, lambda file: fetch_file(file, options.hub, storage).read_bytes())
    files = fetch_side_files(facts, options.hub, storage)
    try:
        return tokenizer_from_paths(files, trust_remote_code=options.trust_remote_code)
    except ProblemReport as report:  # it is worded for the base of a merge
        what = "its tokenizer can't be loaded"
        if not options.trust_remote_code and any(name.endswith(".py") for name in files):
            what = "its tokenizer has code of its own, which is not run unless you allow it (--trust-remote-code)"
        raise ProblemReport([Problem(where=facts.label, what=what, remedy="check its tokenizer files")]) from report


def open_further_models(
    models: Mapping[str, str], options: ReadingOptions, storage: StorageOptions, collector: ProblemCollector
) -> dict[str, OpenedModel]:
    """The models of `--against NAME=MODEL`, by name. Problems go to the collector."""
    found = {
        name: collector.run(open_model, model, f"--against {name}", options, storage) for name, model in models.items()
    }
    return {name: model for name, model in found.items() if model is not None}


def check_tokens(
    models: Sequence[OpenedModel],
    texts: Sequence[LabeledText],
    data: str | Path,
    tokens: TokenizedTexts,
    max_tokens: int,
    options: ReadingOptions,
    storage: StorageOptions,
) -> None:
    """Raises ProblemReport for models whose own tokenizer reads the texts as other tokens: a loss per token can be
    compared only between equal tokens. Models without tokenizer files are not checked."""
    collector = ProblemCollector()
    for each in models:
        if not has_vocabulary(each.facts.side_files):
            continue
        tokenizer = collector.run(model_tokenizer, each.facts, options, storage)
        if tokenizer is None:
            continue
        own = collector.run(tokenize_texts, texts, data, tokenizer, _ANY_TOKEN, max_tokens)
        if own is not None and (other := sum(a != b for a, b in zip(own.ids, tokens.ids, strict=True))):
            what = f"its tokenizer reads {other} of {len(texts)} texts as other tokens, so losses can't be compared"
            remedy = "compare models with one tokenizer, or evaluate this one alone: raymoe eval MODEL"
            collector.problems.append(Problem(where=f"{each.name} ({each.facts.label})", what=what, remedy=remedy))
    if collector.problems:
        raise collector.report()


def models_for_tokens(
    models: Mapping[str, CheckpointModel], tokens: TokenizedTexts
) -> tuple[dict[str, CheckpointModel], list[str]]:
    """The models with an embedding for every token; a warning for each other model."""
    largest = max(max(ids) for ids in tokens.ids)
    found = {name: model for name, model in models.items() if model.spec.vocab > largest}
    return found, [
        f"{name} can't read the texts: token id {largest} is beyond its vocabulary of {model.spec.vocab}"
        for name, model in models.items()
        if name not in found
    ]
