"""Generates from a finished merge, and tells which experts each prompt was routed to: `raymoe try`.

All inputs are checked before weights are read. Weights are read once for all prompts if they fit in memory, and else
once per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.compute import available_bytes, choose_device
from raymoe.errors import Problem, ProblemCollector, ProblemReport
from raymoe.evaluation.finished_merge import EvaluatedMerge, open_merge, open_mixture, open_tokenizer, unique_names
from raymoe.evaluation.options import GenerationOptions, generation_problems
from raymoe.evaluation.routing_samples import token_pieces
from raymoe.evaluation.token_routing import TokenRouting
from raymoe.formatting import human_bytes, human_rate
from raymoe.progress_line import ProgressLine
from raymoe.routers.tokenize import tokenize
from raymoe.sources.resolve import fetch_side_files
from raymoe.storage.file_names import json_object
from raymoe.storage.source_reader import SourceReader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from raymoe.evaluation.generation_model import GenerationModel

FORMAT = 1
# The share of free memory for weights: the rest is for attention's cache, activations and reading layers.
_SHARE_FOR_WEIGHTS = 0.8


def generate_answers(place: str | Path, prompts: Sequence[str], options: GenerationOptions) -> dict[str, Any]:
    """The answers of the merge at `place` to prompts; the result is what `raymoe try --json` prints.

    Raises ProblemReport, before weights are read, with everything that is wrong with the merge, the prompts and the
    options.
    """
    with open_generator(place, options) as generator:
        return generator.result(prompts)


@contextmanager
def open_generator(place: str | Path, options: GenerationOptions) -> Iterator[Generator]:
    """Open a merge for generation. Raises ProblemReport."""
    collector = ProblemCollector(generation_problems(options))
    merge = open_merge(place, options)
    mixture = collector.run(open_mixture, merge)
    tokenizer = collector.run(open_tokenizer, merge, options)
    if options.chat and tokenizer is not None and not tokenizer.chat_template:
        remedy = "leave out --chat, or merge with a base model that has one (an instruct or chat model)"
        collector.problems.append(
            Problem(where=str(place), what="its tokenizer has no chat template, which --chat needs", remedy=remedy)
        )
    if collector.problems or mixture is None:
        raise collector.report()
    with SourceReader(options.hub, merge.config.storage) as reader:
        yield Generator(str(place), merge, mixture, tokenizer, options, reader)


class Generator:
    """Answers prompts one after the other. Weights are read at the first prompt."""

    def __init__(
        self,
        place: str,
        merge: EvaluatedMerge,
        mixture: CheckpointModel,
        tokenizer: Any,
        options: GenerationOptions,
        reader: SourceReader,
    ) -> None:
        self._place, self._merge, self._mixture = place, merge, mixture
        self._tokenizer, self._options, self._reader = tokenizer, options, reader
        self._names = unique_names(merge.names)
        self._device = choose_device(options.device)
        # State of the current prompt.
        self._routing, self._progress = TokenRouting(len(self._names)), ProgressLine(str, total=0, quiet=True)

    def result(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The options and all answers: `raymoe try --json`. Raises ProblemReport as `answers`."""
        return {**self.description(), "answers": list(self.answers(prompts))}

    def answers(self, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The answers to prompts, computed lazily. Raises ProblemReport at once, with all problems of all prompts."""
        checked = list(zip(prompts, self._tokens(prompts), strict=True))

        def stage(number: int) -> str:
            verb = "generating" if self._options.max_new_tokens else "reading"
            return verb if len(checked) == 1 else f"{verb} (prompt {number} of {len(checked)})"

        return (self._answer(prompt, ids, stage(number)) for number, (prompt, ids) in enumerate(checked, 1))

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The prompts' tokens. Raises ProblemReport for prompts that can't be read or are too long."""
        if not prompts:
            remedy = "give prompts as arguments, or as lines of standard input"
            raise ProblemReport([Problem(where="raymoe try", what="there is no prompt", remedy=remedy)])
        ids = tokenize(
            self._tokenizer,
            prompts,
            vocab=self._mixture.spec.vocab,
            owner=self._place,
            chat_template=self._options.chat,
        )
        longest = self._mixture.config.get("max_position_embeddings")
        most = longest - self._options.max_new_tokens if isinstance(longest, int) else None
        problems = [
            Problem(
                where=f"prompt {number} ({prompt[:40]!r})",
                what=f"{len(tokens)} tokens and {self._options.max_new_tokens} new ones: the model reads {longest}",
                remedy="shorten it, or lower --max-new-tokens",
            )
            for number, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True), 1)
            if most is not None and len(tokens) > most
        ]
        if problems:
            raise ProblemReport(problems)
        return ids

    @cached_property
    def is_resident(self) -> bool:
        """Whether all weights fit in the memory that is free now."""
        from raymoe.evaluation.generation_model import resident_bytes

        needed = resident_bytes(self._mixture, self._device)
        return needed <= _SHARE_FOR_WEIGHTS * available_bytes(self._device)

    def description(self) -> dict[str, Any]:
        """The options, and how the model is run."""
        rule = self._mixture.rule
        assert rule is not None  # it is a mixture
        return {
            "format": FORMAT,
            "model": self._place,
            "architecture": self._merge.facts.config["model_type"],
            "experts": list(self._names),
            "experts_per_token": rule.sources_per_token,
            "layers": self._mixture.spec.layers,
            "device": self._device,
            "weights": "resident" if self.is_resident else "streamed",
            "temperature": self._options.temperature,
            "seed": self._options.seed,
        }

    def _answer(self, prompt: str, ids: Sequence[int], stage: str) -> dict[str, Any]:
        """The answer to a prompt with these tokens, and the shares of the experts.

        Shares count all tokens that the merge has read, except BOS: the prompt, and the answer without its last token.
        """
        model, self._routing = self._model, TokenRouting(len(self._names), self._moe_layers[0])
        with self._progress_line() as self._progress:
            self._progress.stage(stage, self._layer_steps)
            new = model.generate(ids, self._options, self._end_tokens)
        skipped = 1 if ids[0] == self._tokenizer.bos_token_id else 0
        is_ended = bool(new) and new[-1] in self._end_tokens
        first, weight = self._routing.shares(skipped)
        return {
            "prompt": prompt,
            "answer": self._tokenizer.decode(new, skip_special_tokens=True),
            "prompt_tokens": len(ids),
            "new_tokens": len(new),
            "is_ended": is_ended,
            "first_choice": self._by_name(first),
            "weight": self._by_name(weight),
            **({"tokens": self._token_list([*ids, *new], skipped)} if self._options.per_token else {}),
        }

    @property
    def _layer_steps(self) -> int:
        """The work of an answer of full length: one step per new token, or one that reads the prompt, in each layer."""
        return max(1, self._options.max_new_tokens) * len(self._moe_layers)

    @cached_property
    def _moe_layers(self) -> list[int]:
        assert self._mixture.rule is not None  # it is a mixture
        return self._mixture.rule.moe_layers(self._mixture.spec.layers)

    def _progress_line(self) -> ProgressLine:
        """Counts layers, and shows whole tokens: one may take minutes if the weights do not fit in memory."""
        layers, most = len(self._moe_layers), self._options.max_new_tokens
        per_unit, unit = (layers, "new tokens") if most else (1, "layers of the model")
        return ProgressLine(
            lambda count: f"{int(count) // per_unit:,} {unit}",
            rate=lambda count: human_rate(count / per_unit),
            total=self._layer_steps,
            quiet=self._options.quiet,
        )

    @cached_property
    def _model(self) -> GenerationModel:
        from raymoe.evaluation.generation_model import GenerationModel

        total = sum(ref.entry.nbytes for name, ref in self._mixture.weights.items() if ".layers." in name)
        with ProgressLine(human_bytes, total=total if self.is_resident else 0, quiet=self._options.quiet) as line:
            line.stage("reading the weights", total)
            return GenerationModel(
                self._mixture,
                self._reader,
                self._device,
                resident=self.is_resident,
                on_routing=self._on_routing,
                layer_loaded=line.add,
            )

    def _on_routing(self, layer: int, experts_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32]) -> None:
        self._routing.add(layer, experts_TK, weights_TK)
        self._progress.add(1)

    @cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the config, generation_config.json and the tokenizer that are in the
        vocabulary."""
        files = fetch_side_files(self._merge.facts, self._options.hub, self._merge.config.storage)
        settings = files.get("generation_config.json")
        named: list[Any] = [self._tokenizer.eos_token_id]
        for config in (self._merge.facts.config, json_object(settings.read_bytes()) if settings else {}):
            ids = config.get("eos_token_id")
            named += ids if isinstance(ids, list) else [ids]
        vocab = self._mixture.spec.vocab
        return tuple(dict.fromkeys(token for token in named if type(token) is int and 0 <= token < vocab))

    def _by_name(self, shares: Sequence[float]) -> dict[str, float]:
        return dict(zip(self._names, shares, strict=True))

    def _token_list(self, ids: Sequence[int], skipped: int) -> list[dict[str, Any]]:
        shares = self._routing.shares_per_token(skipped)
        pieces = token_pieces(self._tokenizer, ids, most=None)[skipped:]
        return [
            {"text": piece, "first_choice": self._by_name(first), "weight": self._by_name(weight)}
            for piece, (first, weight) in zip(pieces, shares, strict=False)  # the last one was not read
        ]
