"""What held-out prompts say of the routers: numbers by hand, the lines and warnings made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from raymoe.gate_modes import MODES, better_mode
from raymoe.gate_modes.layer_values import FOLDS, LayerActivations, LayerScores, score_heldout
from raymoe.routers.heldout_report import RouterSummary, router_warnings, summary_lines

NAMES = ("expert 0 (code)", "expert 1 (law)", "expert 2 (cooking)", "expert 3 (chat)")


def summary_of(*loads: Sequence[float], right: Sequence[float] = (0.9, 0.8, 0.7, 1.0)) -> RouterSummary:
    layers = {n: LayerScores(accuracy_by_expert=tuple(right), load=tuple(load)) for n, load in enumerate(loads)}
    return RouterSummary(experts=len(right), layers=layers)


def test_experts_count_alike_however_many_tokens_they_have() -> None:
    labels = np.array([0] * 8 + [1] * 2 + [2])
    first = np.array([0, 0, 0, 0, 0, 0, 1, 2, 1, 0, 0])
    check = score_heldout(labels, first, 3, ridge=0.1, scale=8.0)
    assert check.accuracy_by_expert == (6 / 8, 1 / 2, 0.0)
    assert check.load == pytest.approx(((6 / 8 + 1 / 2 + 1) / 3, (1 / 8 + 1 / 2) / 3, (1 / 8) / 3))
    assert check.accuracy == pytest.approx((6 / 8 + 1 / 2) / 3)
    assert (check.ridge, check.scale) == (0.1, 8.0)


def test_an_expert_without_tokens_has_nothing_right() -> None:
    assert score_heldout(np.array([0, 0]), np.array([0, 1]), 2).accuracy_by_expert == (0.5, 0.0)


def test_the_record() -> None:
    layers = {
        3: LayerScores(accuracy_by_expert=(1.0, 0.5), load=(0.75, 0.25), ridge=0.1, scale=8.0),
        1: LayerScores(accuracy_by_expert=(1 / 3, 1.0), load=(1 / 6, 5 / 6)),
    }
    assert RouterSummary(experts=2, layers=layers).plain() == {
        "accuracy": 0.7083,
        "layers": [
            {"layer": 1, "accuracy": 0.6667, "load": [0.1667, 0.8333]},
            {"layer": 3, "accuracy": 0.75, "load": [0.75, 0.25], "lambda": 0.1, "scale": 8.0},
        ],
    }


def test_lines() -> None:
    rights = [(0.9, 0.9), (0.5, 0.5), (0.8, 0.8), (0.6, 0.6), (0.7, 0.7)]
    layers = {n: LayerScores(accuracy_by_expert=right, load=(0.25, 0.75)) for n, right in enumerate(rights)}
    assert summary_lines(RouterSummary(experts=2, layers=layers), NAMES[:2]) == [
        "routers on held-out prompts: 70% of tokens routed to their expert first (chance 50%); weakest: layer 1 50%, "
        "layer 3 60%, layer 4 70%",
        "first choices by expert: expert 0 (code) 25%, expert 1 (law) 75%",
    ]


FAIR, STARVED = (0.25, 0.25, 0.25, 0.25), (0.06, 0.3, 0.3, 0.34)


@pytest.mark.parametrize(
    ("loads", "layers"),
    [
        ([FAIR] * 4, None),
        ([STARVED, FAIR, FAIR], None),
        ([(0.0625, 0.3, 0.3, 0.3375)] * 4, None),  # a quarter of its fair share
        ([STARVED, FAIR, STARVED, STARVED], "3 of 4 layers (0, 2-3)"),
        ([STARVED, FAIR], "1 of 2 layers (0)"),
    ],
)
@pytest.mark.parametrize(("mode", "has_better"), [("ridge", False), ("hidden", True)])
def test_starved_experts(loads: list[Sequence[float]], layers: str | None, mode: str, has_better: bool) -> None:
    warnings = router_warnings(summary_of(*loads), NAMES, better=better_mode(MODES[mode]))
    if layers is None:
        assert warnings == []
        return
    (warning,) = warnings
    assert warning.startswith("expert 0 (code) will be starved: it comes first for less than 6% of prompt tokens in ")
    assert f" in {layers}; its prompts look like another expert's" in warning
    assert ("or use gate_mode: ridge" in warning) is has_better


@pytest.mark.parametrize(("mode", "has_better"), [("ridge", False), ("hidden", True)])
def test_routers_near_chance(mode: str, has_better: bool) -> None:
    def warnings(right: float) -> list[str]:
        return router_warnings(summary_of(FAIR, FAIR, right=[right] * 4), NAMES, better=better_mode(MODES[mode]))

    assert warnings(0.44) == []  # chance is 25%; from there a quarter of the way to all of them is 43.75%
    (warning,) = warnings(0.43)
    assert "43% of held-out prompt tokens go to their expert first, and 25% would by chance" in warning
    assert ("or use gate_mode: ridge" in warning) is has_better


def member(
    states: Sequence[Sequence[float]], prompts: Sequence[int], sums: Sequence[Sequence[float]]
) -> LayerActivations:
    """What a prompt n leaves: the states of its tokens, and `sums[n]`."""
    folds, counts = np.zeros((FOLDS, len(sums[0]))), np.zeros(FOLDS, np.int64)
    for number, vector in enumerate(sums):
        folds[number % FOLDS] += vector
        counts[number % FOLDS] += 1
    bits = torch.tensor(states).to(torch.bfloat16).view(torch.int16).numpy()
    negative = np.zeros(len(prompts), np.bool_)
    return LayerActivations(states=bits, prompts=np.array(prompts), negative=negative, sums=folds, counts=counts)


def test_rows_of_modes_that_sum_are_judged_without_the_fold() -> None:
    """Expert 0's prompts point along x, but for the second, which points along z, which only that prompt knows."""
    first = member([[1, 0, 0], [2, 0, 0], [0, 0.25, 3]], [0, 0, 1], [[1, 0, 0], [0, 0, 1]])
    second = member([[0, 1, 0], [0, 1, 0]], [0, 1], [[0, 1, 0], [0, 1, 0]])
    rows = MODES["hidden"].fit_layer([first, second], [], "cpu")
    half = 0.5**0.5
    np.testing.assert_allclose(rows.experts, [[half, 0, half], [0, 1, 0]], atol=1e-7)
    assert rows.shared is None
    # Without prompt 0 its row is z, which ties at 0 with y on x; without prompt 1 it is x, and z goes to y by 0.25.
    assert rows.scores is not None
    assert rows.scores.accuracy_by_expert == (pytest.approx(2 / 3), 1.0)
    assert rows.scores.load == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_negative_prompts_count_in_rows_and_are_not_judged() -> None:
    positive = member([[1, 0], [1, 0]], [0, 1], [[1, 0], [1, 0]])
    negative = np.array([False, False, True])
    with_no = LayerActivations(
        states=np.concatenate([positive.states, positive.states[:1]]),
        prompts=np.array([0, 1, 0]),
        negative=negative,
        sums=positive.sums,
        counts=positive.counts,
        negative_mean=np.array([0.0, 1.0]),
    )
    other = member([[0, 1], [0, 1]], [0, 1], [[0, 1], [0, 1]])
    rows = MODES["hidden"].fit_layer([with_no, other], [with_no], "cpu")
    np.testing.assert_allclose(rows.experts, [[0.5**0.5, -(0.5**0.5)], [0, 1]], atol=1e-7)
    np.testing.assert_array_equal(rows.shared, rows.experts[0])
    assert rows.scores is not None and rows.scores.accuracy_by_expert == (1.0, 1.0)


@pytest.mark.parametrize("mode", ["hidden", "ridge"])
def test_one_prompt_an_expert_is_not_judged(mode: str) -> None:
    members = [member([[1, 0], [1, 1]], [0, 0], [[1, 0]]), member([[0, 1], [0, 2]], [0, 0], [[0, 1]])]
    rows = MODES[mode].fit_layer(members, [], "cpu")
    assert rows.scores is None
    assert (rows.experts.argmax(axis=1) == [0, 1]).all()
