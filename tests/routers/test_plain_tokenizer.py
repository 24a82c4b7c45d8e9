"""Prompts that are read without transformers: the same token ids, for all kinds of tokenizers that are read so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from raymoe.planning.owner import Owner
from raymoe.routers.plain_tokenizer import plain_prompt_tokenizer
from raymoe.routers.tokenize import load_tokenizer, prompt_tokenizer, tokenize
from tests.export.gguf.tokenizers_made import TEXTS, byte_level, put, sentencepiece_as_json, sentencepiece_model

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
STORED = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
OF_QWEN2 = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def gpt2() -> str:
    text: str = byte_level([("bytes", "gpt2")]).to_str()
    return text


def digits() -> str:
    tokenizer = byte_level([("digits",), ("bytes", "gpt2")], bos=True)
    tokenizer.add_tokens([AddedToken("isn't it", lstrip=True, single_word=False)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=2, pad_token="<pad>", length=9)
    text: str = tokenizer.to_str()
    return text


def qwen2(pattern: str = QWEN2) -> str:
    tokenizer = byte_level([("bytes",)])
    tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    text: str = tokenizer.to_str()
    return text


def with_prefix_space() -> str:
    tokenizer = Tokenizer.from_str(gpt2())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text: str = tokenizer.to_str()
    return text


def paths_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def ids(tokenizer: Any) -> list[list[int]]:
    return tokenize(tokenizer, TEXTS, vocab=1 << 20, owner=Owner.expert(0))


@pytest.mark.parametrize(
    ("content", "config"),
    [
        (gpt2, STORED),
        pytest.param(
            gpt2,
            {**STORED, "tokenizer_class": "TokenizersBackend", "add_bos_token": True, "model_max_length": 3},
            marks=pytest.mark.skipif(not hasattr(transformers, "TokenizersBackend"), reason="transformers 4"),
        ),
        (gpt2, {**STORED, "bos_token": None}),
        (digits, {**STORED, "added_tokens_decoder": {"0": {"content": "<s>", **FLAGS}}}),
        (digits, {**STORED, "eos_token": {"content": "</s>", "__type": "AddedToken", **FLAGS}}),
        (sentencepiece_as_json, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}),
        (with_prefix_space, {**STORED, "add_prefix_space": True}),
        (qwen2, OF_QWEN2),
        (qwen2, {**OF_QWEN2, "tokenizer_class": "Qwen2TokenizerFast", "additional_special_tokens": ["<s>"]}),
    ],
)
def test_the_same_ids_as_of_transformers(content: Any, config: Mapping[str, Any], tmp_path: Path) -> None:
    text = content(sentencepiece_model()) if content is sentencepiece_as_json else content()
    put(tmp_path, json_text=text, **config)
    plain, whole = plain_prompt_tokenizer(paths_of(tmp_path)), load_tokenizer(tmp_path, trust_remote_code=False)
    assert plain is not None
    assert ids(plain) == ids(whole) and any(map(len, ids(plain)))
    assert plain.bos_token == whole.bos_token
    assert plain.bos_token_id == (whole.bos_token_id if whole.bos_token else None)
    assert plain.convert_ids_to_tokens(7) == whole.convert_ids_to_tokens(7)


@pytest.mark.parametrize(
    ("content", "config"),
    [
        (gpt2, {**NAMED}),  # the class is the model's
        (gpt2, {**STORED, "tokenizer_class": "LlamaTokenizer"}),
        (gpt2, {**STORED, "bos_token": "<begin>"}),  # transformers adds it
        (gpt2, {**STORED, "split_special_tokens": True}),
        (gpt2, {**STORED, "from_slow": True}),
        (gpt2, {**STORED, "additional_special_tokens": ["<more>"]}),
        (gpt2, {**STORED, "added_tokens_decoder": {"0": {"content": "<s>", **FLAGS, "lstrip": True}}}),
        (gpt2, {**STORED, "added_tokens_decoder": {"1": {"content": "<s>", **FLAGS}}}),
        (gpt2, {**STORED, "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}),
        (with_prefix_space, STORED),  # transformers 4 takes the space away
        (lambda: qwen2(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), OF_QWEN2),
        (qwen2, {**OF_QWEN2, "unk_token": None}),  # the class has one
        (gpt2, OF_QWEN2),
        (lambda: "{}", STORED),
    ],
)
def test_others_are_left_to_transformers(content: Any, config: Mapping[str, Any], tmp_path: Path) -> None:
    put(tmp_path, json_text=content(), **config)
    assert plain_prompt_tokenizer(paths_of(tmp_path)) is None


def test_files_that_transformers_reads_too(tmp_path: Path) -> None:
    put(tmp_path, json_text=gpt2(), **STORED)
    assert plain_prompt_tokenizer(paths_of(tmp_path)) is not None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>", **FLAGS}}))
    assert plain_prompt_tokenizer(paths_of(tmp_path)) is not None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>"}))
    assert plain_prompt_tokenizer(paths_of(tmp_path)) is None
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "added_tokens.json").write_text("{}")
    assert plain_prompt_tokenizer(paths_of(tmp_path)) is None


def test_sentencepiece_models_and_templates_are_left_to_transformers(tmp_path: Path) -> None:
    put(tmp_path, json_text=gpt2(), **STORED, chat_template="{{ messages[0]['content'] }}")
    arguments = {"trust_remote_code": False, "with_template": True}
    assert prompt_tokenizer(paths_of(tmp_path), **arguments).chat_template
    assert prompt_tokenizer(paths_of(tmp_path), **{**arguments, "with_template": False}).chat_template is None
    put(tmp_path, model=sentencepiece_model(), tokenizer_class="LlamaTokenizer", legacy=True)
    assert plain_prompt_tokenizer(paths_of(tmp_path)) is None
