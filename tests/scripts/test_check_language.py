"""scripts/check_language.py: which words it finds, and that no file has more of them than its list allows."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "scripts/check_language.py"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("# Nobody reads it, whoever asks.", ["Nobody", "whoever"]),
        ("a range that somebody still wants", ["somebody"]),
        ("an actor, not who computes it", ["who"]),
        ("3000 requests an hour", ["requests an hour"]),
        ("one actor an expert", ["one actor an expert"]),
        ("it ends four times a second", ["times a second"]),
        ("the whole shard, whose parts are sent", []),
        ("3000 requests per hour; it is an expert, and takes a second", []),
    ],
)
def test_finds_persons_and_rates(script: dict[str, Any], line: str, words: list[str]) -> None:
    found = list(script["find_in_text"]("a.py", f"first line\n{line}\n"))
    assert [(each.word, each.line) for each in found] == [(word, 2) for word in words]


def test_reads_code_and_docs_but_not_tests(script: dict[str, Any], tmp_path: Path) -> None:
    for name in ("raymoe/a.py", "docs/b.md", "tests/c.py", "raymoe/d.bin", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("nobody", encoding="utf-8")
    assert sorted(script["find_all"](tmp_path)) == ["README.md", "docs/b.md", "raymoe/a.py"]


def test_a_file_may_have_what_its_line_allows_and_no_more(script: dict[str, Any]) -> None:
    found = {"a.py": list(script["find_in_text"]("a.py", "nobody\nwhoever"))}
    assert script["excess"](found, {"a.py": 2}) == script["excess"](found, {"a.py": 3}) == []
    assert [each.line for each in script["excess"](found, {"a.py": 1})] == [1, 2]
    assert len(script["excess"](found, {})) == 2


def test_this_code_and_these_docs_pass(script: dict[str, Any]) -> None:
    found = script["find_all"](REPOSITORY)
    assert [str(each) for each in script["excess"](found, script["ALLOWED"])] == []
