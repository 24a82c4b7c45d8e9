"""The tokenizer of a GGUF file, from the tokenizer files of a checkpoint.

Two kinds are supported, by llama.cpp's names: `gpt2`, byte-level BPE with its merges in order (tokenizer.json), and
`llama`, SentencePiece's BPE with a score for every token (tokenizer.model, or a tokenizer.json that was made of one).
The gguf package reads special tokens and the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport
from raymoe.export.gguf.added_tokens import (
    TOKENIZER_FILES_REMEDY,
    AddedToken,
    conflicting_texts_problem,
    name_problems,
    read_added_token_files,
    read_added_tokens,
    read_object,
    strip_warnings,
)
from raymoe.export.gguf.pretokenizer import KNOWN, pre_tokenizer_name
from raymoe.export.gguf.space_prefix import SpacePrefix, space_prefix
from raymoe.formatting import short_list
from raymoe.sources.tokenizer_files import tokenizer_folder, tokenizer_guard

# gguf.TokenType, which are SentencePiece's own numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# llama.cpp's names of the two kinds.
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_NEVER_MERGED = -1e6  # the score of a token that no merge makes
_MAX_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """`tokens` has an entry for each row of the embedding. `scores` are SentencePiece's, `pre` and merges BPE's.

    `special` is the gguf package's SpecialVocab: merges, ids of special tokens, whether BOS and EOS are added,
    template. `warnings` say which texts transformers tokenizes differently.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    add_space_prefix: bool | None
    special: Any
    warnings: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Tokens:
    """Tokens by id while they are collected."""

    text: dict[int, str]
    type: dict[int, int]
    score: dict[int, float]
    space: SpacePrefix = field(default_factory=lambda: SpacePrefix(is_added=True))
    added: list[AddedToken] = field(default_factory=list)

    def add(self, number: int, text: str, kind: int, score: float = 0.0) -> None:
        if not isinstance(number, int) or number < 0 or not isinstance(text, str):
            raise ValueError(f"the token {text!r:.80} has the id {number!r:.80}")
        self.text[number], self.type[number], self.score[number] = text, kind, score

    def drop_added(self, size: int) -> list[AddedToken]:
        """Remove added tokens without a row in an embedding of `size` rows, and return them.

        No merge produces an added token, so the rest of the vocabulary does not need it.
        """
        beyond = [token for token in self.added if token.number >= size]
        self.added = [token for token in self.added if token.number < size]
        for number in {token.number for token in beyond}:
            del self.text[number], self.type[number], self.score[number]
        return beyond

    def special_texts(self) -> list[str]:
        """The tokens that llama.cpp looks for in a text before it splits the text."""
        return [self.text[number] for number, kind in self.type.items() if kind in (UNKNOWN, CONTROL, USER_DEFINED)]


def read_vocabulary(
    files: Mapping[str, Path], config: Mapping[str, Any], size: int, *, pre: str | None, name: str, label: str
) -> Vocabulary:
    """The tokenizer among `files` for an embedding of `size` rows.

    `pre` is llama.cpp's name of the pre-tokenizer, if the caller knows it; `name` is the model's name in the file.
    Raises ProblemReport for a tokenizer that llama.cpp lacks, or that raymoe does not recognize.
    """
    tokenizer_config = _read_config(files)
    tokens, model, pre = _tokens(files, config, tokenizer_config, pre, label)
    dropped = tokens.drop_added(size)
    if max(tokens.text, default=0) >= size:
        what = f"the tokenizer has tokens up to id {max(tokens.text)}, but the embedding only {size} rows"
        raise ProblemReport([Problem(where=label, what=what, remedy="use the tokenizer that belongs to the model")])
    for number in range(size):
        if number not in tokens.text:
            tokens.add(number, f"[PAD{number}]", UNUSED, _NEVER_MERGED)
    texts = tokens.text.values()
    if problems := name_problems(name, texts, label):
        raise ProblemReport(problems)
    order = range(size)
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tuple(tokens.text[number] for number in order),
        types=tuple(tokens.type[number] for number in order),
        scores=tuple(tokens.score[number] for number in order) if model == _SENTENCEPIECE else None,
        add_space_prefix=tokens.space.is_added if model == _SENTENCEPIECE else None,
        special=_special(files, config, tokenizer_config, tokens, size, with_merges=model == _BYTE_LEVEL),
        warnings=(
            *_dropped_warnings(dropped, size),
            *(tokens.space.warnings if model == _SENTENCEPIECE else ()),
            *strip_warnings(tokens.added, tokens.special_texts(), texts, name),
        ),
    )


