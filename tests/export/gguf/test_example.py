"""The example merge in llama.cpp: the tokens that transformers takes, one after the other, from the file's own text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from raymoe.config import load_config
from raymoe.export.gguf import GgufOptions, write_gguf
from tests.export.gguf.llama import LlamaCpp
from tests.pico import REPOSITORY, merge_without_ray

BASE = REPOSITORY / "models/SmolLM2-135M-Instruct"
PROMPTS = ("func main() {\n\tfmt.Println(", "Abre el cuadro de diálogo", "Water boils at 100 degrees")
TOKENS = 8

pytestmark = [pytest.mark.skipif(not BASE.is_dir(), reason="the example model has not been made"), pytest.mark.engines]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `raymoe merge configs/example.yaml` writes, but with routers made of a few prompts, to save time."""
    folder = tmp_path_factory.mktemp("example") / "merged"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        config = load_config("configs/example.yaml").to_plain()
        config["gate_mode"] = "hidden_avg"
        for expert in config["experts"]:
            expert["positive_prompts"] = expert["positive_prompts"][:2]
        merge_without_ray(config, folder)
    for path in BASE.glob("*token*"):
        shutil.copy(path, folder / path.name)
    return folder


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


def test_eight_bits(example: Path, tokenizer: Any, expected: dict[str, list[int]], tmp_path: Path) -> None:
    written = write_gguf(example, tmp_path / "example.gguf", GgufOptions(type="q8_0"))
    assert written.size < 0.56 * sum(path.stat().st_size for path in example.glob("*.safetensors"))
    llama = LlamaCpp(written.path)
    same = [llama.greedy(prompt, 4) == tokens[:4] for prompt, tokens in expected.items()]
    assert sum(same) >= 2
