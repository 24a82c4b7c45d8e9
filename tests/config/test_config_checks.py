"""Values that do not go together, and reports of several problems."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

from raymoe.config import ALL_SAME_FLAG, MergeConfig, check_config, load_config, make_config, parse_config
from raymoe.errors import Problem, ProblemReport

ProblemsOf = Callable[[str], tuple[Problem, ...]]
OnlyProblem = Callable[[str], Problem]
Edited = Callable[..., str]


def test_no_experts(only_problem: OnlyProblem) -> None:
    problem = only_problem("base_model: a\nexperts: []\n")
    assert (problem.where, problem.what) == ("m.yaml:2: experts", "there are no experts")


def test_default_experts_per_token_is_too_much_for_one_expert(only_problem: OnlyProblem) -> None:
    problem = only_problem("base_model: a\nexperts:\n- {source_model: b, positive_prompts: [x]}\n")
    assert problem.where == "m.yaml:2: experts"
    assert problem.what == "experts_per_token is 2 by default, but there is only 1 expert"
    assert problem.remedy == "write experts_per_token: 1, or add experts"


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed", "ridge"])
def test_every_expert_without_prompts_is_named(mode: str, problems_of: ProblemsOf) -> None:
    text = f"""\
base_model: base/model
gate_mode: {mode}
experts:
  - source_model: x/a
  - source_model: x/b
    positive_prompts: []
  - source_model: x/c
    positive_prompts: ["", " \\n"]
    negative_prompts: ["this does not help"]
  - source_model: x/d
    positive_prompts: ["fine"]
"""
    found = problems_of(text)
    # A blank prompt is BOS alone, of which `ridge` keeps nothing; mergekit-moe's modes take it.
    assert [p.where for p in found] == [
        "m.yaml:4: experts[0].positive_prompts",
        "m.yaml:6: experts[1].positive_prompts",
        *(["m.yaml:8: experts[2].positive_prompts"] if mode == "ridge" else []),
    ]
    shown_mode = mode.replace("_last", "")
    assert re.search(f"the expert has no prompts, but gate_mode {shown_mode} computes the router", found[0].what)
    if mode == "ridge":
        assert re.search("the expert has only blank prompts", found[2].what)
    assert all("gate_mode: random" in p.remedy for p in found)


def test_identical_prompts(only_problem: OnlyProblem) -> None:
    expert = "  - {source_model: x/%s, positive_prompts: [a, b], negative_prompts: [%s]}\n"
    head = "base_model: a\nexperts:\n"
    problem = only_problem(head + expert % (1, "c") + expert % (2, "c") + expert % (3, "c"))
    assert problem.where == "m.yaml:2: experts"
    assert re.search("all 3 experts have the same prompts, so the router cannot tell them apart", problem.what)
    # The negative prompts, or one expert of the three, make the difference.
    parse_config(head + expert % (1, "c") + expert % (2, "d"), name="m.yaml")


def test_files_of_prompts(only_problem: OnlyProblem, problems_of: ProblemsOf) -> None:
    """The same file drawn alike is known to be the same before it is read; other draws may differ."""
    expert = "  - {source_model: x/%s, positive_prompts: {file: p.txt, seed: %d}%s}\n"
    head = "base_model: a\nexperts:\n"
    problem = only_problem(head + expert % (1, 0, "") + expert % (2, 0, ""))
    assert re.search("all 2 experts have the same prompts", problem.what)
    parse_config(head + expert % (1, 0, "") + expert % (2, 1, ""), name="m.yaml")
    parse_config(head + expert % (1, 0, "") + expert % (2, 0, ", chat_template: true"), name="m.yaml")
    # One that the schema refuses says nothing about missing prompts.
    found = problems_of(head + expert % (1, -1, "") + "  - {source_model: x/2, positive_prompts: {}}\n")
    assert [p.where.partition(": ")[2] for p in found] == [
        "experts[0].positive_prompts.seed",
        "experts[1].positive_prompts.file",
    ]


def test_one_bad_object_in_many_places() -> None:
    """YAML gives each alias an object of its own; Python does not."""
    prompts = {"fil": "p.txt", "limit": 0}
    expert = {"source_model": "b", "positive_prompts": prompts, "negative_prompts": prompts, "noise": 1}
    with pytest.raises(ProblemReport) as caught:
        make_config({"base_model": "a", "experts": [expert, expert]}, allow_all_same=True)
    assert len(caught.value.problems) == 2 * (2 * 2 + 1)
    assert str(caught.value).startswith("3 problems:")


def test_all_experts_the_same_model(only_problem: OnlyProblem, edited: Edited) -> None:
    text = edited(("x/math", "x/code"))
    problem = only_problem(text)
    assert problem.where == "m.yaml:5: experts"
    assert re.search("all 2 experts are the same model", problem.what)
    assert ALL_SAME_FLAG in problem.remedy
    assert len(parse_config(text, name="m.yaml", allow_all_same=True).experts) == 2


def test_flag_reaches_files(tmp_path: Path, edited: Edited) -> None:
    path = tmp_path / "same.yaml"
    path.write_text(edited(("x/math", "x/code")))
    with pytest.raises(ProblemReport, match="same model"):
        load_config(path)
    load_config(path, allow_all_same=True)


def test_shared_experts_with_and_without_prompts(only_problem: OnlyProblem, valid: str) -> None:
    shared = "shared_experts:\n  - source_model: a\n    positive_prompts: [x]\n  - source_model: b\n"
    problem = only_problem(valid + shared)
    assert problem.where == "m.yaml:20: shared_experts[1].positive_prompts"
    assert re.search("has no prompts, but others have", problem.what)
    problem = only_problem(valid + "shared_experts:\n  - source_model: a\n    negative_prompts: [x]\n")
    assert re.search("negative prompts but no positive", problem.what)
    parse_config(valid + "shared_experts:\n  - source_model: a\n  - source_model: b\n", name="m.yaml")
    parse_config(valid.replace("hidden", "random") + shared, name="m.yaml")


def test_one_report_in_file_order(problems_of: ProblemsOf) -> None:
    text = """\