def _dropped_warnings(tokens: Sequence[AddedToken], size: int) -> list[str]:
    if not tokens:
        return []
    names = short_list([f"{token.text} (id {token.number})" for token in tokens])
    return [
        f"the embedding has {size} rows, and the tokenizer has added tokens without one: {names}. They are left out of "
        "the file, and llama.cpp reads their text as any other text"
    ]


def _tokens(
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    pre: str | None,
    label: str,
) -> tuple[_Tokens, str, str]:
    """(tokens, llama.cpp's name of the kind, of the pre-tokenizer). A byte-level tokenizer.json comes first."""
    path = files.get("tokenizer.json")
    tokenizer = _read_json(path) if path is not None else {}
    try:
        if tokenizer and _is_byte_level(tokenizer):
            tokens = _with_added(_byte_level_tokens(tokenizer), read_added_tokens(tokenizer))
            return tokens, _BYTE_LEVEL, pre or _known_pre(tokenizer, str(path))
        if "tokenizer.model" in files:
            return _read_sentencepiece(files, config, tokenizer_config, tokenizer), _SENTENCEPIECE, "default"
        if tokenizer:
            tokens = _sentencepiece_like_tokens(tokenizer, str(path))
            tokens.space = space_prefix(tokenizer_config, tokenizer, True, config.get("model_type"))
            return _with_added(tokens, read_added_tokens(tokenizer)), _SENTENCEPIECE, "default"
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"this tokenizer.json can't be read: {type(error).__name__} {error}"
        raise ProblemReport([Problem(where=str(path), what=what, remedy=TOKENIZER_FILES_REMEDY)]) from error
    what = "there is neither a tokenizer.json nor a tokenizer.model, and a GGUF file holds its tokenizer"
    raise ProblemReport([Problem(where=label, what=what, remedy=TOKENIZER_FILES_REMEDY)])


