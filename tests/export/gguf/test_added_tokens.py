"""Tokens that a tokenizer has besides its vocabulary are those of the file too, with the same text around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from raymoe.errors import ProblemReport
from raymoe.export.gguf import GgufOptions, write_gguf
from tests.export.gguf import tokenizers_made as made
from tests.export.gguf.llama import LlamaCpp

pytestmark = pytest.mark.engines

TURN = ("<|im_start|>", "<|im_end|>", "<tool>")
CHATS = (
    "<|im_start|>user\nThe License<|im_end|>\n<|im_start|>assistant\n",
    "a <|im_end|> b<tool>c <tool> d",
    "<s><|im_start|>  two",
)
NAMES = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
# Whose spaces are those of llama.cpp.
PLAIN = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}


@pytest.fixture
def model(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    """A dense model of one layer, whose tokenizer a test may replace."""
    return Path(shutil.copytree(zoo("llama", num_hidden_layers=1), tmp_path / "model"))


def by_id(texts: Sequence[str] = TURN, first: int = 400, **flags: Any) -> dict[str, Any]:
    """`added_tokens_decoder` of these texts, of which those in angles with bars are special."""
    usual = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {
        str(number): {"content": text, "special": "|" in text, **usual, **flags}
        for number, text in enumerate(texts, first)
    }


def fields_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def test_are_read_beside_a_tokenizer_model(model: Path) -> None:
    made.put(model, model=made.sentencepiece_model(), added_tokens_decoder=by_id(), **NAMES, **PLAIN)
    written = write_gguf(model, model / "model.gguf")
    fields = fields_of(written.path)
    assert fields["tokenizer.ggml.tokens"][400:403] == list(TURN)
    assert fields["tokenizer.ggml.token_type"][400:403] == [3, 3, 4]
    assert fields["tokenizer.ggml.eos_token_id"] == 401
    assert not written.warnings
    tokenizer, found = AutoTokenizer.from_pretrained(model), LlamaCpp(written.path)
    for text in CHATS:
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert found.tokens(text) == expected, text
    assert 401 in found.tokens(CHATS[0])


@pytest.mark.parametrize("beside", ["tokenizer_config.json", "special_tokens_map.json"])
def test_are_read_as_older_transformers_wrote_them(beside: str, model: Path) -> None:
    """By text, and special where the tokenizer's config names them."""
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    in_config = special if beside == "tokenizer_config.json" else {"eos_token": "</s>"}
    made.put(model, model=made.sentencepiece_model(), **{**NAMES, **PLAIN, **in_config})
    (model / "added_tokens.json").write_text(json.dumps({text: 400 + n for n, text in enumerate(TURN)}))
    if beside == "special_tokens_map.json":
        (model / beside).write_text(json.dumps(special))
    written = write_gguf(model, model / "model.gguf")
    fields = fields_of(written.path)
    assert fields["tokenizer.ggml.tokens"][400:403] == list(TURN)
    assert fields["tokenizer.ggml.token_type"][400:403] == [3, 3, 4]
    assert fields["tokenizer.ggml.eos_token_id"] == 401
    tokenizer, found = AutoTokenizer.from_pretrained(model), LlamaCpp(written.path)
    for text in CHATS:
        assert found.tokens(text) == tokenizer.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize(
    ("by_text", "decoder", "message"),
    [
        ({"<a>": 400, "<b>": 400}, {}, r"added_tokens\.json: token 400 is both '<a>' and '<b>'\n.*leave the right one"),
        ({"<a>": 400}, by_id(["<b>"]), r"tokenizer_config\.json: token 400 is both '<a>' and '<b>'"),
        ({}, by_id(["<x>"], 5), r"tokenizer\.model: token 5 is both '<0x02>' and '<x>'"),
        ({"<a>": "400"}, {}, r"added_tokens\.json: added_tokens\.json has an entry that is not a token with an id"),
        ({"<a>": -1}, {}, "not a token with an id"),
        (
            {},
            {"one": {"content": "<a>"}},
            r"tokenizer_config\.json: added_tokens_decoder has an entry that is not a token",
        ),
        ({}, {"400": {"special": True}}, "added_tokens_decoder has an entry"),
        ({}, ["<a>"], "added_tokens_decoder has an entry"),
        (["<a>"], {}, r"added_tokens\.json: this is no added_tokens\.json"),
    ],
)
def test_what_is_no_tokens_is_refused(by_text: Any, decoder: Any, message: str, model: Path) -> None:
    made.put(model, model=made.sentencepiece_model(), added_tokens_decoder=decoder, **NAMES)
    (model / "added_tokens.json").write_text(json.dumps(by_text))
    with pytest.raises(ProblemReport, match=message):
        write_gguf(model, model / "model.gguf")


