"""Whatever is done to a config: a `MergeConfig` or a `ProblemReport`, and no other exception."""

from __future__ import annotations

import random

import pytest

from raymoe.config import MergeConfig, config_warnings, parse_config
from raymoe.errors import ProblemReport

VALID = """\
# A comment
base_model: &base base/model@main
gate_mode: hidden
dtype: torch.bfloat16
experts_per_token: 2
architecture: mixtral
prompt_model: base
experts:
  - source_model: *base
    positive_prompts:
      - "sum: 1 + 1"
      - |
        a block of
        text
  - source_model: {model: {path: x/code, revision: v1}, lora: y/z}
    positive_prompts: ["def", 'it''s', "\\u00e9"]
    negative_prompts:
      - plain words
    chat_template: false
    noise_scale: 0.5
    residual_scale: 1e-1
shared_experts:
  - {source_model: base/model, positive_prompts: [a], negative_prompts: {file: a.txt, limit: 3}}
  - source_model: base/other
    positive_prompts:
      file: s3://a/b.jsonl
      field: "q"
      limit: ~
      seed: 1
"""
SCALARS = [
    "yes",
    "~",
    "''",
    "12",
    "1e400",
    "-0x1F",
    ".inf",
    "2024-02-30",
    "1:2:3",
    "!!int x",
    "!x y",
    "<<",
    "=",
    "*base",
    "&b",
]
SCALARS += [
    "{",
    "[",
    "]",
    "- ",
    "? ",
    ": ",
    "\t",
    "\x00",
    "\ufeff",
    "\ud800",
    '"\\ud800"',
    "!!binary '?'",
    "!!set {a}",
    "\U0001f600",
]
SCALARS += [
    "!!timestamp x",
    "!!float .",
    "!!bool maybe",
    "{<<: [*base]}",
    "[[], {}]",
    "%",
    "@",
    "`",
    "|",
    "...",
    "---\n",
]


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 6)):
        lines = text.splitlines(keepends=True) or [""]
        at, char = rng.randrange(len(lines)), rng.randrange(len(text) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif kind == 2:
            lines[at] = rng.choice([" ", "  ", "\t", "- "]) + lines[at]
        elif kind == 3:
            key, colon, _ = lines[at].partition(": ")
            lines[at] = f"{key}{colon}{rng.choice(SCALARS)}\n"
        elif kind == 4:
            lines[at] = lines[at].lstrip()
        elif kind == 5:
            lines = [text[:char] + text[char + rng.randint(1, 3) :]]
        elif kind == 6:
            lines = [text[:char] + rng.choice(SCALARS) + text[char:]]
        else:
            lines = [text[:char] + chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) + text[char:]]
        text = "".join(lines)
    return text


def outcome(text: str) -> MergeConfig | ProblemReport:
    try:
        return parse_config(text, name="m.yaml")
    except ProblemReport as report:
        return report


@pytest.mark.parametrize(
    ("seed", "times"),
    [
        (0, 40),
        pytest.param(1, 260, marks=pytest.mark.slow),
        *(pytest.param(seed, 150, marks=pytest.mark.soak) for seed in range(2, 10)),
    ],
)
def test_mutated_configs(seed: int, times: int) -> None:
    rng = random.Random(seed)
    loaded = 0
    for _ in range(times):
        text = mutated(VALID, rng)
        got = outcome(text)
        if isinstance(got, ProblemReport):
            assert all(p.where.startswith("m.yaml") and p.what for p in got.problems), text
            assert str(got).replace("\n", "").isprintable(), text
        else:
            loaded += 1
            config_warnings(got)
            assert MergeConfig.from_plain(got.to_plain()) == got
    # Both outcomes occur, or the test would show nothing.
    assert 0 < loaded < times


def test_unmutated_config_loads() -> None:
    assert len(parse_config(VALID, name="m.yaml").experts) == 2
