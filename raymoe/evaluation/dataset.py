"""Labeled texts: one JSON object per line. All lines are checked, and all problems reported at once.

A label says which expert a text is for: an expert's name, its number, or a label that `--label` gives to an expert. For
dense models, a label only names a kind of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport
from raymoe.evaluation.metrics import MEAN
from raymoe.evaluation.options import EvaluationOptions, label_pair_problem
from raymoe.object_store.urls import check_spelling
from raymoe.sources.tokenizer_files import tokenizer_guard
from raymoe.untrusted_files import read_json

_MAX_SHOWN_PROBLEMS = 20
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledText:
    """A text of the file's line `line` (from 1). `expert` is the number of its label's expert; None if dense models are
    evaluated."""

    line: int
    text: str
    label: str
    expert: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedTexts:
    """Token ids of each text, cut to the maximum length. `skipped`: how many leading tokens (BOS) are not text."""

    ids: tuple[tuple[int, ...], ...]
    truncated: int
    skipped: int


class Labels:
    """Maps labels to expert numbers. `names` may hold a name twice; then only the numbers identify these experts."""

    def __init__(self, names: Sequence[str], pairs: Sequence[str] = ()) -> None:
        """Raises ProblemReport for pairs that are not LABEL=EXPERT."""
        self._names = tuple(names)
        self._given: dict[str, int] = {}
        problems = []
        for pair in pairs:
            label, _, expert = pair.partition("=")
            number = self._number(expert.strip()) if label.strip() else None
            if number is None:
                problems.append(label_pair_problem(pair, names))
            elif self._given.setdefault(label.strip(), number) != number:
                what = f"{label.strip()!r} is given to two experts"
                problems.append(Problem(where="--label", what=what, remedy="give it to one"))
        if problems:
            raise ProblemReport(problems)

    def expert(self, label: str) -> int:
        """The number of the label's expert. Raises ValueError(what, remedy)."""
        number = self._given.get(label, self._number(label))
        if number is not None:
            return number
        if label in self._names:
            owners = [str(number) for number, name in enumerate(self._names) if name == label]
            remedy = f"use their numbers, or --label {label}=NUMBER"
            raise ValueError(f"the label {label!r} is the name of experts {' and '.join(owners)}", remedy)
        known = ", ".join(dict.fromkeys((*self._names, *self._given)))
        remedy = f"use one of {known}, a number from 0 to {len(self._names) - 1}, or --label {label}=EXPERT"
        raise ValueError(f"unknown label {label!r}", remedy)

    def _number(self, name: str) -> int | None:
        """The expert of a unique name, or of a number."""
        if self._names.count(name) == 1:
            return self._names.index(name)
        if name not in self._names and len(name) < 10 and name.isdecimal() and int(name) < len(self._names):
            return int(name)
        return None


def read_texts(file: str | Path, labels: Labels | None, options: EvaluationOptions) -> list[LabeledText]:
    """The first `options.limit` texts of each label, in the file's order. Without `labels`, any label is allowed.

    Raises ProblemReport with all problems.
    """
    problems = _ProblemKinds(str(file))
    found: list[LabeledText] = []
    taken: dict[str, int] = {}
    for line, content in _lines(file):
        try:
            text = _parse_line(line, content, labels, options)
        except ValueError as error:
            what, remedy = error.args
            problems.add(Problem(where=f"{file}, line {line}", what=what, remedy=remedy))
            continue
        taken[text.label] = taken.get(text.label, 0) + 1
        if not options.limit or taken[text.label] <= options.limit:
            found.append(text)
    if not taken:
        problems.raise_any()
        raise ProblemReport([Problem(where=str(file), what="it has no texts", remedy="give one JSON object per line")])
    problems.raise_any()
    return found


def data_summary(texts: Sequence[LabeledText], tokens: TokenizedTexts, file: str) -> dict[str, Any]:
    """`data` of eval.json: facts about the texts. Only predicted tokens count."""
    per_label: dict[str, dict[str, int]] = {}
    for text, ids in zip(texts, tokens.ids, strict=True):
        own = {} if text.expert is None else {"expert": text.expert}
        label = per_label.setdefault(text.label, {**own, "texts": 0, "tokens": 0})
        label["texts"] += 1
        label["tokens"] += len(ids) - 1
    total = sum(label["tokens"] for label in per_label.values())
    return {"file": file, "texts": len(texts), "tokens": total, "per_label": per_label}


def truncation_warning(texts: Sequence[LabeledText], tokens: TokenizedTexts, max_tokens: int) -> list[str]:
    if not tokens.truncated:
        return []
    return [f"{tokens.truncated} of {len(texts)} texts were cut to {max_tokens} tokens (--max-tokens)"]