def test_thousands_of_entries_that_are_no_tokens(model: Path) -> None:
    made.put(model, model=made.sentencepiece_model(), **NAMES)
    (model / "added_tokens.json").write_text(json.dumps({f"<{number}>": -1 for number in range(5000)}))
    with pytest.raises(ProblemReport) as caught:
        write_gguf(model, model / "model.gguf")
    assert [problem.what for problem in caught.value.problems] == [
        "added_tokens.json has an entry that is not a token with an id",
        "and more problems of this kind",
    ]


def test_both_files_may_say_the_same(model: Path) -> None:
    made.put(model, model=made.sentencepiece_model(), added_tokens_decoder=by_id(), **NAMES, **PLAIN)
    (model / "added_tokens.json").write_text(json.dumps({text: 400 + n for n, text in enumerate(TURN)}))
    assert fields_of(write_gguf(model, model / "m.gguf").path)["tokenizer.ggml.token_type"][400:403] == [3, 3, 4]


# --- the space around them


def put_with(model: Path, added: Sequence[dict[str, Any]], **config: Any) -> Tokenizer:
    """A tokenizer.json of SentencePiece's kind with more added tokens, from id 400 on."""
    content = json.loads(made.sentencepiece_as_json(made.sentencepiece_model()))
    content["added_tokens"] += [{"id": number, **token} for number, token in enumerate(added, 400)]
    text = json.dumps(content)
    made.put(model, json_text=text, bos_token="<s>", eos_token="</s>", **config)
    return Tokenizer.from_str(text)


def phi3(*, all_of_them: bool) -> list[dict[str, Any]]:
    """Phi-3's added tokens: space after most of them goes with them."""
    stripping = by_id(["<|user|>", "<|end|>"], rstrip=True, special=True).values()
    return [*by_id(["<|endoftext|>"], special=True).values(), *stripping] if all_of_them else list(stripping)


PHI3_CHATS = ("<|user|>\nThe License<|end|>\n<|user|>  \n", "<s> a <|endoftext|> b <unk> c", "<|end|>a <|end|> b")


def test_space_behind_tokens_goes_in_a_file_of_phi3s_name(model: Path) -> None:
    """llama.cpp does it for this name, to all special tokens but three: `</s>` has to lose it too."""
    tokenizer = put_with(model, phi3(all_of_them=True))
    content = json.loads(tokenizer.to_str())
    next(token for token in content["added_tokens"] if token["content"] == "</s>")["rstrip"] = True
    (model / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    other = write_gguf(model, model / "other.gguf")
    (warning,) = other.warnings
    wanted = "space after </s>, <|end|>, <|user|> is stripped in transformers, and kept in llama.cpp; a --name"
    assert warning.startswith(wanted)
    named = write_gguf(model, model / "mixture.gguf", GgufOptions(name="Two Phi-3 minis"))
    assert not named.warnings
    found, differs = LlamaCpp(named.path), LlamaCpp(other.path)
    for text in PHI3_CHATS:
        assert found.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
    ids = tokenizer.encode(PHI3_CHATS[0], add_special_tokens=False).ids
    assert differs.tokens(PHI3_CHATS[0]) != ids, "the warning is true"


def test_other_tokens_whose_space_goes_are_named(model: Path) -> None:
    added = [
        *by_id(["<|a|>", "<|b|>"], rstrip=True).values(),
        *by_id(["<|mask|>"], lstrip=True).values(),
        *by_id(["<|c|>"]).values(),
    ]
    tokenizer = put_with(model, added)
    written = write_gguf(model, model / "model.gguf")
    left, right = written.warnings
    assert left == "space before <|mask|> is stripped in transformers, and kept in llama.cpp"
    assert right == "space after <|a|>, <|b|> is stripped in transformers, and kept in llama.cpp"
    found = LlamaCpp(written.path)
    for text, same in (("a<|a|> b", False), ("a <|mask|>b", False), ("a <|c|> b", True), ("a<|a|>b<|mask|> c", True)):
        assert (found.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids) == same, text


def test_a_name_like_phi3s_takes_space_that_stays(model: Path) -> None:
    tokenizer = put_with(model, [*by_id(["<|endoftext|>", "<|c|>"], special=True).values()])
    assert not write_gguf(model, model / "plain.gguf").warnings
    written = write_gguf(model, model / "phi3-like.gguf")
    (warning,) = written.warnings
    assert warning.startswith("the name 'phi3-like' makes llama.cpp strip the space after </s>, <|c|>, which")
    found = LlamaCpp(written.path).tokens("a <|c|> b")
    assert found != tokenizer.encode("a <|c|> b", add_special_tokens=False).ids


def test_a_name_like_phi3s_without_its_tokens(model: Path) -> None:
    """llama.cpp would not load the file."""
    put_with(model, phi3(all_of_them=False))
    with pytest.raises(ProblemReport, match=r"takes the name 'Phi-3' for .* without <\|endoftext\|>\n.*--name NAME"):
        write_gguf(model, model / "Phi-3.gguf")
    assert write_gguf(model, model / "Phi-3.gguf", GgufOptions(name="mine")).path.is_file()
