"""What a tokenizer's files say without transformers: its own code, its tokens, BOS."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import ProblemReport
from raymoe.sources.facts import ModelFacts, SideFile, SourceFile
from raymoe.sources.resolve import fetch_file, resolve_model
from raymoe.sources.tokenizer_files import tokenizer_code, tokenizer_facts, with_bos, with_one_bos, with_tokenizer_code
from tests.pico import save_tokenizer

Make = Callable[..., Path]


def read(file: SourceFile) -> bytes:
    return fetch_file(file).read_bytes()


def facts_of(folder: Path) -> ModelFacts:
    return with_tokenizer_code(resolve_model(parse_model_ref(str(folder))), read)


@pytest.mark.parametrize(
    ("auto_map", "found"),
    [
        (None, ([], [])),
        ({"AutoTokenizer": ["slow_own.Slow", None]}, (["slow_own"], [])),
        ({"AutoTokenizer": [None, "own.Fast"], "AutoModel": "modeling.M"}, (["own"], [])),
        ({"AutoTokenizer": "own.Fast"}, (["own"], [])),
        (["own.Slow", "own.Fast"], (["own"], [])),
        ({"AutoTokenizer": ["org/name--own.Slow", "org/name--own.Fast"]}, ([], ["org/name"])),
        ({"AutoTokenizer": ["../evil.X", "/etc/evil.X", 3]}, ([], [])),
        ("own.Fast", (["own"], [])),
        ({"AutoTokenizer": {"a": 1}}, ([], [])),
    ],
)
def test_which_code_it_names(auto_map: Any, found: tuple[list[str], list[str]]) -> None:
    assert tokenizer_code({"auto_map": auto_map}) == found


def test_code_travels_with_what_it_imports(make_model: Make) -> None:
    """Modules of the folder alone, and no others that lie there."""
    folder = make_model()
    save_tokenizer(folder)
    settings = {"auto_map": {"AutoTokenizer": ["own.Slow", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        "import os\nfrom .config_own import X\n    from .own import Y\nfrom .gone import Z\n"
    )
    (folder / "config_own.py").write_text("from .own import Slow\n")
    (folder / "modeling_own.py").write_text("")
    facts = facts_of(folder)
    assert [side.name for side in facts.side_files if side.name.endswith(".py")] == ["config_own.py", "own.py"]
    assert [w for w in facts.warnings if "needs gone.py, which is not there" in w] == list(facts.warnings)


def test_code_of_the_hub(make_model: Make) -> None:
    folder = make_model()
    settings = {"auto_map": {"AutoTokenizer": ["org/name--own.Slow", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    facts = facts_of(folder)
    assert "has code of org/name on the Hub" in facts.warnings[0]
    assert tokenizer_facts(facts.side_files, read).has_code


def test_tokens(make_model: Make) -> None:
    folder = make_model()
    save_tokenizer(folder)
    found = tokenizer_facts(facts_of(folder).side_files, read)
    assert found.tokens is not None
    assert (found.tokens[0], found.bos, found.has_code) == ("<s>", "<s>", False)
    assert found.may_exceed(max(found.tokens)) and not found.may_exceed(max(found.tokens) + 1)
    encode = found.encoder()
    assert encode is not None
    assert encode("<s>a")[0] == 0 and len(encode("<s>a")) == 2
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"1000": {"content": "<late>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_facts(facts_of(folder).side_files, read).may_exceed(1000)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_damaged_tokenizer_shows_nothing(make_model: Make, content: str) -> None:
    """Encoding with it says what is wrong with it."""
    folder = make_model()
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text(content)
    found = tokenizer_facts(facts_of(folder).side_files, read)
    assert found.tokens is None and found.may_exceed(10**9)
    with pytest.raises(ProblemReport, match=r"tokenizer\.json: the tokenizer can't be read: "):
        found.encoder()


@pytest.mark.parametrize(
    ("settings", "special", "bos"),
    [
        ({"bos_token": "<s>"}, {}, "<s>"),
        ({"bos_token": {"content": "<s>"}}, {"bos_token": "<b>"}, "<s>"),
        ({"bos_token": None}, {"bos_token": "<b>"}, "<b>"),
        ({"bos_token": None, "tokenizer_class": "Qwen2Tokenizer"}, {}, ""),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, ""),
        ({"tokenizer_class": "LlamaTokenizer"}, {}, None),
        ({}, {}, None),
        ({"bos_token": None, "auto_map": {"AutoTokenizer": "own.Fast"}}, {}, None),
    ],
)
def test_bos(make_model: Make, settings: dict[str, Any], special: dict[str, Any], bos: str | None) -> None:
    """None where the tokenizer's class may have one that its files do not name."""
    folder = make_model()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert tokenizer_facts(facts_of(folder).side_files, read).bos == bos


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", "<s>a"), (" a", "<s> a"), ("<s>a", "<s>a"), ("\n <s>a", "<s>a"), ("<s><s> <s>a", "<s>a"), ("", "<s>")],
)
def test_one_bos(text: str, expected: str) -> None:
    assert with_one_bos(text, "<s>") == expected
    assert with_one_bos(text, "") == with_bos(text, "") == text
    # A prompt is the user's own text: nothing is taken away from it.
    assert with_bos(text, "<s>") == (text if text.startswith("<s>") else "<s>" + text)


@pytest.mark.processes
def test_no_torch(make_model: Make) -> None:
    folder = make_model()
    save_tokenizer(folder)
    script = (
        "import sys; from raymoe.sources.tokenizer_files import *; from raymoe.sources.resolve import *; "
        "from raymoe.config.model_refs import parse_model_ref as p; facts = resolve_model(p(sys.argv[1])); "
        "found = tokenizer_facts(facts.side_files, lambda file: fetch_file(file).read_bytes()); "
        "print(len(found.encoder()('abc')) > 0, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"


def test_code_that_imports_many_modules(make_model: Make) -> None:
    folder = make_model()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Slow", None]}}))
    (folder / "own.py").write_text("\n" * 500_000 + "".join(f"from .a{n} import X\n" for n in range(20_000)))
    began = time.process_time()
    warnings = facts_of(folder).warnings
    assert time.process_time() - began < 5
    assert len(warnings) == 6
    assert "needs a4.py, which is not there" in warnings[4]
    assert "needs 19995 more modules" in warnings[5]


@pytest.mark.parametrize("number", ["1e999", "NaN", '"x"', "null"])
def test_token_ids_that_are_no_numbers(number: str) -> None:
    content = f'{{"model": {{"vocab": {{"a": {number}}}}}}}'.encode()
    file = SideFile(name="tokenizer.json", file=SourceFile(location="/m/tokenizer.json", size=len(content)))
    assert tokenizer_facts((file,), lambda _: content).tokens is None