def _read_sentencepiece(
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> _Tokens:
    """The tokens of a tokenizer.model; `tokenizer` is the tokenizer.json next to it, if there is one."""
    path = files["tokenizer.model"]
    tokens, adds_space = _sentencepiece_tokens(path)
    tokens.space = space_prefix(tokenizer_config, tokenizer, adds_space, config.get("model_type"))
    if tokenizer:
        return _with_added(tokens, read_added_tokens(tokenizer))
    added = read_added_token_files(files, tokenizer_config)
    untyped = [token for token in added if tokens.text.get(token.number, token.text) != token.text]
    if untyped:
        raise ProblemReport(
            [
                conflicting_texts_problem(str(path), t.number, tokens.text[t.number], t.text)
                for t in untyped[:_MAX_SHOWN]
            ]
        )
    return _with_added(tokens, added)


def _read_json(path: Path) -> dict[str, Any]:
    content = read_object(path)
    if not isinstance(content.get("model"), dict):
        raise ProblemReport([Problem(where=str(path), what="this is no tokenizer.json", remedy=TOKENIZER_FILES_REMEDY)])
    return content


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    decoder = tokenizer.get("decoder") or {}
    kinds = [decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", ()))]
    return tokenizer["model"].get("type") in ("BPE", None) and "ByteLevel" in kinds


def _known_pre(tokenizer: Mapping[str, Any], where: str) -> str:
    name = pre_tokenizer_name(tokenizer)
    if name is None:
        what = f"raymoe does not know llama.cpp's name for the way it splits text ({', '.join(KNOWN)})"
        remedy = "if llama.cpp has one that splits text the same way, name it: --pre NAME (tokenizer.ggml.pre)"
        raise ProblemReport([Problem(where=where, what=what, remedy=remedy)])
    return name


def _byte_level_tokens(tokenizer: Mapping[str, Any]) -> _Tokens:
    tokens = _Tokens(text={}, type={}, score={})
    for text, number in tokenizer["model"]["vocab"].items():
        tokens.add(number, text, NORMAL)
    return tokens


def _with_added(tokens: _Tokens, added: list[AddedToken]) -> _Tokens:
    """Adds tokens that are found before a text is split: control tokens and user-defined ones."""
    for token in added:
        if tokens.type.get(token.number) != UNKNOWN:
            kind = CONTROL if token.special else USER_DEFINED
            tokens.add(token.number, token.text, kind, tokens.score.get(token.number, 0.0))
    tokens.added = added
    return tokens


def _sentencepiece_tokens(path: Path) -> tuple[_Tokens, bool]:
    """The pieces, and whether a space is put before a text."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ProblemReport(
            [Problem(where=str(path), what=f"can't be read: {error}", remedy=TOKENIZER_FILES_REMEDY)]
        ) from None
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise ProblemReport([_no_bpe_problem(str(path))])
    tokens = _Tokens(text={}, type={}, score={})
    for number, piece in enumerate(proto.pieces):
        tokens.add(number, piece.piece, piece.type, piece.score)
    return tokens, proto.normalizer_spec.add_dummy_prefix


def _sentencepiece_like_tokens(tokenizer: Mapping[str, Any], where: str) -> _Tokens:
    """The tokens of a tokenizer.json that was made from a tokenizer.model; the scores keep the order of the merges."""
    model = tokenizer["model"]
    if model.get("type") not in ("BPE", None) or not model.get("byte_fallback"):
        raise ProblemReport([_no_bpe_problem(where)])
    score: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        score.setdefault(left + right, -float(rank))
    tokens = _Tokens(text={}, type={}, score={})
    for text, number in model["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = UNKNOWN if text == model.get("unk_token") else BYTE if is_byte else NORMAL
        tokens.add(number, text, kind, score.get(text, _NEVER_MERGED))
    return tokens


def _no_bpe_problem(where: str) -> Problem:
    what = "this tokenizer is neither byte-level BPE nor SentencePiece's BPE with bytes to fall back on"
    return Problem(
        where=where, what=what, remedy="llama.cpp runs these two kinds for this architecture: use another base"
    )


def _special(
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    tokens: _Tokens,
    size: int,
    *,
    with_merges: bool,
) -> Any:
    """`config` is the model's, `tokenizer_config` the tokenizer's."""
    import gguf

    with tokenizer_folder(files) as folder:
        (folder / "config.json").write_text(json.dumps(_without_absent_ids(config)))
        try:
            special = gguf.SpecialVocab(folder, load_merges=with_merges, n_vocab=size)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            what = f"the gguf package can't read this tokenizer: {type(error).__name__} {error}"
            where = files.get("tokenizer.json") or next(iter(files.values()))
            raise ProblemReport([Problem(where=str(where), what=what, remedy=TOKENIZER_FILES_REMEDY)]) from error
    numbers = {text: number for number, text in tokens.text.items()}
    for kind in special.special_token_types:
        # The package looks for these names among the added tokens of a tokenizer.json, but not in a tokenizer.model.
        token = tokenizer_config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in numbers:
            special.special_token_ids[kind] = numbers[text]
    special.add_special_token = _added_around(files, tokenizer_config, special.special_token_ids)
    return special


def _without_absent_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without negative ids of special tokens: -1 means that there is no such token."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            kept[key] = _without_absent_ids(value)
        elif not (key.endswith("_token_id") and isinstance(value, int) and value < 0):
            kept[key] = value
    return kept


def _added_around(files: Mapping[str, Path], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether BOS and EOS are added to a text, by the tokenizer's config, or else by its tokenizer.json.

    Always written, since llama.cpp has its own default for each pre-tokenizer.
    """
    around: dict[str, bool] = {}
    seen: list[int] | None = None
    for kind, place in (("bos", 0), ("eos", -1)):
        value = config.get(f"add_{kind}_token")
        if not isinstance(value, bool):
            if seen is None:
                seen = _encoded(files)
            value = seen[place] == ids.get(kind) if seen is not None else kind == "bos"
        around[kind] = value and kind in ids
    return around


def _read_config(files: Mapping[str, Path]) -> dict[str, Any]:
    """tokenizer_config.json. As in transformers, special_tokens_map.json overrides it if it lacks the key
    `added_tokens_decoder`.
    """
    path, map_path = files.get("tokenizer_config.json"), files.get("special_tokens_map.json")
    content = read_object(path) if path else {}
    if "added_tokens_decoder" in content or not map_path:
        return content
    return {
        **content,
        **{key: value for key, value in read_object(map_path).items() if key.endswith(("_token", "_tokens"))},
    }


def _encoded(files: Mapping[str, Path]) -> list[int] | None:
    """Ids of a short text with BOS and EOS, if they are added. None if there is only a tokenizer.model."""
    if "tokenizer.json" not in files:
        return None
    from tokenizers import Tokenizer

    with tokenizer_guard(str(files["tokenizer.json"]), "can't be read", TOKENIZER_FILES_REMEDY):
        tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
        tokenizer.no_truncation()  # the library panics if the stride is too long for the length
        ids: list[int] = tokenizer.encode("a").ids
    return ids or None
