"""Few prompts are told of while a merge is planned, with the numbers of the docs' table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.gate_modes import MODES as REGISTERED
from tests.pico import MODES, REPOSITORY, merge_config


def warnings_of(zoo: Callable[..., Path], mode: str, *counts: int) -> list[str]:
    base = zoo("llama")
    per_token = min(2, len(counts))
    config: dict[str, Any] = merge_config(base, [base] * len(counts), mode=mode, experts_per_token=per_token)
    for owner, (expert, count) in enumerate(zip(config["experts"], counts, strict=True)):
        if "positive_prompts" in expert:
            expert["positive_prompts"] = [f"prompt {number} of {owner}" for number in range(count)]
    return [w for w in raymoe.plan(config, allow_all_same=True).warnings if "few prompts" in w]


@pytest.mark.parametrize("mode", MODES)
def test_few_prompts_are_warned_of_where_their_number_matters(mode: str, zoo: Callable[..., Path]) -> None:
    assert bool(warnings_of(zoo, mode, 5, 5)) is (REGISTERED[mode].measured_accuracy is not None)
    assert not warnings_of(zoo, mode, 8, 16)
    assert not warnings_of(zoo, mode, 1)  # one expert: there is nothing to choose


def test_a_warning_says_who_and_how_much(zoo: Callable[..., Path]) -> None:
    (warning,) = warnings_of(zoo, "hidden", 5, 16, 3)
    assert warning.startswith("few prompts (expert 0 has 5, expert 2 has 3): ")
    assert "hidden sends 37% of held-out tokens" in warning and "gate_mode: ridge sends 70% and 96%" in warning
    (warning,) = warnings_of(zoo, "ridge", 5, 5)
    assert "gate_mode" not in warning and "held out" not in warning
    (warning,) = warnings_of(zoo, "ridge", 5, 1)
    assert "With one prompt (expert 1) no prompt can be held out: ridge then uses a constant regularization" in warning
    assert "held out:" not in warnings_of(zoo, "hidden", 5, 1)[0]


def test_the_numbers_are_those_of_the_docs() -> None:
    table = (REPOSITORY / "docs/research/routing.md").read_text().split("| prompts per expert |")[1]
    found: dict[str, list[int]] = {}
    for mode, right in re.findall(r"\| `(\w+)` \| [\d.]+ \| (\d+)% \|", table):
        found.setdefault(mode, []).append(int(right))
    measured = {name: mode.measured_accuracy for name, mode in REGISTERED.items() if mode.measured_accuracy}
    assert {mode: tuple(found[mode][:2]) for mode in measured} == measured
