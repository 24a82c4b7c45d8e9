"""docs/engines.md has the tables of raymoe/engines/rows.csv, and an architecture for each kind of models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.pico import REPOSITORY

PAGE = REPOSITORY / "docs/engines.md"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "scripts"))  # as for a script that is run
    import engines_page

    yield engines_page
    sys.path.remove(str(REPOSITORY / "scripts"))


def test_the_page_has_the_tables_of_the_rows(script: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    tables = script.tables()
    found = {name: page.split(script.MARK.format(name))[1].strip() for name in tables}
    assert found == tables, "run scripts/engines_page.py"
    assert page.count("scripts/engines_page.py") == 2 * len(tables)


@pytest.mark.parametrize(
    "title",
    [
        "Llama 3.1, 3.3",
        "Llama 3.2 (1B, 3B)",
        "Qwen2.5 (7B and larger)",
        "Qwen2.5 (up to 3B)",
        "Qwen3 (8B and larger)",
        "Qwen3 (up to 4B)",
        "Mistral 7B v0.1 (window)",
        "Phi-3, Phi-3.5 with 4k (window)",
        "Phi-3, Phi-3.5 with 128k",
        "Gemma 4 (31B, 12B)",
        "Qwen3.5 (9B and larger)",
        "Granite 4 H (Mamba, no RoPE)",
        "Granite 4 Micro (attention, RoPE)",
    ],
)
def test_one_architecture_is_right_in_vllm_and_llama_cpp(script: ModuleType, title: str) -> None:
    model = next(model for model in script.MODELS if model.title == title)
    assert script.choice(model.spec, ("vllm", "llama.cpp")) != "none"


def test_every_published_model_has_an_architecture_without_engines(script: ModuleType) -> None:
    assert [model.title for model in script.MODELS if script.choice(model.spec, ()) == "none"] == []