dtype: fp16
experts:
  - source_model: x/a
    positive_prompts: [on]
  - source_model: x/b
    weight: 0.5
  - source_model: x/c
    positive_prompts: [fine]
    noise_scale: "0.1"
experts_per_token: 4
merge_method: slerp
dtype: float16
"""
    assert [p.where for p in problems_of(text)] == [
        "m.yaml:1: base_model",
        "m.yaml:1: dtype",
        "m.yaml:4: experts[0].positive_prompts[0]",
        "m.yaml:5: experts[1].positive_prompts",
        "m.yaml:6: experts[1].weight",
        "m.yaml:9: experts[2].noise_scale",
        "m.yaml:10: experts_per_token",
        "m.yaml:11: merge_method",
        "m.yaml:12: dtype",
    ]


def test_order_within_one_line(problems_of: ProblemsOf) -> None:
    text = '{"experts": [{"source_model": 1}, {"x": 2}], "base_model": 3, "gate_mode": "random"}'
    assert [p.where for p in problems_of(text)] == [
        "m.yaml:1: experts[0].source_model",
        "m.yaml:1: experts[1].source_model",
        "m.yaml:1: experts[1].x",
        "m.yaml:1: base_model",
    ]


@pytest.mark.parametrize(
    ("edits", "silent"),
    [
        # A refused value says nothing about the others: no follow-up problem of a check that would need it.
        ([("gate_mode: hidden", "gate_mode: rand"), ('      - "sum"\n      - "proof"\n', "")], "no prompts"),
        ([("x/math", "7"), ("x/code", "8")], "same model"),
        ([('"sum"\n      - "proof"', "1"), ('"def"', "2")], "same prompts"),
        ([("token: 2", 'token: "9"')], "only 2 experts"),
        ([("experts:\n", "experts: x\nzzz:\n")], "there are no experts"),
    ],
)
def test_no_problem_follows_from_a_refused_value(
    edits: list[tuple[str, str]], silent: str, problems_of: ProblemsOf, edited: Edited
) -> None:
    assert not [p for p in problems_of(edited(*edits)) if silent in p.what]


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ([("positive_prompts", "positive_prompt")], "m.yaml:7: experts[0].positive_prompt: unknown key"),
        ([("positive_prompts", "texts")], "m.yaml:7: experts[0].texts: unknown key"),
        ([("base_model", "base-model")], "m.yaml:1: base-model: unknown key"),
        ([("source_model", "source_modl")], "m.yaml:6: experts[0].source_modl: unknown key"),
        ([("experts:", "expert:")], "m.yaml:5: expert: unknown key"),
        (
            [("positive_prompts", "prompts"), ("    positive_prompts", "    prompts")],
            "m.yaml:7, 11: experts[0-1].prompts: unknown key",
        ),
        ([("hidden", "random"), ("gate_mode", "gatemode"), ('      - "def"\n', "")], "m.yaml:2: gatemode: unknown key"),
    ],
)
def test_a_key_under_a_wrong_name_is_told_once(edits: list[tuple[str, str]], told: str, edited: Edited) -> None:
    """Not also as missing, with a remedy that leads elsewhere."""
    with pytest.raises(ProblemReport) as caught:
        parse_config(edited(*edits), name="m.yaml")
    assert str(caught.value).startswith(f"{told}\n    -> ")
    assert str(caught.value).count("->") == 1


def test_configs_made_in_python_have_no_lines() -> None:
    plain = {
        "base_model": "a",
        "experts": [{"source_model": "b"}, {"source_model": "c", "positive_prompts": ["x"]}],
    }
    (problem,) = check_config(MergeConfig.model_validate(plain))
    assert problem.where == "experts[0].positive_prompts"
    with pytest.raises(pydantic.ValidationError, match="'hiden' is not a known value"):
        MergeConfig.model_validate({**plain, "gate_mode": "hiden"})
