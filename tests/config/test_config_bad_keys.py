"""Keys that are unknown, missing, or hold another shape than they should."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from raymoe.errors import Problem

ProblemsOf = Callable[[str], tuple[Problem, ...]]
OnlyProblem = Callable[[str], Problem]
Edited = Callable[..., str]

BAD_KEYS = {
    "near": (("dtype:", "d_type:"), "3: d_type", "unknown key", r"did you mean dtype\?"),
    "case and dash": (("dtype:", "Gate-Mode:"), "3: Gate-Mode", "unknown key", r"did you mean gate_mode\?"),
    "far": (
        ("dtype:", "zzz:"),
        "3: zzz",
        "unknown key",
        "^keys here: base_model, experts, shared_experts, gate_mode,",
    ),
    "number": (("dtype:", "3:"), "3: 3", "unknown key", "^keys here: base_model"),
    "near in expert": (
        ("residual_scale", "scale"),
        r"16: experts\[1\].scale",
        "unknown key",
        "did you mean .*_scale",
    ),
    "model in expert": (
        ("residual_scale", "model"),
        r"16: experts\[1\].model",
        "unknown key",
        "mean source_model",
    ),
    "far in expert": (
        ("residual_scale", "zzz"),
        r"16: experts\[1\].zzz",
        "unknown key",
        "^keys here: source_model, pos",
    ),
    "expert's at top": (
        ("dtype", "noise_scale"),
        "3: noise_scale",
        "unknown key here",
        "belongs to an expert",
    ),
    "top's in expert": (
        ("residual_scale", "dtype"),
        r"16: experts\[1\].dtype",
        "unknown key here",
        "to the top level",
    ),
    "long and coloured": (
        ("dtype", '"\\e[31m' + "k" * 500 + '"'),
        r"3: \\x1b\[31mk{55}...",
        "unknown key",
        "keys here",
    ),
}


@pytest.mark.parametrize("case", BAD_KEYS.values(), ids=BAD_KEYS)
def test_unknown_key(case: tuple[tuple[str, str], str, str, str], only_problem: OnlyProblem, edited: Edited) -> None:
    edit, where, what, remedy = case
    problem = only_problem(edited(edit))
    assert re.fullmatch(f"m.yaml:{where}", problem.where)
    assert re.search(what, problem.what)
    assert re.search(remedy, problem.remedy)


@pytest.mark.parametrize(
    "key",
    [
        "models",
        "merge_method",
        "slices",
        "modules",
        "parameters",
        "tokenizer",
        "tokenizer_source",
        "out_dtype",
    ],
)
def test_key_of_mergekit_yaml(key: str, only_problem: OnlyProblem, valid: str) -> None:
    problem = only_problem(valid + f"{key}: x\n")
    assert problem.where == f"m.yaml:17: {key}"
    assert problem.what == "this is a key of a config of mergekit-yaml, not of mergekit-moe"


@pytest.mark.parametrize(("key", "command"), [("genome", "mergekit-evolve"), ("layer_slices", "bakllama")])
def test_key_of_other_commands(key: str, command: str, only_problem: OnlyProblem, valid: str) -> None:
    assert f"a config of {command}, not of mergekit-moe" in only_problem(valid + f"{key}: x\n").what


def test_missing_keys_and_wrong_shapes(
    only_problem: OnlyProblem, problems_of: ProblemsOf, edited: Edited, valid: str
) -> None:
    assert [(p.where, p.what) for p in problems_of("gate_mode: hidden\n")] == [
        ("m.yaml:1: base_model", "this key is required"),
        ("m.yaml:1: experts", "this key is required"),
    ]
    problem = only_problem(edited(("- source_model: x/code\n    positive", "- positive")))
    assert (problem.where, problem.what) == ("m.yaml:10: experts[1].source_model", "this key is required")
    assert re.search("'source_model: org/name' or a local folder", problem.remedy)
    problem = only_problem("base_model: a\nexperts:\n  x/code: {}\n")
    assert (problem.where, problem.what) == ("m.yaml:2: experts", "expected a list of experts, got a mapping")
    problem = only_problem(valid + "  - org/name\n")
    assert (problem.where, problem.what) == ("m.yaml:17: experts[2]", "expected a mapping, got text")
    assert problem.remedy == "write '- source_model: org/name'"
    problem = only_problem(valid + "shared_experts: {source_model: x}\n")
    assert (problem.where, problem.what) == (
        "m.yaml:17: shared_experts",
        "expected a list of experts, got a mapping",
    )
