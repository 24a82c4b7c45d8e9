"""Files that cannot be read, and YAML that goes wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from raymoe.config import load_config, yaml_loader
from raymoe.errors import Problem, ProblemReport

ProblemsOf = Callable[[str], tuple[Problem, ...]]
OnlyProblem = Callable[[str], Problem]
Edited = Callable[..., str]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "m.yaml", "the config is empty"),
        ("# nothing\n---\n", "m.yaml:3", "a mapping of keys to values, not nothing"),
        ("- a\n- b\n", "m.yaml:1", "a mapping of keys to values, not a list"),
        ("\n\njust text\n", "m.yaml:3", "a mapping of keys to values, not text"),
        ("a: 1\nb: [1,\n", "m.yaml:2", r"not valid YAML: the bracket \[ is not closed"),
        ("a: 1\n\tb: 2\n", "m.yaml:2", "not valid YAML: 'b: 2' is indented with a tab"),
        ("a: b: c\n", "m.yaml:1", "not valid YAML: 'a: b: c' holds characters that have a meaning"),
        ("a: *nowhere\n", "m.yaml:1", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "m.yaml:2", "expected a single document"),
        ("a: 1\nb: \x07\n", "m.yaml:2", r"the character U\+0007 is not allowed"),
        ("a: &x [1, *x]\n", "m.yaml:1", "an anchor holds an alias of itself"),
        ("a: " + "[" * 5000, "m.yaml:1", "nested too deeply|not valid YAML"),
        ("a: " + "[" * 100 + "]" * 100, "m.yaml:1", "nested too deeply"),
    ],
)
def test_unreadable_text(text: str, where: str, what: str, problems_of: ProblemsOf) -> None:
    problem = problems_of(text)[0]
    assert problem.where == where
    assert re.search(what, problem.what)
    assert problem.remedy


def test_keys_that_are_not_text_and_merges_that_are_no_mappings(problems_of: ProblemsOf, valid: str) -> None:
    found = problems_of("? [a, b]\n: c\n" + valid + "    <<: 3\n")
    assert [(p.where, p.what) for p in found] == [
        ("m.yaml:1", "a key must be text"),
        ("m.yaml:19: experts[1]", "'<<' merges a mapping or a list of mappings, and this is neither"),
    ]


def test_merges_that_grow_or_go_round(problems_of: ProblemsOf, valid: str) -> None:
    levels = "".join(f"k{i + 1}: &k{i + 1} {{<<: [*k{i}, *k{i}]}}\n" for i in range(60))
    assert {p.what for p in problems_of(valid + "k0: &k0 {a: 1}\n" + levels)} == {"unknown key"}
    assert {p.what for p in problems_of(valid + "a: &x {<<: *x}\n")} == {"unknown key"}


def test_remedies_of_syntax_errors(only_problem: OnlyProblem, edited: Edited) -> None:
    assert "spaces" in only_problem("a: 1\n\tb: 2\n").remedy
    assert "put it in quotes" in only_problem(edited(('"proof"', "[INST] hi [/INST]"))).remedy


# The real limit, and one that is reached sooner.
LIMITS = pytest.mark.parametrize("limit", [2_000, pytest.param(200_000, marks=pytest.mark.slow)])


@LIMITS
def test_text_that_grows_when_written_out(
    limit: int, only_problem: OnlyProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit != yaml_loader._MAX_VALUES:
        monkeypatch.setattr(yaml_loader, "_MAX_VALUES", limit)
    levels = "".join(f"k{i + 1}: &k{i + 1} [{', '.join([f'*k{i}'] * 9)}]\n" for i in range(9))
    problem = only_problem("k0: &k0 [x]\n" + levels)
    assert problem.what == f"it holds more than {limit} values"


@LIMITS
@pytest.mark.parametrize(
    "text_of",
    [
        # Anchors are merged as often as they are named: n * n steps.
        lambda n: (
            "k0: &a {" + ", ".join(f"k{i}: 1" for i in range(n)) + "}\nb: {<<: [" + ", ".join(["*a"] * n) + "]}\n"
        ),
        lambda n: "k0: &a {" + ", ".join(f"k{i}: 1" for i in range(n)) + "}\nb: {" + ", ".join(["<<: *a"] * n) + "}\n",
        # Composed whole, these would take gigabytes. The end is for Python's parser alone.
        lambda n: "a: [" + "[]," * (n * n) + "]\n",
        lambda n: "a: [" + "[]," * (n * n) + '"\\q',
    ],
    ids=["aliases", "merges", "lists", "not YAML after all"],
)
def test_more_than_it_looks(
    text_of: Callable[[int], str], limit: int, only_problem: OnlyProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit != yaml_loader._MAX_VALUES:
        monkeypatch.setattr(yaml_loader, "_MAX_VALUES", limit)
    text = text_of(math.isqrt(3 * limit))
    assert only_problem(text).what == f"it holds more than {limit} values"


def test_numbers_that_are_long(problems_of: ProblemsOf, valid: str) -> None:
    """Those to the base 60 took time with the square of their length."""
    for number in ("1" + ":1" * 20_000, "1" + ":1" * 20_000 + ".5"):
        problem = problems_of(f"seed: {number}\n" + valid)[0]
        assert problem.where == "m.yaml:1: seed" and "cannot be read as" in problem.what, problem


def test_duplicate_keys(problems_of: ProblemsOf, valid: str) -> None:
    text = valid + "    noise_scale: 0.9\nbase_model: other\nexperts: []\n"
    assert [(p.where, p.what) for p in problems_of(text)] == [
        ("m.yaml:17: experts[1].noise_scale", "the key is given twice, first in line 15"),
        ("m.yaml:18: base_model", "the key is given twice, first in line 1"),
        ("m.yaml:19: experts", "the key is given twice, first in line 5"),
    ]


def test_files_that_cannot_be_read(tmp_path: Path, valid: str) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(ProblemReport) as caught:
            load_config(path)
        return str(caught.value)

    assert problem(tmp_path / "none.yaml").startswith(f"{tmp_path}/none.yaml: no such file")
    assert problem(tmp_path).startswith(f"{tmp_path}: this is a folder, not a file")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(valid.replace("proof", "preuve \xe9").encode("latin-1"))
    assert problem(latin).startswith(f"{latin}:9: not UTF-8 text (byte 0xe9)")
    assert problem(latin / "below").startswith(f"{latin}/below: cannot be read: ")
    huge = tmp_path / "model.safetensors"
    with huge.open("wb") as file:
        file.truncate(17 * 1024 * 1024)
    assert re.search("more than 16 MiB: this is no merge config", problem(huge))
    bad = tmp_path / "bad.yaml"
    bad.write_text(valid.replace("dtype", "dtpye"))
    assert problem(bad).startswith(f"{bad}:3: dtpye: unknown key")


def test_long_and_coloured_text_is_cut(only_problem: OnlyProblem, edited: Edited) -> None:
    text = edited(('\n      - "poem"', ' "\\e[31m' + "p" * 5000 + '"'))
    problem = only_problem(text)
    assert problem.what == "expected a list of prompts, got the text '\\x1b[31m" + "p" * 55 + "...'"
    problem = only_problem(edited(("x/code", "o/" + "n" * 3000 + "+a+b")))
    assert len(problem.what) < 450
