"""Reads prompts with the tokenizers library alone, where transformers would do nothing else.

    tokenizer.json           the tokens and the pipeline, which the library reads
    tokenizer_config.json    the class, which decides whether transformers takes the pipeline as it is; the BOS token

Importing transformers takes a second of processor time on a laptop and several on hosts with slow disks, in each actor.
Two kinds of classes are read here: those that take tokenizer.json as it is, and Qwen2's, if the pipeline of
tokenizer.json is the one that transformers 5 builds for it. `plain_prompt_tokenizer` is None for all others: settings
that are not known here, tokens that transformers would add, code of the tokenizer's own, sentencepiece models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raymoe.errors import ProblemReport
from raymoe.sources.tokenizer_files import plain_tokenizer, tokenizer_code
from raymoe.storage.file_names import json_object

_TOKENIZER, _CONFIG, _SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# Other files of tokenizers: beside tokenizer.json, transformers reads these for other classes only, or as templates.
_UNREAD_FILES = ("chat_template.jinja", "chat_template.json", "merges.txt", "vocab.json", "generation_config.json")
_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Settings that do not change the token ids of a text that is encoded without special tokens.
_HARMLESS = (
    *("tokenizer_class", "chat_template", "model_max_length", "model_input_names", "padding_side", "truncation_side"),
    *("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "errors", "backend", "is_local"),
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "local_files_only"),
    *("added_tokens_decoder", "add_prefix_space", "split_special_tokens"),
)
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_AS_STORED = ("PreTrainedTokenizerFast", "TokenizersBackend")
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}


class PlainTokenizer:
    """The part of transformers' tokenizers that prompts need.

    Attributes:
        bos_token: The BOS token; None if there is none.
        bos_token_id: Its id.
        chat_template: None: prompts in a chat template are left to transformers.
    """

    chat_template = None

    def __init__(self, tokenizer: Any, bos: str | None) -> None:
        self._tokenizer = tokenizer
        self.bos_token, self.bos_token_id = bos, tokenizer.token_to_id(bos) if bos else None

    def __call__(self, texts: Sequence[str], **_: Any) -> Mapping[str, list[list[int]]]:
        """Token ids of each text under `input_ids`, without special tokens before or after it."""
        return {"input_ids": [e.ids for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]}

    def convert_ids_to_tokens(self, token: int) -> str | None:
        text: str | None = self._tokenizer.id_to_token(token)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def plain_prompt_tokenizer(paths: Mapping[str, Path]) -> PlainTokenizer | None:
    """The tokenizer with files at `paths`, if the tokenizers library reads prompts as transformers does.

    Args:
        paths: The tokenizer's files, by their names in its model's folder.

    Returns:
        None if only transformers can say how a text is read, or what is wrong with a file.

    Example:
        >>> plain_prompt_tokenizer({"tokenizer.json": path})
    """
    if not {_TOKENIZER, _CONFIG} <= paths.keys():
        return None
    if set(paths) - {_TOKENIZER, _CONFIG, _SPECIAL, *_UNREAD_FILES} - {name for name in paths if "/" in name}:
        return None
    settings, special = (json_object(paths[name].read_bytes()) if name in paths else {} for name in (_CONFIG, _SPECIAL))
    if settings.get("tokenizer_class") not in (*_AS_STORED, *_QWEN2):
        return None
    try:
        tokenizer = plain_tokenizer(paths[_TOKENIZER].read_bytes(), str(paths[_TOKENIZER]))
        if not _is_as_stored(tokenizer, settings) or any(_changes(tokenizer, settings, special)):
            return None
    except (ProblemReport, ValueError, TypeError, LookupError, AttributeError):  # transformers reports damaged files
        return None
    bos = settings.get("bos_token")
    return PlainTokenizer(tokenizer, _text(bos) if bos else None)


def _is_as_stored(tokenizer: Any, settings: Mapping[str, Any]) -> bool:
    """Whether the class takes the pipeline of tokenizer.json, or builds the same."""
    if settings["tokenizer_class"] in _AS_STORED:
        return True
    normalizer, before, model = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer), tokenizer.model
    *splits, last = before["pretokenizers"]
    named = {_text(token) for token in _special_tokens(settings)}
    return (
        all(
            settings.get(key) is not None for key in ("eos_token", "pad_token", "unk_token")
        )  # no defaults of the class
        and normalizer == {"type": "NFC"}
        and splits == [_QWEN2_SPLIT]
        and (last["type"], last["add_prefix_space"], last["use_regex"]) == ("ByteLevel", False, False)
        and type(model).__name__ == "BPE"
        and not any((model.dropout, model.unk_token, model.fuse_unk, model.byte_fallback, model.ignore_merges))
        and not any((model.continuing_subword_prefix, model.end_of_word_suffix))
        # The class adds them again, with these flags.
        and all(
            t.special and not t.normalized and not t.lstrip and not t.rstrip and not t.single_word
            for t in tokenizer.get_added_tokens_decoder().values()
            if t.content in named
        )
    )


def _state(part: Any) -> Mapping[str, Any]:
    """A part of a pipeline, as it is in tokenizer.json."""
    return json_object(part.__getstate__()) if part is not None else {}


def _changes(tokenizer: Any, settings: Mapping[str, Any], special: Mapping[str, Any]) -> Iterator[bool]:
    """Whether each of several things makes transformers' tokenizer another one than that of tokenizer.json."""
    yield any(tokenizer_code(settings))
    yield bool(settings.keys() - {*_HARMLESS, *_NAMED_TOKENS, *_TOKEN_LISTS})
    yield bool(settings.get("split_special_tokens"))
    prefix = _state(tokenizer.pre_tokenizer).get("add_prefix_space")
    yield prefix is not None and prefix is not bool(settings.get("add_prefix_space"))
    # The file of older tokenizers, which goes before tokenizer_config.json in some versions.
    yield any(not _is_same(special[key], settings.get(key)) for key in special)
    by_id = tokenizer.get_added_tokens_decoder()
    added = {token.content: token for token in by_id.values()}
    yield any(not _is_added(value, added) for value in (*_special_tokens(settings), *_special_tokens(special)))
    listed = settings.get("added_tokens_decoder") or {}
    yield any(not _is_added(value, added) or by_id[int(n)].content != _text(value) for n, value in listed.items())


def _special_tokens(settings: Mapping[str, Any]) -> Iterator[Any]:
    yield from (settings[key] for key in _NAMED_TOKENS if settings.get(key) is not None)
    for key in _TOKEN_LISTS:
        values = settings.get(key) or ()
        yield from values.values() if isinstance(values, Mapping) else values


def _text(token: Any) -> str:
    text: str = token["content"] if isinstance(token, Mapping) else token
    return text


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return list(map(_text, one)) == list(map(_text, other))
    return other is not None and _text(one) == _text(other)


def _is_added(token: Any, added: Mapping[str, Any]) -> bool:
    """Whether a token is among those of tokenizer.json, with the same flags."""
    if _text(token) not in added:
        return False
    found = added[_text(token)]
    return not isinstance(token, Mapping) or all(
        token[flag] == getattr(found, flag) for flag in _FLAGS if flag in token
    )
