"""llama.cpp cuts text into the tokens that the checkpoint's own tokenizer cuts it into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, normalizers

from raymoe.errors import ProblemReport
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.export.gguf.pretokenizer import _TABLE, pre_tokenizer_name
from tests.export.gguf import tokenizers_made as made
from tests.export.gguf.llama import LlamaCpp
from tests.pico import REPOSITORY

pytestmark = pytest.mark.engines

GPT2 = [("bytes", "gpt2")]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def model(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    """A dense model of one layer, whose tokenizer a test may replace."""
    return Path(shutil.copytree(zoo("llama", num_hidden_layers=1), tmp_path / "model"))


def loaded(model: Path, **options: Any) -> LlamaCpp:
    return LlamaCpp(write_gguf(model, model / "model.gguf", GgufOptions(**options)).path)


@pytest.mark.parametrize(("steps", "whole_words", "name"), _TABLE, ids=[row[-1] for row in _TABLE])
def test_byte_level(steps: Any, whole_words: bool, name: str, model: Path) -> None:
    tokenizer = made.byte_level(steps, whole_words=whole_words)
    made.put(model, json_text=tokenizer.to_str(), **NAMES)
    found = loaded(model)
    for text in made.TEXTS:
        assert found.tokens(text, special=True) == tokenizer.encode(text).ids, text


def test_the_names_are_told_apart() -> None:
    assert len({(steps, whole_words) for steps, whole_words, _ in _TABLE}) == len(_TABLE)


def test_example_tokenizer_is_smollm() -> None:
    path = REPOSITORY / "models/SmolLM2-135M-Instruct/tokenizer.json"
    if not path.is_file():
        pytest.skip("the example model has not been made")
    assert pre_tokenizer_name(json.loads(path.read_text())) == "smollm"


@pytest.mark.parametrize("change", ["pattern", "normaliser"])
def test_unknown_cutting_is_refused(change: str, model: Path) -> None:
    tokenizer = made.byte_level([("split", r"\w+|\W"), ("bytes",)] if change == "pattern" else GPT2)
    if change == "normaliser":
        tokenizer.normalizer = normalizers.Lowercase()
    made.put(model, json_text=tokenizer.to_str(), **NAMES)
    with pytest.raises(ProblemReport, match=r"tokenizer\.json: raymoe does not know .* smollm.*\n.*--pre NAME"):
        write_gguf(model, model / "model.gguf")
    assert loaded(model, pre="gpt-2").tokens("a") == tokenizer.encode("a").ids


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("said", [True, False, None])
def test_bos(bos: bool, said: bool | None, model: Path) -> None:
    """Put before a text where the tokenizer's config says so, or else where its tokenizer.json does it.

    The name of this cutting is one for which llama.cpp does it by itself.
    """
    steps = next(steps for steps, _, name in _TABLE if name == "llama-bpe")
    tokenizer = made.byte_level(steps, whole_words=True, bos=bos)
    made.put(model, json_text=tokenizer.to_str(), **NAMES, **({} if said is None else {"add_bos_token": said}))
    with_bos = loaded(model).tokens("License", special=True)
    assert (with_bos[0] == 0) == (bos if said is None else said)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json", "both"])
def test_sentencepiece(kind: str, model: Path) -> None:
    proto = made.sentencepiece_model()
    json_text = made.sentencepiece_as_json(proto)
    made.put(
        model,
        model=proto if kind != "tokenizer.json" else None,
        json_text=json_text if kind != "tokenizer.model" else None,
        **NAMES,
    )
    found = loaded(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    for text in made.TEXTS:
        if "<s>" in text:  # SentencePiece reads this as text, transformers and llama.cpp as special tokens
            continue
        assert found.tokens(text) == processor.encode(text), text
    whole = Tokenizer.from_str(json_text).encode("License").ids
    assert found.tokens("License", special=True) == whole and whole[0] == 1


def test_no_space_before_the_text(model: Path) -> None:
    proto = made.sentencepiece_model(add_dummy_prefix=False)
    made.put(model, model=proto, **NAMES)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert loaded(model).tokens("The License") == processor.encode("The License")


def test_unigram_is_refused(model: Path) -> None:
    made.put(model, model=made.sentencepiece_model(model_type="unigram"))
    with pytest.raises(ProblemReport, match=r"tokenizer\.model: this tokenizer is neither byte-level BPE nor"):
        write_gguf(model, model / "model.gguf")


def test_chat_template(model: Path) -> None:
    assert loaded(model).chat("Hello") == "user: Hello\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer\.json: can't be read"),
        ("[]", r"this is no tokenizer\.json"),
        (
            '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}',
            r"this tokenizer\.json can't be read: .*vocab",
        ),
        ('{"model": {"type": "WordPiece", "vocab": {}}}', "neither byte-level BPE nor"),
    ],
)
def test_broken_tokenizers(content: str, message: str, model: Path) -> None:
    made.put(model, json_text=content)
    with pytest.raises(ProblemReport, match=message):
        write_gguf(model, model / "model.gguf", GgufOptions(pre="gpt-2"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: can't be read"),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}, "bos_token": ["<s>"]}', None),
        ("tokenizer.json", {"merges": [1, 2]}, "the gguf package can't read this tokenizer"),
        ("tokenizer.json", {"vocab": {}, "merges": []}, None),
        ("tokenizer.model", "no protobuf", r"tokenizer\.model: can't be read"),
    ],
)
def test_odd_files(name: str, content: Any, message: str | None, model: Path) -> None:
    """They are refused, or what can be read is taken, but none ends in a traceback."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    if isinstance(content, dict):
        tokenizer["model"] |= content
        content = json.dumps(tokenizer)
    elif name == "tokenizer.model":
        (model / "tokenizer.json").unlink()
    (model / name).write_text(content)
    if message is None:
        write_gguf(model, model / "model.gguf")
        return
    with pytest.raises(ProblemReport, match=message):
        write_gguf(model, model / "model.gguf")


