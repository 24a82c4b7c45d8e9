"""scripts/check_language.py: which words it finds, and that this repository has none of them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

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
        ("3000 requests an hour; bytes an hour", ["3000 requests an hour", "bytes an hour"]),
        ("one actor an expert", ["one actor an expert"]),
        ("it ends four times a second", ["times a second"]),
        ("the driver looks twice a second", ["twice a second"]),
        ("one text a line, and two bytes a token", ["one text a line", "bytes a token"]),
        ("a line an entry; restarts an actor", ["a line an entry", "restarts an actor"]),
        ("Another plan is refused. So are changed sources.", ["So are"]),
        ("shared experts have no part, and neither have others", ["neither have"]),
        ("change the key that mends it", ["mends"]),
        ("requests that are under way. Not so where they fail", ["under way", "Not so"]),
        ("the whole shard, whose parts are sent", []),
        ("3000 requests per hour; it is an expert, and takes a second", []),
        ("one text per line; it writes a shard a second time; name a file", []),
        ("HTTP has no writes, so can't be used; None if neither has.", []),
    ],
)
def test_finds_persons_and_rates(script: dict[str, Any], line: str, words: list[str]) -> None:
    found = list(script["find_in_text"]("a.py", f"first line\n{line}\n"))
    assert [(each.word, each.line) for each in found] == [(word, 2) for word in words]


def test_finds_what_goes_over_two_lines(script: dict[str, Any]) -> None:
    for text in ("it needs 3000 requests\nan hour", "# it needs 3000 requests\n# an hour"):
        found = list(script["find_in_text"]("a.py", text))
        assert [(each.word, each.line) for each in found] == [("3000 requests an hour", 1)]


def test_a_sentence_of_a_page_does_not_begin_with_a_clause(script: dict[str, Any]) -> None:
    text = "# What is published\n\nWhat is lost begins again. What is that?\n- What no node has ends it."
    assert [each.line for each in script["find_in_text"]("a.md", text)] == [3, 4]
    assert list(script["find_in_text"]("a.py", text)) == []


def test_reads_code_and_docs_but_not_tests(script: dict[str, Any], tmp_path: Path) -> None:
    for name in ("raymoe/a.py", "docs/b.md", "tests/c.py", "raymoe/d.bin", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("nobody", encoding="utf-8")
    assert sorted(script["find_all"](tmp_path)) == ["README.md", "docs/b.md", "raymoe/a.py"]


@pytest.mark.slow  # and `make lint` is this
def test_this_code_and_these_docs_pass(script: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert script["main"]() == 0, capsys.readouterr().out


def test_a_finding_is_printed_with_its_line(script: dict[str, Any]) -> None:
    (found,) = script["find_in_text"]("a.py", "\nnobody")
    assert str(found) == "a.py:2: 'nobody': name the thing: an actor, another process"
