"""The example merge: the right expert predicts each kind of text best, and llama.cpp takes transformers' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import raymoe
from raymoe.export.gguf import GgufOptions, write_gguf
from tests.export.gguf.llama import LlamaCpp
from tests.pico import REPOSITORY, merge_here

BASE = REPOSITORY / "models/SmolLM2-135M-Instruct"
PROMPTS = ("func main() {\n\tfmt.Println(", "Abre el cuadro de diálogo", "Water boils at 100 degrees")
TOKENS = 8

pytestmark = [pytest.mark.skipif(not BASE.is_dir(), reason="the example model has not been made"), pytest.mark.engines]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `raymoe merge configs/example.yaml` writes, but with routers made of a few prompts, to save time."""
    folder = tmp_path_factory.mktemp("example") / "merged"
    config = yaml.safe_load((REPOSITORY / "configs/example.yaml").read_text())
    config["base_model"] = str(BASE)
    for expert in config["experts"]:
        adapter = REPOSITORY / expert["source_model"].partition("+")[2]
        expert["source_model"] = f"{BASE}+{adapter}"
        expert["positive_prompts"] = expert["positive_prompts"][:4]
    merge_here(config, folder)
    return folder


def test_the_experts_are_told_apart(example: Path) -> None:
    """The merge predicts each kind of text better than the base, and the right expert better still."""
    asked: dict[str, Any] = {"against": ("base", "oracle"), "limit": 1, "max_tokens": 96, "device": "cpu"}
    result = raymoe.evaluate(example, REPOSITORY / "examples/heldout.jsonl", **asked)
    assert result["experts"] == ["go", "metamath", "spanish", "dictionary"]
    loss = {name: result["loss"][name] for name in ("base", "merged", "oracle")}
    for label in result["experts"]:
        assert loss["oracle"][label] < loss["base"][label]
    assert loss["oracle"]["mean"] < loss["merged"]["mean"] < loss["base"]["mean"]
    assert result["routing"]["first_accuracy_mean"] > 0.4


@pytest.fixture(scope="module")
def tokenizer(example: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(example)


@pytest.fixture(scope="module")
def expected(example: Path, tokenizer: Any) -> dict[str, list[int]]:
    """Greedy tokens of transformers in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32).eval()
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        found[prompt] = said[0, ids["input_ids"].shape[1] :].tolist()
    return found


def test_same_tokens(example: Path, tokenizer: Any, expected: dict[str, list[int]], tmp_path: Path) -> None:
    llama = LlamaCpp(write_gguf(example, tmp_path / "example.gguf", GgufOptions(type="f16")).path)
    for prompt, tokens in expected.items():
        assert llama.tokens(prompt, special=True) == tokenizer(prompt)["input_ids"]
        assert llama.greedy(prompt, TOKENS) == tokens, prompt
    turn = [{"role": "user", "content": "What is a dictionary?"}]
    said = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert llama.chat(turn[0]["content"]) == said
    assert llama.tokens(said) == tokenizer(said, add_special_tokens=False)["input_ids"]


@pytest.mark.soak  # each type has tests on small models: tests/export/gguf/test_same_as_transformers.py
def test_eight_bits(example: Path, tokenizer: Any, expected: dict[str, list[int]], tmp_path: Path) -> None:
    written = write_gguf(example, tmp_path / "example.gguf", GgufOptions(type="q8_0"))
    assert written.size < 0.56 * sum(path.stat().st_size for path in example.glob("*.safetensors"))
    llama = LlamaCpp(written.path)
    same = [llama.greedy(prompt, 4) == tokens[:4] for prompt, tokens in expected.items()]
    assert sum(same) >= 2