def test_no_tokenizer(model: Path) -> None:
    made.put(model)
    with pytest.raises(ProblemReport, match=r"neither a tokenizer\.json nor a tokenizer\.model.*\n.*of the base model"):
        write_gguf(model, model / "model.gguf")


def test_tokens_without_embedding(zoo: Callable[..., Path], tmp_path: Path) -> None:
    model = zoo("llama", num_hidden_layers=1, vocab_size=200)
    with pytest.raises(ProblemReport, match="tokens up to id 399, but the embedding only 200 rows"):
        write_gguf(model, tmp_path / "model.gguf")


@pytest.mark.parametrize("where", [(), ("text_config",)], ids=["own", "text_config"])
def test_ids_below_zero_are_no_tokens(where: tuple[str, ...], model: Path) -> None:
    """Llama 1's config has pad_token_id -1. The file says what it says without the key."""
    config = json.loads((model / "config.json").read_text())
    for kind in ("bos", "eos"):  # the tokenizer's config says them
        config.pop(f"{kind}_token_id", None)
    (model / "config.json").write_text(json.dumps(config))
    plain = write_gguf(model, model / "plain.gguf", GgufOptions(name="m"))
    keys = {f"{kind}_token_id": -1 for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    keys["eos_token_id"] = [-1, -1]  # type: ignore[assignment]
    (model / "config.json").write_text(json.dumps({**config, **({"text_config": keys} if where else keys)}))
    written = write_gguf(model, model / "model.gguf", GgufOptions(name="m"))
    assert written.path.read_bytes() == plain.path.read_bytes()
    assert LlamaCpp(written.path).tokens("a")


@pytest.mark.parametrize("kind", ["byte level", "tokenizer.model"])
def test_added_tokens_without_a_row_are_left_out(kind: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Llama 2 with a <pad> that its embedding was never resized for."""
    model = Path(shutil.copytree(zoo("llama", num_hidden_layers=1, vocab_size=400), tmp_path / "model"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"}
    if kind == "byte level":
        tokenizer = made.byte_level(GPT2)
        tokenizer.add_special_tokens(["<|pad|>"])
        made.put(model, json_text=tokenizer.to_str(), **names)
    else:
        decoder = {"400": {"content": "<|pad|>", "special": True}}
        made.put(model, model=made.sentencepiece_model(), added_tokens_decoder=decoder, unk_token="<unk>", **names)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 400}))
    written = write_gguf(model, model / "model.gguf")
    (warning,) = [text for text in written.warnings if "400 rows" in text]
    assert "<|pad|> (id 400)" in warning and "left out" in warning
    found = LlamaCpp(written.path)
    assert max(found.tokens("a<|pad|>b")) < 400
    assert len(found.tokens("a<|pad|>b")) > 3, "it is ordinary text there"


def test_a_broken_tokenizer_is_named_by_its_file(model: Path) -> None:
    """Not by the first file of the folder."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [1, 2]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ProblemReport, match=r"^[^\n]*/tokenizer\.json: the gguf package can't read"):
        write_gguf(model, model / "model.gguf")
