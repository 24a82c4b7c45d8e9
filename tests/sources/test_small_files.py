"""Small files from outside: what is too large, too deep or more than it looks like is refused, at once and in words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymoe
from raymoe.architectures.dense_spec import DenseSpec, read_spec
from raymoe.checkpoints.open_checkpoint import read_object
from raymoe.errors import ProblemReport
from raymoe.export.gguf.vocabulary import read_vocabulary
from raymoe.planning import MergeOptions
from raymoe.report.inspect import inspect_checkpoint
from raymoe.report.source_metadata import parse_front_matter
from raymoe.runtime.start_errors import reject_job_server
from raymoe.sources.dtypes import tensor_nbytes
from raymoe.sources.facts import CheckpointIndex, SourceFile, TensorEntry
from raymoe.sources.folder_protocol import read_json_object
from raymoe.sources.local_folder import LocalFolder
from raymoe.sources.lora import adapter_facts
from raymoe.storage.output_files import FolderFiles
from raymoe.submit.job_server import _url
from raymoe.untrusted_files import MAX_VALUES, read_json, read_yaml
from tests.pico import copy_model, merge_config

DEEP = "[" * 100_000


def nested(levels: int) -> str:
    return '{"a":[' * (levels // 2) + "]}" * (levels // 2)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, nested(66), f'{{"a": {nested(900)}}}'])
def test_json_that_is_nested_too_deep(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested more than 64 deep"):
        read_json(text.encode())


def test_json_as_models_have_it() -> None:
    content = {"a": [1, 2.5, None, {"b": "ü,[{"}], "n": float("inf")}
    assert read_json(b"\xef\xbb\xbf" + json.dumps(content).encode()) == content
    assert read_json(nested(64)) is not None


@pytest.mark.parametrize("text", ["[" + "1," * MAX_VALUES + "1]", "9" * 5000, b"\xff", "{", ""])
def test_json_that_is_none_or_too_much(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        read_json(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\nb: *a", "alias"),
        ("a: {<<: {b: c}}", "merges mappings"),
        (f"a: {DEEP}", "nested more than 64 deep"),
        ("- " * 50_000 + "a", "nested more than 64 deep"),
        ("? [a]\n: b", "unhashable key"),
        ("a: b: c", "mapping values are not allowed"),
        ("- a\n" * 300_000, r"too many for such a file|more than 300,000 values"),
    ],
)
def test_yaml_that_stands_for_more_than_it_says(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_yaml(text)


def test_yaml_as_cards_have_it() -> None:
    text = "license: mit\nlanguage: [en, no]\nempty:\nnothing: null\nquoted: 'null'\nn: 1:1:1\nt: !x y\nl:\n- {a: b}\n"
    assert read_yaml(text) == {
        "license": "mit",
        "language": ["en", "no"],
        "empty": None,
        "nothing": None,
        "quoted": "null",
        "n": "1:1:1",
        "t": "y",
        "l": [{"a": "b"}],
    }
    assert read_yaml("") is None
    assert read_yaml("--- a\n--- b") == "a"


def test_both_of_yamls_parsers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: [1, {b: ~}]\nc: |\n  text\n  more\nd: ''\ne: &x z\n"
    found = read_yaml(text)
    monkeypatch.delattr(yaml, "CBaseLoader", raising=False)
    assert read_yaml(text) == found == {"a": ["1", {"b": None}], "c": "text\nmore\n", "d": "", "e": "z"}
    with pytest.raises(ValueError, match="merges mappings"):
        read_yaml("<<: {a: b}")


def test_a_card_whose_merges_double_with_each_line() -> None:
    """PyYAML expands them: 2 ** 60 here."""
    lines = "".join(f"l{n}: &l{n} {{<<: [*l{n - 1}, *l{n - 1}]}}\n" for n in range(1, 61))
    began = time.process_time()
    assert parse_front_matter(f"---\nlicense: mit\nl0: &l0 {{x: 1}}\n{lines}---\nhello\n") == {}
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_files_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(DEEP)
    for read in (read_json_object, lambda folder, name: read_object(folder, name, "", "")):
        with pytest.raises(ProblemReport, match=rf"{name}: .*nested more than 64 deep"):
            read(LocalFolder(str(tmp_path)), name)


def test_a_deep_record_does_not_keep_an_output_from_being_replaced(tmp_path: Path) -> None:
    (tmp_path / "raymoe.json").write_text(DEEP)
    (tmp_path / ".raymoe").mkdir()
    FolderFiles(tmp_path).remove_checkpoint()
    assert not (tmp_path / "raymoe.json").exists()


def test_a_deep_tokenizer_config(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Only whoever loads the tokenizer can say that it has no template."""
    base = copy_model(zoo("llama"), tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(DEEP)
    config: dict[str, Any] = merge_config(base, [zoo("llama", seed=1), base], mode="cheap_embed", chat_template=True)
    assert raymoe.plan(config).architecture == "mixtral"


def test_a_deep_header(tmp_path: Path, zoo: Callable[..., Path]) -> None:
    base = copy_model(zoo("llama"), tmp_path / "base")
    header = f'{{"w": {nested(900)}}}'.encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ProblemReport, match=r"header is not valid JSON: .*nested more than 64 deep"):
        raymoe.plan(merge_config(base, [base, zoo("llama", seed=1)], mode="random"))


