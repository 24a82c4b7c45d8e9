"""README.md: short, its numbers are those of the pages that it links, and its Python runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import write_config

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?:%| GB\b| MB\b| of \d+)?")


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def gains() -> list[tuple[str, str, str]]:
    """The rows of the table of what you get: name, text, linked page."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \[[^|\]]+\]\(([^|)]+)\) \|$", section("What you get"), re.MULTILINE)
    assert len(rows) == section("What you get").count("\n|") - 2
    return rows


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(("name", "text", "page"), gains(), ids=lambda value: value[:30])
def test_numbers_are_those_of_the_page(name: str, text: str, page: str) -> None:
    told = (REPOSITORY / page).read_text(encoding="utf-8")
    numbers = NUMBER.findall(text)
    assert numbers, f"{name}: no number"
    missing = [number for number in numbers if not re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", told)]
    assert missing == [], f"{name}: not in {page}"


@pytest.mark.engines
def test_its_python_runs(
    zoo: Callable[..., Path], without_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = []
    for seed, kind in enumerate(("law", "code"), 1):
        (tmp_path / kind).symlink_to(zoo("llama", seed=seed))
        experts.append({"source_model": str(tmp_path / kind), "positive_prompts": [f"A prompt about {kind}"]})
    write_config(tmp_path / "config.yaml", {"base_model": str(zoo("llama")), "experts": experts})
    texts = [{"label": kind, "text": f"A text about {kind}."} for kind in ("law", "code")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section("Python"), flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out/raymoe.json").is_file()
