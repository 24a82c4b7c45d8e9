"""Every value that the schema refuses: where it points, what it says, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from raymoe.config import parse_config
from raymoe.errors import Problem

ProblemsOf = Callable[[str], tuple[Problem, ...]]
OnlyProblem = Callable[[str], Problem]
Edited = Callable[..., str]


def test_the_text_that_the_others_break_is_valid(valid: str) -> None:
    assert len(parse_config(valid, name="m.yaml").experts) == 2


# Each: (old text, new text), where, what, remedy.
# fmt: off
BAD_VALUES = {
    "gate mode": (
        ("hidden", "hiden"), "2: gate_mode",
        "'hiden' is not a known value", "did you mean hidden.*hidden_last",
    ),
    "gate mode far off": (
        ("hidden", "moe"), "2: gate_mode",
        "'moe' is not", "^use one of hidden, hidden_avg, ridge, cheap_emb",
    ),
    "gate mode boolean": (("hidden", "on"), "2: gate_mode", "YAML reads 'on' as a boolean", 'quote it: "on"'),
    "dtype nickname": (("bfloat16", "bf16"), "3: dtype", "'bf16' is not", "did you mean bfloat16"),
    "dtype of torch": (
        ("bfloat16", "torch.int64"), "3: dtype",
        "'int64' is not", "one of float32, float16, bfloat16",
    ),
    "dtype number": (("bfloat16", "16"), "3: dtype", "YAML reads '16' as a number", 'quote it: "16"'),
    "count text": (
        ("token: 2", 'token: "2"'), "4: experts_per_token",
        "got the text '2'", "digits without quotes",
    ),
    "count boolean": (
        ("token: 2", "token: yes"), "4: experts_per_token",
        "whole number, got a boolean", "for example 2",
    ),
    "count fraction": (
        ("token: 2", "token: 1.5"), "4: experts_per_token",
        "whole number, got 1.5", "without a fraction",
    ),
    "count nan": (
        ("token: 2", "token: .nan"), "4: experts_per_token",
        "whole number, got nan", "without a fraction",
    ),
    "count infinite": (
        ("token: 2", "token: .inf"), "4: experts_per_token",
        "whole number, got inf", "without a fraction",
    ),
    "count list": (("token: 2", "token: [2]"), "4: experts_per_token", "got a list", "for example 2"),
    "count zero": (("token: 2", "token: 0"), "4: experts_per_token", "must be 1 or more", "usually 2"),
    "count negative": (("token: 2", "token: -1"), "4: experts_per_token", "must be 1 or more", "usually 2"),
    "count too many": (
        ("token: 2", "token: 3"), "4: experts_per_token",
        "is 3, but there are only 2", ": 2 or less",
    ),
    "count huge": (
        ("token: 2", f"token: 0x{'f' * 9000}"), "4: experts_per_token",
        "is a number of 36000 bits", "2 or less",
    ),
    "architecture blank": (
        ("dtype: bfloat16", "architecture: ' '"), "3: architecture",
        "is blank", "leave the key out",
    ),
    "architecture": (
        ("dtype: bfloat16", "architecture: 3"), "3: architecture",
        "reads '3' as a number", 'quote it: "3"',
    ),
    "prompt model": (
        ("dtype: bfloat16", "prompt_model: graft"), "3: prompt_model",
        "'graft' is not a known value", r"did you mean grafted\? \(one of base, expert, grafted\)",
    ),
    "base model number": (("base/model", "7"), "1: base_model", "reads '7' as a number", 'quote it: "7"'),
    "base model nothing": (
        ("base/model", ""), "1: base_model",
        "expected text, got nothing", "write the text",
    ),
    "base model blank": (
        ("base/model", "' '"), "1: base_model",
        "the model is empty", "name a local folder or a Hub",
    ),
    "source model list": (
        ("x/code", "[x/code]"), r"10: experts\[1\].source_model",
        "got a list", "put it in quotes",
    ),
    "source model form": (
        ("x/code", "x+y+z"), r"10: experts\[1\].source_model",
        r"'x\+y\+z' has 2 '\+'", "org/adapter",
    ),
    "source model keys": (
        ("x/code", "{path: y}"), r"10: experts\[1\].source_model",
        "unknown key path", "org/name",
    ),
    "prompt text": (
        ('    negative_prompts:\n      - "poem"', "    negative_prompts: poem\n"),
        r"13: experts\[1\].negative_prompts",
        "expected a list of prompts, got the text 'poem'", "one prompt per line, each after '- '",
    ),
    "prompts mapping": (
        ('    negative_prompts:\n      - "poem"', "    negative_prompts: {a: b}\n"),
        r"13: experts\[1\].negative_prompts.file",
        "this key is required", "{file: prompts.jsonl}, or make it a list: one prompt per line, each after '- '",
    ),
    "prompts number": (
        ('    negative_prompts:\n      - "poem"', "    negative_prompts: 3\n"),
        r"13: experts\[1\].negative_prompts",
        "expected a list of prompts, got a number", "one prompt per line, each after '- '",
    ),
    "prompts file name": (
        ('    negative_prompts:\n      - "poem"', "    negative_prompts: p.txt\n"),
        r"13: experts\[1\].negative_prompts",
        "got the text 'p.txt'", "a file is named as {file: ...}",
    ),
    "chat template": (
        ("dtype: bfloat16", "chat_template: chatml"), "3: chat_template",
        "expected true or false, got the text 'chatml'", "without quotes",
    ),
    "chat template of expert": (
        ("noise_scale: 0.5", "chat_template: 1"), r"15: experts\[1\].chat_template",
        "expected true or false, got a number", "without quotes",
    ),
    "prompt yes": (
        ('"proof"', "yes"), r"9: experts\[0\].positive_prompts\[1\]",
        "'yes' as a boolean", 'quote it: "yes"',
    ),
    "prompt date": (
        ('"proof"', "2024-01-02"), r"9: .*_prompts\[1\]",
        "'2024-01-02' as a date", 'it: "2024-01-02"',
    ),
    "prompt number": (
        ('"proof"', "12:30:45"), r"9: .*_prompts\[1\]",
        "'12:30:45' as a number", 'quote it: "12:30:45"',
    ),
    "prompt null": (('"proof"', "null"), r"9: .*_prompts\[1\]", "'null' as nothing", 'quote it: "null"'),
    "prompt nothing": (
        ('"proof"', ""), r"9: .*_prompts\[1\]",
        "expected text, got nothing", "or remove the entry",
    ),
    "prompt mapping": (
        ('"proof"', "Note: x"), r"9: .*_prompts\[1\]",
        "got a mapping", "quote the whole prompt: ': '",
    ),
    "prompt list": (('"proof"', "[INST]"), r"9: .*_prompts\[1\]", "got a list", r"'\[' or '\{' at its start"),
    "prompt no date": (
        ('"proof"', "2024-13-45"), r"9: .*_prompts\[1\]",
        "'2024-13-45' cannot be read as timestamp", "quotes",
    ),
    "prompt equals": (
        ('"proof"', "="), r"9: .*_prompts\[1\]",
        "'=' cannot be read as value", "put it in quotes",
    ),
    "prompt tag": (
        ('"proof"', "!!int 'x'"), r"9: .*_prompts\[1\]",
        "'x' cannot be read as int", "remove the tag",
    ),
    "prompt surrogate": (
        ('"proof"', '"\\ud800"'), r"9: .*_prompts\[1\]",
        r"'\\ud800' is not valid Unicode", "surrogate",
    ),
    "python tag": (
        ('"proof"', "!!python/object/apply:os.system [ls]"), r"9: .*_prompts\[1\]",
        "the tag tag:yaml.org,2002:python/object.* has no meaning here", "^remove the tag$",
    ),
    "noise text": (
        ("0.5", '"0.5"'), r"15: experts\[1\].noise_scale",
        "got the text '0.5'", "without quotes: 0.5$",
    ),
    "noise word": (
        ("0.5", "much"), r"15: experts\[1\].noise_scale",
        "got the text 'much'", "a number, for example 0.1",
    ),
    "noise boolean": (
        ("0.5", "true"), r"15: experts\[1\].noise_scale",
        "a number, got a boolean", "for example",
    ),
    "noise negative": (
        ("0.5", "-0.5"), r"15: experts\[1\].noise_scale",
        "-0.5 is below zero", "standard deviation",
    ),
    "noise infinite": (
        ("0.5", ".inf"), r"15: experts\[1\].noise_scale",
        "inf is not a finite number", "for example",
    ),
    "residual nan": (
        ("0.1", ".nan"), r"16: experts\[1\].residual_scale",
        "nan is not a finite number", "for example",
    ),
    "residual huge": (
        ("0.1", f"0x{'f' * 400}"), r"16: .*residual_scale",
        "a number of 1600 bits is not a fin", "example",
    ),
    "residual list": (
        ("0.1", "[0.1]"), r"16: experts\[1\].residual_scale",
        "a number, got a list", "for example",
    ),
    "residual exponent": (
        ("0.1", "'1e-1'"), r"16: .*residual_scale",
        "got the text '1e-1'", "without quotes: 0.1$",
    ),
    "residual digits": (
        ("0.1", "9" * 5000), r"16: .*residual_scale",
        "'9{60}...' cannot be read as int", "",
    ),
}
# fmt: on


# Each: keys of a file of prompts, the key that is wrong, what, remedy.
# fmt: off
BAD_PROMPT_FILES = {
    "suffix": ("file: p.csv", "file", "can't tell the format of 'p.csv' by its", r"\.txt, \.jsonl, .*parquet$"),
    "json": ("file: p.json", "file", "can't tell the format", "one object per line$"),
    "compressed parquet": ("file: p.parquet.gz", "file", "can't tell the format", "parquet$"),
    "folder": ("file: prompts/", "file", "can't tell the format of 'prompts'", "name a file"),
    "blank": ("file: ' '", "file", "is blank", "name a file"),
    "no text": ("file: yes", "file", "YAML reads 'yes' as a boolean", 'quote it: "yes"'),
    "hub": ("file: hf://a/b.txt", "file", "files on the Hub can't be named here", "download the file"),
    "bad URL": ("file: s3://b/../p.txt", "file", r"has the path segment '\.\.'", "s3://bucket/folder/"),
    "secret field": ("file: p.jsonl, field: 's3://a:hidden@b/p'", "field", "a URL has credentials", "key or column"),
    "secret URL": ("file: 's3://me:hidden@b/p.txt'", "file", "a URL has credentials", "s3://bucket"),
    "field number": ("file: p.txt, field: 3", "field", "reads '3' as a number", 'quote it: "3"'),
    "field empty": ("file: p.txt, field: ''", "field", "is empty", "key or column"),
    "limit negative": ("file: p.txt, limit: -1", "limit", "-1 is not a number from 1 up", "null for all"),
    "limit zero": ("file: p.txt, limit: 0", "limit", "0 is not a number from 1 up", "null for all"),
    "limit text": ("file: p.txt, limit: all", "limit", "got the text 'all'", "digits"),
    "limit fraction": ("file: p.txt, limit: 2.5", "limit", "whole number, got 2.5", "for example 256"),
    "limit huge": (f"file: p.txt, limit: 0x{'f' * 9000}", "limit", "a number of 36000 bits", "null"),
    "seed negative": ("file: p.txt, seed: -1", "seed", "-1 is not a number from 0 up", "such as 0"),
    "seed list": ("file: p.txt, seed: [1]", "seed", "whole number, got a list", "for example 0"),
    "near": ("file: p.txt, fild: x", "fild", "unknown key", r"did you mean (file|field)\?"),
    "far": ("file: p.txt, zz: x", "zz", "unknown key", "keys here: file, field, limit, seed"),
    "top's": ("file: p.txt, dtype: x", "dtype", "unknown key", "keys here: file"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_PROMPT_FILES.values(), ids=BAD_PROMPT_FILES)
def test_bad_prompt_file(case: tuple[str, str, str, str], only_problem: OnlyProblem, edited: Edited) -> None:
    keys, key, what, remedy = case
    problem = only_problem(edited(('positive_prompts:\n      - "def"', f"positive_prompts: {{{keys}}}")))
    assert problem.where == f"m.yaml:11: experts[1].positive_prompts.{key}"
    assert re.search(what, problem.what)
    assert re.search(remedy, problem.remedy)
    assert "hidden" not in str(problem)


@pytest.mark.parametrize("case", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_value(case: tuple[tuple[str, str], str, str, str], problems_of: ProblemsOf, edited: Edited) -> None:
    edit, where, what, remedy = case
    problem = problems_of(edited(edit))[0]
    assert re.fullmatch(f"m.yaml:{where}", problem.where)
    assert re.search(what, problem.what)
    assert re.search(remedy, problem.remedy)
    assert all(len(line) < 420 and line.isprintable() for line in str(problem).splitlines())
