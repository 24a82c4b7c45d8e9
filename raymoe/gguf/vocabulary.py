"""A tokenizer as a GGUF file holds it, from the tokenizer files of a checkpoint.

Two kinds are known to llama.cpp by these names: `gpt2`, byte-level BPE with its merges in order (tokenizer.json), and
`llama`, SentencePiece's BPE with a score for every token (tokenizer.model, or a tokenizer.json that was made of one).
Special tokens, and the chat template, are read by the gguf package.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport
from raymoe.gguf.pretokenizer import KNOWN, pre_tokenizer_name

__all__ = ["Vocabulary", "read_vocabulary"]

# gguf.TokenType, which are SentencePiece's own numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NEVER_MERGED = -1e6  # the score of a token that no merge makes
_FILES = "add the tokenizer files of the base model to the checkpoint's folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """`tokens` has an entry for each row of the embedding. `scores` are SentencePiece's, `pre` and merges BPE's.

    `special` is the gguf package's SpecialVocab: merges, ids of special tokens, what is put around a text, template.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    add_space_prefix: bool | None
    special: Any


@dataclass(slots=True, kw_only=True)
class _Tokens:
    """Tokens by id while they are gathered."""

    text: dict[int, str]
    type: dict[int, int]
    score: dict[int, float]
    add_space_prefix: bool = True

    def add(self, number: int, text: str, kind: int, score: float = 0.0) -> None:
        self.text[number], self.type[number], self.score[number] = text, kind, score


def read_vocabulary(
    files: Mapping[str, Path], config: Mapping[str, Any], size: int, *, pre: str | None, label: str
) -> Vocabulary:
    """The tokenizer among `files` for an embedding of `size` rows.

    `pre` is llama.cpp's name of the pre-tokenizer, where the caller knows it. Raises ProblemReport for a tokenizer that
    llama.cpp has none for, or that is not known to be one of its own.
    """
    tokens, model, pre = _tokens(files, pre, label)
    if max(tokens.text, default=0) >= size:
        what = f"the tokenizer has tokens up to id {max(tokens.text)}, but the embedding only {size} rows"
        raise ProblemReport([Problem(where=label, what=what, remedy="use the tokenizer that belongs to the model")])
    for number in range(size):
        if number not in tokens.text:
            tokens.add(number, f"[PAD{number}]", UNUSED, _NEVER_MERGED)
    order = range(size)
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tuple(tokens.text[number] for number in order),
        types=tuple(tokens.type[number] for number in order),
        scores=tuple(tokens.score[number] for number in order) if model == "llama" else None,
        add_space_prefix=tokens.add_space_prefix if model == "llama" else None,
        special=_special(files, config, tokens, size, with_merges=model == "gpt2"),
    )