EXPERTS = "model.layers.0.block_sparse_moe"


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "shape", "count"),
    [
        ("granitemoe", f"{EXPERTS}.input_linear.weight", "F32", [2**62, 0, 4], 2**62),
        ("granitemoe", f"{EXPERTS}.input_linear.weight", "F32", [0, 4, 4], 0),
        ("granitemoe", f"{EXPERTS}.input_linear.weight", "F32", [], 0),
        ("mixtral", f"{EXPERTS}.experts.{'1' * 900}.w1.weight", "F32", [2, 2], 0),
        ("mixtral", f"{EXPERTS}.experts.3.w1.weight", "F32", [2, 2], 1),
        *(("mixtral", f"{EXPERTS}.gate.weight", "F32", shape, 0) for shape in ([4], [2, 2, 2], [0, 2], [2, 0])),
        *(("mixtral", f"{EXPERTS}.gate.weight", dtype, [2, 2], 0) for dtype in ("I64", "F8_E4M3")),
    ],
)
def test_experts_and_routers_that_are_none(
    kind: str, name: str, dtype: str, shape: list[int], count: int, tmp_path: Path
) -> None:
    size = tensor_nbytes(dtype, shape)
    assert size is not None
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    found = inspect_checkpoint(tmp_path)
    assert (found["experts"], found["routers"]) == (count, {"layers": 0})


@pytest.mark.parametrize("layers", [10**12, 10**30, 10_001])
def test_layers_that_no_model_has(layers: int) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    problems = read_spec({"model_type": "llama", "num_hidden_layers": layers, **sizes}, "m")
    assert not isinstance(problems, DenseSpec)
    assert problems[0].what == f"num_hidden_layers is {layers}"
    assert isinstance(read_spec({"model_type": "llama", "num_hidden_layers": 10, **sizes}, "m"), DenseSpec)


@pytest.mark.parametrize(
    "options", [{"max_shard_bytes": "x"}, {"seed": True}, {"quantize_gates": {"a": 1}}, {"strict": "no"}]
)
def test_options_of_a_record(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} is "):
        MergeOptions(**options)


def test_addresses_that_are_none() -> None:
    for ask in (_url, reject_job_server):
        with pytest.raises(ProblemReport, match="address of a"):
            ask("http://[::1")


def test_a_record_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raymoe.json").write_text('{"files": ["a"]}')
    assert FolderFiles(tmp_path).recorded_files() == ["a"]
    monkeypatch.setattr("raymoe.storage.output_files.MAX_JSON_BYTES", 10)
    assert FolderFiles(tmp_path).recorded_files() == []


STEP = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def vocabulary(folder: Path, vocab: dict[str, Any], **others: Any) -> tuple[str, ...]:
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": STEP, "decoder": STEP}
    tokenizer |= {"post_processor": None, "model": {"type": "BPE", "vocab": vocab, "merges": []}, **others}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    return read_vocabulary({path.name: path}, {}, 2, pre="gpt-2", name="m", label="m").tokens


@pytest.mark.parametrize("number", ["x", None, 0.5, -5])
def test_ids_of_tokens_that_are_no_numbers(number: Any, tmp_path: Path) -> None:
    with pytest.raises(ProblemReport, match=r"this tokenizer.json can't be read: ValueError the token 'b' has the id"):
        vocabulary(tmp_path, {"a": 0, "b": number})
    with pytest.raises(ProblemReport, match=r"this tokenizer.json can't be read: ValueError the token 'b' has the id"):
        vocabulary(tmp_path, {"a": 0}, added_tokens=[{"id": number, "content": "b", "special": True}])


def test_a_truncation_that_makes_the_library_panic(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    step = {**STEP, "add_prefix_space": True}
    found = vocabulary(tmp_path, {"a": 0, "\u0120": 1}, truncation=truncation, pre_tokenizer=step)
    assert found == ("a", "\u0120")


def test_a_normalizer_that_makes_the_library_panic(tmp_path: Path) -> None:
    with pytest.raises(ProblemReport, match=r"tokenizer.json: can't be read: "):
        vocabulary(tmp_path, {"a": 0}, normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "xxxx"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"modules_to_save": 5}, "modules_to_save in .* names 5"), ({"lora_alpha": 10**400}, "'lora_alpha' in .* is 10")],
)
def test_settings_of_an_adapter(changes: dict[str, Any], words: str) -> None:
    entry = TensorEntry(name="w", dtype="F32", shape=(1,), file=SourceFile(location="/m", size=4), start=0, end=4)
    index = CheckpointIndex(files=(entry.file,), tensors={"w": entry})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **changes}
    with pytest.raises(ProblemReport, match=words):
        adapter_facts("m", None, config, CheckpointIndex(files=(), tensors={}), index)
