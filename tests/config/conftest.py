"""A valid config, ways to break it, and what is then reported."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from raymoe.config import parse_config
from raymoe.errors import Problem, ProblemReport

VALID = """\
base_model: base/model
gate_mode: hidden
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: x/math
    positive_prompts:
      - "sum"
      - "proof"
  - source_model: x/code
    positive_prompts:
      - "def"
    negative_prompts:
      - "poem"
    noise_scale: 0.5
    residual_scale: 0.1
"""


@pytest.fixture
def valid() -> str:
    return VALID


@pytest.fixture
def edited() -> Callable[..., str]:
    """`VALID` with replacements: `edited((old, new), ...)`."""

    def edit(*edits: tuple[str, str]) -> str:
        text = VALID
        for old, new in edits:
            assert old in text
            text = text.replace(old, new, 1)
        return text

    return edit


@pytest.fixture
def problems_of() -> Callable[[str], tuple[Problem, ...]]:
    def problems(text: str) -> tuple[Problem, ...]:
        with pytest.raises(ProblemReport) as caught:
            parse_config(text, name="m.yaml")
        # Reports cross process borders.
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        return caught.value.problems

    return problems


@pytest.fixture
def only_problem(problems_of: Callable[[str], tuple[Problem, ...]]) -> Callable[[str], Problem]:
    def problem(text: str) -> Problem:
        (only,) = problems_of(text)
        return only

    return problem
