"""The space before a text is put where the checkpoint's tokenizer puts it, or the difference is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raymoe.export.gguf import write_gguf
from raymoe.export.gguf.space_prefix import space_prefix
from tests.export.gguf import tokenizers_made as made
from tests.export.gguf.llama import LlamaCpp

pytestmark = pytest.mark.engines

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
FIRST = "transformers adds it before the text only, and none if the text begins with one"
ALWAYS = "transformers adds none where there is one already"
# Texts, and whether transformers and llama.cpp cut each as the other does: always, where a space is put only before the
# text, where none is put beside another.
TEXTS = {
    "License": (True, True),
    "The License</s>": (True, True),
    "<s>License": (False, True),
    "a</s>b": (False, True),
    " License": (False, False),
    "<s> License": (False, False),
}


def as_json(scheme: str) -> str:
    """The tokenizer.json of a tokenizer.model, with a normaliser that puts the space, or a Metaspace of this scheme."""
    content = json.loads(made.sentencepiece_as_json(made.sentencepiece_model()))
    if scheme != "normaliser":
        content["normalizer"] = None
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        content["pre_tokenizer"] = metaspace
    return json.dumps(content)


def cases() -> Iterator[Any]:
    """(tokenizer.model, scheme of tokenizer.json, config, what is told)."""
    never = {"add_prefix_space": False}
    yield True, None, {**LLAMA, **never}, ""
    yield True, None, {**LLAMA, **never, "legacy": True}, ""
    yield True, "normaliser", {**LLAMA, **never}, ""
    yield False, "normaliser", {**LLAMA, **never}, ""
    yield True, None, {**LLAMA, "add_prefix_space": True}, FIRST
    yield True, None, {**LLAMA, "add_prefix_space": True, "legacy": True}, ALWAYS
    yield True, None, LLAMA, FIRST
    yield True, "normaliser", {**LLAMA, "legacy": True}, ALWAYS
    yield False, "first", {**LLAMA, "legacy": False}, FIRST
    # A class that is not made anew does what the file says, whatever else is said.
    for said in ({}, {"add_prefix_space": True}, never):
        yield False, "normaliser", {**GENERIC, **said}, ""
        yield True, "never", {**GENERIC, **said}, ""
    yield True, "first", {}, FIRST
    yield False, "always", GENERIC, ALWAYS


def cases_of_mistral() -> Iterator[Any]:
    """The same for a model type whose tokenizer.json counts, and not the class that the config names."""
    for said in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}, {"legacy": False}):
        yield True, "normaliser", {**LLAMA, **said}, ""
        yield False, "never", {**LLAMA, **said}, ""
        yield True, "first", {**LLAMA, **said}, FIRST


@pytest.mark.parametrize(
    ("family", "with_model", "scheme", "config", "told"),
    [*(("llama", *case) for case in cases()), *(("mistral", *case) for case in cases_of_mistral())],
)
def test_as_in_transformers(
    family: str,
    with_model: bool,
    scheme: str | None,
    config: dict[str, Any],
    told: str,
    zoo: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = Path(shutil.copytree(zoo(family, num_hidden_layers=1), tmp_path / "model"))
    made.put(
        model,
        model=made.sentencepiece_model() if with_model else None,
        json_text=as_json(scheme) if scheme else None,
        **NAMES,
        **config,
    )
    written = write_gguf(model, tmp_path / "model.gguf")
    warnings = [warning for warning in written.warnings if "puts a space" in warning]
    assert [warning.partition("; ")[2] for warning in warnings] == ([told] if told else [])
    tokenizer, found = AutoTokenizer.from_pretrained(model), LlamaCpp(written.path)
    for text, (same_if_first, same_if_always) in TEXTS.items():
        same = {"": True, FIRST: same_if_first, ALWAYS: same_if_always}[told]
        assert (found.tokens(text) == tokenizer.encode(text, add_special_tokens=False)) == same, text


@pytest.mark.parametrize("of_model", [True, False])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_tokenizer_model_alone(said: bool | None, of_model: bool) -> None:
    """By its own flag, where the config has none."""
    config = {} if said is None else {"add_prefix_space": said}
    assert space_prefix(config, {}, of_model, "mixtral").is_added is (of_model if said is None else said)


def test_a_tokenizer_json_goes_before_the_tokenizer_model() -> None:
    assert not space_prefix(LLAMA, json.loads(as_json("never")), True, "llama").is_added
    assert space_prefix(LLAMA, json.loads(as_json("first")), False, "llama").is_added
