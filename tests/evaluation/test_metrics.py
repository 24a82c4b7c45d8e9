"""Losses and shares on numbers that can be checked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from raymoe.evaluation.metrics import RoutingCounts, gap_closed, losses
from raymoe.evaluation.token_routing import TokenRouting


def test_losses_are_over_tokens_and_the_mean_over_labels() -> None:
    values = [np.float32([-1, -2, -3]), np.float32([-10]), np.float32([-6])]
    assert losses(values, ["b", "a", "b"]) == {"b": 3.0, "a": 10.0, "mean": 6.5}


def test_the_gap_closed() -> None:
    assert gap_closed(2.0, 2.5, 1.5) == 0.5
    assert gap_closed(2.75, 2.5, 1.5) == -0.25
    assert gap_closed(2.0, 2.0, 2.0) is None
    assert gap_closed(2.0, 2.0003, 2.0002) is None, "three times a gap that rounding makes"
    assert gap_closed(1.9, 2.0, 2.1) is None, "the routers of mode hidden are better than the right expert always"


def test_shares_of_two_labels() -> None:
    """Two layers, three experts, two of them for a token; label `a` is expert 0's, `b` is expert 2's."""
    counts = RoutingCounts(["a", "b"], [0, 2], range(2), 3)
    counts.add(0, 0, np.array([[0, 1], [0, 2]]), np.float32([[0.75, 0.25], [0.5, 0.5]]))
    counts.add(0, 0, np.array([[1, 0], [2, 1]]), np.float32([[1.0, 0.0], [0.5, 0.5]]))
    counts.add(0, 1, np.array([[0, 1]] * 4), np.float32([[0.5, 0.5]] * 4))
    counts.add(1, 0, np.array([[2, 1]]), np.float32([[0.5, 0.5]]))
    counts.add(1, 1, np.array([[1, 0]]), np.float32([[0.875, 0.125]]))
    found = counts.shares()
    assert found["first_choice"] == {"a": [[0.5, 0.25, 0.25], [1, 0, 0]], "b": [[0, 0, 1], [0, 1, 0]]}
    assert found["chosen"] == {"a": [[0.75, 0.75, 0.5], [1, 1, 0]], "b": [[0, 1, 1], [1, 1, 0]]}
    assert found["weight"]["a"] == [[0.3125, 0.4375, 0.25], [0.5, 0.5, 0]]
    assert found["weight"]["b"] == [[0, 0.5, 0.5], [0.125, 0.875, 0]]
    assert found["first_accuracy"] == [0.75, 0.5] and found["first_accuracy_mean"] == 0.625
    assert found["chosen_accuracy"] == [0.875, 0.5] and found["chosen_accuracy_mean"] == 0.6875
    # Labels count alike: `a` has four tokens, `b` has one.
    assert found["load"] == [[0.1875, 0.4375, 0.375], [0.5, 0.5, 0]]
    assert found["load_entropy"][1] == pytest.approx(math.log(2) / math.log(3), abs=1e-6)
    assert found["confusion"] == {"a": [0.75, 0.125, 0.125], "b": [0, 0.5, 0.5]}
    json.dumps(found)


@pytest.mark.parametrize(("experts", "entropy"), [([0, 1, 2, 3], 1.0), ([2, 2, 2, 2], 0.0), ([0, 0, 3, 3], 0.5)])
def test_the_entropy_of_a_load(experts: list[int], entropy: float) -> None:
    counts = RoutingCounts(["a"], [0], range(1), 4)
    counts.add(0, 0, np.array(experts)[:, None], np.ones((4, 1), np.float32))
    assert counts.shares()["load_entropy"] == [pytest.approx(entropy, abs=1e-6)]


def test_one_expert_is_even() -> None:
    counts = RoutingCounts(["a"], [0], range(1), 1)
    counts.add(0, 0, np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32))
    assert counts.shares()["load_entropy"] == [1.0]


def test_shares_of_a_prompt_and_its_answer_leave_out_the_first_tokens() -> None:
    """Three tokens in one step and one in the next, each in two layers by two of three experts; the first is BOS."""
    routing, weights = TokenRouting(3), np.array([[0.75, 0.25]] * 3, np.float32)
    for layer, chosen in enumerate(([[0, 1], [1, 0], [1, 2]], [[0, 1], [1, 2], [2, 1]])):
        routing.add(layer, np.array(chosen), weights)
    for layer in range(2):
        routing.add(layer, np.array([[2, 0]]), np.array([[0.5, 0.5]], np.float32))
    first, weight = routing.shares(1)
    assert first == [0, 0.5, 0.5] and weight == pytest.approx([1.25 / 6, 2.5 / 6, 2.25 / 6], abs=1e-6)
    assert routing.shares(0)[0] == [0.25, 0.375, 0.375]
    assert [first for first, _ in routing.shares_per_token(1)] == [[0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