def _tokens(files: Mapping[str, Path], pre: str | None, label: str) -> tuple[_Tokens, str, str]:
    """(tokens, llama.cpp's name of the kind, of the pre-tokenizer). A byte-level tokenizer.json comes first."""
    path = files.get("tokenizer.json")
    tokenizer = _read_json(path) if path is not None else {}
    try:
        if tokenizer and _is_byte_level(tokenizer):
            return _added(_byte_level_tokens(tokenizer), tokenizer), "gpt2", pre or _known_pre(tokenizer, str(path))
        if "tokenizer.model" in files:
            return _added(_sentencepiece_tokens(files["tokenizer.model"]), tokenizer), "llama", "default"
        if tokenizer:
            return _added(_sentencepiece_like_tokens(tokenizer, str(path)), tokenizer), "llama", "default"
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"this is no tokenizer.json that can be read: {type(error).__name__} {error}"
        raise ProblemReport([Problem(where=str(path), what=what, remedy=_FILES)]) from error
    what = "there is neither a tokenizer.json nor a tokenizer.model, and a GGUF file holds its tokenizer"
    raise ProblemReport([Problem(where=label, what=what, remedy=_FILES)])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ProblemReport([Problem(where=str(path), what=f"can't be read: {error}", remedy=_FILES)]) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ProblemReport([Problem(where=str(path), what="this is no tokenizer.json", remedy=_FILES)])
    return content


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    decoder = tokenizer.get("decoder") or {}
    kinds = [decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", ()))]
    return tokenizer["model"].get("type") in ("BPE", None) and "ByteLevel" in kinds


def _known_pre(tokenizer: Mapping[str, Any], where: str) -> str:
    name = pre_tokenizer_name(tokenizer)
    if name is None:
        what = f"it cuts text in no way that raymoe knows llama.cpp's name of ({', '.join(KNOWN)})"
        remedy = "if llama.cpp has one that cuts text the same way, name it: --pre NAME (tokenizer.ggml.pre)"
        raise ProblemReport([Problem(where=where, what=what, remedy=remedy)])
    return name


def _byte_level_tokens(tokenizer: Mapping[str, Any]) -> _Tokens:
    tokens = _Tokens(text={}, type={}, score={})
    for text, number in tokenizer["model"]["vocab"].items():
        tokens.add(number, text, NORMAL)
    return tokens


def _added(tokens: _Tokens, tokenizer: Mapping[str, Any]) -> _Tokens:
    """Tokens that are found in a text before anything else: control tokens, and the user's own."""
    for added in tokenizer.get("added_tokens") or ():
        known = tokens.type.get(added["id"])
        if known == UNKNOWN:
            continue
        kind = CONTROL if added.get("special") else USER_DEFINED
        tokens.add(added["id"], added["content"], kind, tokens.score.get(added["id"], 0.0))
    return tokens


def _sentencepiece_tokens(path: Path) -> _Tokens:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ProblemReport([Problem(where=str(path), what=f"can't be read: {error}", remedy=_FILES)]) from None
    if proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise ProblemReport([_no_bpe(str(path))])
    tokens = _Tokens(text={}, type={}, score={}, add_space_prefix=proto.normalizer_spec.add_dummy_prefix)
    for number, piece in enumerate(proto.pieces):
        tokens.add(number, piece.piece, piece.type, piece.score)
    return tokens


def _sentencepiece_like_tokens(tokenizer: Mapping[str, Any], where: str) -> _Tokens:
    """Of a tokenizer.json that was made of a tokenizer.model; scores put the merges into the order that they have."""
    model = tokenizer["model"]
    if model.get("type") not in ("BPE", None) or not model.get("byte_fallback"):
        raise ProblemReport([_no_bpe(where)])
    score: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        score.setdefault(left + right, -float(rank))
    tokens = _Tokens(text={}, type={}, score={}, add_space_prefix=_adds_space(tokenizer))
    for text, number in model["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = UNKNOWN if text == model.get("unk_token") else BYTE if is_byte else NORMAL
        tokens.add(number, text, kind, score.get(text, _NEVER_MERGED))
    return tokens


def _no_bpe(where: str) -> Problem:
    what = "this tokenizer is neither byte-level BPE nor SentencePiece's BPE with bytes to fall back on"
    return Problem(
        where=where, what=what, remedy="llama.cpp runs these two kinds for this architecture: use another base"
    )


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, by the normaliser or the pre-tokenizer."""

    if any(stage["type"] == "Prepend" for stage in _stages(tokenizer.get("normalizer"), "normalizers")):
        return True
    found = [s for s in _stages(tokenizer.get("pre_tokenizer"), "pretokenizers") if s["type"] == "Metaspace"]
    return any(s.get("prepend_scheme", "always") != "never" and s.get("add_prefix_space", True) for s in found)


def _stages(stage: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, those of sequences (under the key `inner`) one by one."""
    if stage is None:
        return []
    return [step for part in stage[inner] for step in _stages(part, inner)] if inner in stage else [stage]


def _special(
    files: Mapping[str, Path], config: Mapping[str, Any], tokens: _Tokens, size: int, *, with_merges: bool
) -> Any:
    import gguf

    with tempfile.TemporaryDirectory(prefix="raymoe-tokenizer-") as folder:
        for name, path in files.items():
            target = Path(folder) / name
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path.absolute())
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        said = _read_config(files)
        try:
            special = gguf.SpecialVocab(folder, load_merges=with_merges, n_vocab=size)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            what = f"the gguf package can't read this tokenizer: {type(error).__name__} {error}"
            raise ProblemReport([Problem(where=str(next(iter(files.values()))), what=what, remedy=_FILES)]) from error
    numbers = {text: number for number, text in tokens.text.items()}
    for kind in special.special_token_types:
        # The package looks for these names among the added tokens of a tokenizer.json, but not in a tokenizer.model.
        token = said.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in numbers:
            special.special_token_ids[kind] = numbers[text]
    special.add_special_token = _added_around(files, said, special.special_token_ids)
    return special


def _added_around(files: Mapping[str, Path], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text: as the tokenizer's config says, else as its tokenizer.json does.

    Always said outright: llama.cpp has a default of its own for each pre-tokenizer.
    """
    around: dict[str, bool] = {}
    seen: list[int] | None = None
    for kind, place in (("bos", 0), ("eos", -1)):
        said = config.get(f"add_{kind}_token")
        if not isinstance(said, bool):
            if seen is None:
                seen = _encoded(files)
            said = seen[place] == ids.get(kind) if seen is not None else kind == "bos"
        around[kind] = said and kind in ids
    return around


def _read_config(files: Mapping[str, Path]) -> dict[str, Any]:
    if "tokenizer_config.json" not in files:
        return {}
    try:
        content = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        where = str(files["tokenizer_config.json"])
        raise ProblemReport([Problem(where=where, what=f"can't be read: {error}", remedy=_FILES)]) from None
    return content if isinstance(content, dict) else {}


def _encoded(files: Mapping[str, Path]) -> list[int] | None:
    """Ids of a short text with what is put around it. None where there is only a tokenizer.model."""
    if "tokenizer.json" not in files:
        return None
    from tokenizers import Tokenizer

    try:
        ids: list[int] = Tokenizer.from_file(str(files["tokenizer.json"])).encode("a").ids
    except Exception as error:  # the library raises nothing narrower
        what = f"can't be read: {error}"
        raise ProblemReport([Problem(where=str(files["tokenizer.json"]), what=what, remedy=_FILES)]) from None
    return ids or None