def tokenize_texts(
    texts: Sequence[LabeledText], file: str | Path, tokenizer: Any, vocab: int, max_tokens: int
) -> TokenizedTexts:
    """Tokenize texts with the tokenizer's defaults: with BOS if it adds one, and else without.

    Raises ProblemReport for texts without a token to predict, and for tokens without an embedding.
    """
    ids: list[tuple[int, ...]] = []
    problems = _ProblemKinds(str(file))
    truncated = 0
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        with tokenizer_guard(str(file), "the model's tokenizer can't read the texts", "check its tokenizer files"):
            found = tokenizer([text.text for text in some], return_attention_mask=False, verbose=False)["input_ids"]
        for text, tokens in zip(some, found, strict=True):
            ids.append(tuple(tokens[:max_tokens]))
            if len(tokens) > max_tokens:
                truncated += 1
            for problem in _token_problems(tokens, vocab, f"{file}, line {text.line}"):
                problems.add(problem)
    problems.raise_any()
    bos = tokenizer.bos_token_id
    skipped = 1 if bos is not None and all(tokens[0] == bos for tokens in ids) else 0
    return TokenizedTexts(ids=tuple(ids), truncated=truncated, skipped=skipped)


def _token_problems(tokens: Sequence[int], vocab: int, where: str) -> Iterator[Problem]:
    if len(tokens) < 2:
        yield Problem(where=where, what="the text has no second token to predict", remedy="give it more text")
    elif max(tokens) >= vocab:
        what = f"token id {max(tokens)} is beyond the model's vocabulary of {vocab}"
        yield Problem(where=where, what=what, remedy="its tokenizer and its weights do not belong together")


def _lines(file: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines that are not blank."""
    remedy = "name a file of labeled texts: one JSON object per line"
    try:
        check_spelling(str(file))
    except ValueError:
        what = "this looks like a URL, but texts are read from a file on this machine"
        raise ProblemReport([Problem(where="--data", what=what, remedy=remedy)]) from None
    try:
        with open(file, "rb") as stream:
            for line, content in enumerate(stream, 1):
                content = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
                if content.strip():
                    yield line, content
    except OSError as error:
        what = f"can't be read: {error.strerror or error}"
        raise ProblemReport([Problem(where=str(file), what=what, remedy=remedy)]) from None


def _parse_line(line: int, content: bytes, labels: Labels | None, options: EvaluationOptions) -> LabeledText:
    """Raises ValueError(what, remedy)."""
    try:
        value = read_json(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)", "save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}", "give one JSON object per line") from None
    if not isinstance(value, dict):
        what = f"expected an object, found {type(value).__name__}"
        raise ValueError(what, f'write {{"{options.text_field}": ..., "{options.label_field}": ...}}')
    label, text = _parse_label(value, options), _parse_text(value, options)
    return LabeledText(line=line, text=text, label=label, expert=None if labels is None else labels.expert(label))


def _parse_text(value: Mapping[str, Any], options: EvaluationOptions) -> str:
    text = _field(value, options.text_field, "--text-field")
    if not isinstance(text, str):
        raise ValueError(f"{options.text_field!r} is {type(text).__name__}", "expected text")
    if not text.strip():
        raise ValueError("the text is empty", "give it some text, or remove the line")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode", "remove the lone surrogate (\\uD800-\\uDFFF)") from None
    return text


def _parse_label(value: Mapping[str, Any], options: EvaluationOptions) -> str:
    label = _field(value, options.label_field, "--label-field")
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise ValueError(f"{options.label_field!r} is {type(label).__name__}", "expected an expert's name or number")
    if label == MEAN:
        remedy = "use another name: the expert's number, or another label with --label LABEL=EXPERT"
        raise ValueError(f"the label {MEAN!r} is reserved for the mean over labels", remedy)
    return str(label)


def _field(value: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in value:
        there = ", ".join(map(repr, value)) or "none"
        raise ValueError(f"there is no {name!r} (fields here: {there:.200})", f"add it, or name the field by {option}")
    return value[name]


class _ProblemKinds:
    """Collects each kind of problem once, with its number of lines, up to a readable number of kinds."""

    def __init__(self, file: str):
        self._file = file
        self._kinds: dict[
            Problem, tuple[str, int]
        ] = {}  # problem without its location -> first location, number of lines
        self._more = 0

    def add(self, problem: Problem) -> None:
        kind = replace(problem, where="")
        if kind not in self._kinds and len(self._kinds) >= _MAX_SHOWN_PROBLEMS:
            self._more += 1
        else:
            where, count = self._kinds.get(kind, (problem.where, 0))
            self._kinds[kind] = (where, count + 1)

    def raise_any(self) -> None:
        """Raise ProblemReport if there are problems."""
        found = [
            replace(kind, where=where if count == 1 else f"{where}, and {count - 1} more lines")
            for kind, (where, count) in self._kinds.items()
        ]
        if self._more:
            found.append(Problem(where=self._file, what=f"and {self._more} more lines like these"))
        if found:
            raise ProblemReport(found)
