"""The fit of a layer's router against plain numpy in float64: the rows, lambda, the scale, and what prompts decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from raymoe.gate_modes import least_squares
from raymoe.gate_modes.least_squares import Examples, fit_rows, fit_shared_gate

Array = npt.NDArray[Any]
LAMBDAS = [10.0**exponent for exponent in (-5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0)]
SCALES = [2.0 ** (step / 2) for step in range(13)]


def examples(states: Array, prompts: Sequence[int], negative: Sequence[bool] | None = None) -> Examples:
    return Examples(
        states=torch.from_numpy(np.asarray(states)),
        prompts=torch.tensor(prompts),
        negative=torch.tensor(negative or [False] * len(states)),
    )


def clusters(
    hidden: int,
    *,
    experts: int = 3,
    prompts: int = 7,
    tokens: int = 2,
    noise: float = 1.0,
    negatives: int = 0,
    seed: int = 0,
) -> list[Examples]:
    """Each expert's tokens around a direction of its own, and each prompt's around one of its own within that."""
    numbers = np.random.default_rng(seed)
    found = []
    for expert in range(experts):
        own = numbers.standard_normal(hidden)
        kinds = [(n, False, own) for n in range(prompts + expert)]
        kinds += [(n, True, numbers.standard_normal(hidden)) for n in range(negatives if expert == 0 else 0)]
        states, which, signs = [], [], []
        for number, sign, middle in kinds:
            here = middle + noise * numbers.standard_normal(hidden)
            states += [here + 0.5 * noise * numbers.standard_normal(hidden) for _ in range(tokens)]
            which += [number] * tokens
            signs += [sign] * tokens
        found.append(examples(np.stack(states), which, signs))
    return found


class Reference:
    """The formulas of least_squares.py's docstring, word by word."""

    def __init__(self, given: Sequence[Examples]) -> None:
        count = len(given)
        self.x = np.concatenate([e.states.double().numpy() for e in given])
        self.prompts = np.concatenate([e.prompts.numpy() for e in given])
        self.negative = np.concatenate([e.negative.numpy() for e in given])
        self.labels = np.concatenate([np.full(len(e.prompts), n) for n, e in enumerate(given)])
        self.targets = np.full((len(self.x), count), -1.0 / count)
        self.weights = np.zeros(len(self.x))
        for row, (label, negative) in enumerate(zip(self.labels, self.negative, strict=True)):
            own = self.labels == label
            positives, negatives = (own & ~self.negative).sum(), (own & self.negative).sum()
            if negative:
                self.targets[row, [n for n in range(count) if n != label]] += 1 / (count - 1)
                self.weights[row] = 1 / (count * max(positives, negatives))
            else:
                self.targets[row, label] += 1
                self.weights[row] = 1 / (count * positives)
        self.scale = np.einsum("n,nh,nh->", self.weights, self.x, self.x) / self.x.shape[1]

    def rows(self, ridge: float, inside: Array | slice = slice(None)) -> Array:
        x, weights, targets = self.x[inside], self.weights[inside], self.targets[inside]
        gram = (x.T * weights) @ x + ridge * self.scale * np.eye(x.shape[1])
        rows: Array = np.linalg.solve(gram, (x.T * weights) @ targets).T
        return rows

    def held_out(self, ridge: float) -> Array:
        scores = np.zeros_like(self.targets)
        for fold in range(5):
            outside = self.prompts % 5 == fold
            scores[outside] = self.x[outside] @ self.rows(ridge, ~outside).T
        return scores

    def choice(self) -> tuple[float, float, Array]:
        """Lambda, scale, and the share of each expert's held-out tokens that goes to it."""
        errors = [(((self.held_out(x) - self.targets) ** 2).sum(axis=1) * self.weights).sum() for x in LAMBDAS]
        best = LAMBDAS[int(np.argmin(errors))]
        kept = ~self.negative
        scores, labels, weights = self.held_out(best)[kept], self.labels[kept], self.weights[kept]
        surprise = []
        for scale in SCALES:
            likely = np.exp(scale * scores)
            own = likely[np.arange(len(labels)), labels] / likely.sum(axis=1)
            surprise.append(-(weights * np.log(own)).sum())
        first = scores.argmax(axis=1)
        right = np.array([(first[labels == n] == n).mean() for n in range(self.targets.shape[1])])
        return best, SCALES[int(np.argmin(surprise))], right


# By the number of tokens (48, and 4 more with negatives) the primal form is solved, or the dual.
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("noise", [0.5, 3.0])
@pytest.mark.parametrize("hidden", [12, 48, 52, 53, 90])
def test_everything_is_what_plain_numpy_gives(hidden: int, noise: float, negatives: int) -> None:
    given = clusters(hidden, noise=noise, negatives=negatives)
    assert sum(len(e.prompts) for e in given) == 48 + 2 * negatives
    reference = Reference(given)
    best, scale, right = reference.choice()

    fitted = fit_rows(given)

    assert fitted.scores is not None
    assert (fitted.scores.ridge, fitted.scores.scale) == pytest.approx((best, scale))
    np.testing.assert_allclose(fitted.scores.accuracy_by_expert, right, atol=1e-12)
    assert fitted.rows.dtype == np.float32
    np.testing.assert_allclose(fitted.rows, scale * reference.rows(best), rtol=1e-5, atol=1e-6)


def test_different_data_choose_differently() -> None:
    """Else the test above would say little."""
    checks = [fit_rows(clusters(20, noise=noise)).scores for noise in (0.3, 2.0, 6.0)]
    assert len({check.ridge for check in checks if check}) > 1
    assert len({check.scale for check in checks if check}) == 3


@pytest.mark.parametrize(("name", "value"), [("CHUNK", 7), ("CHUNK", 48), ("_BLOCK", 5), ("_BLOCK", 24)])
def test_chunks_and_blocks_change_nothing(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = clusters(24)
    whole = fit_rows(given)
    monkeypatch.setattr(least_squares, name, value)
    parts = fit_rows(given)
    assert parts.scores == whole.scores
    np.testing.assert_allclose(parts.rows, whole.rows, rtol=1e-6)


def test_an_expert_with_ten_times_the_tokens_does_not_win() -> None:
    """Its tokens ten times over say nothing new, and the rows are the same (by the other form, at that)."""
    first, *others = clusters(60, noise=4.0)
    often = Examples(
        states=first.states.repeat(10, 1), prompts=first.prompts.repeat(10), negative=first.negative.repeat(10)
    )
    rows = fit_rows([first, *others]).rows
    np.testing.assert_allclose(fit_rows([often, *others]).rows, rows, rtol=1e-5, atol=1e-7)


def test_no_prompt_is_on_both_sides_of_a_fold() -> None:
    """Prompts of noise, each one token many times: who knows a prompt tells it, and nobody can tell a new one."""
    numbers = np.random.default_rng(1)
    states = [np.repeat(numbers.standard_normal((10, 64)), 5, axis=0) for _ in range(2)]
    by_prompt = fit_rows([examples(s, [n // 5 for n in range(50)]) for s in states]).scores
    by_token = fit_rows([examples(s, range(50)) for s in states]).scores
    assert by_prompt is not None and by_token is not None
    assert by_token.ridge is not None and by_token.scale is not None
    assert by_prompt.ridge is not None and by_prompt.scale is not None
    assert by_token.accuracy == 1.0 and by_prompt.accuracy < 0.75
    assert by_token.ridge < 0.01 < 0.1 < by_prompt.ridge
    assert by_token.scale > 10 > 2 >= by_prompt.scale


def test_negative_prompts_are_anybody_elses() -> None:
    numbers, axes = np.random.default_rng(2), np.eye(16)

    def around(axis: int) -> Array:
        around: Array = axes[axis] + 0.01 * numbers.standard_normal((4, 16))
        return around

    plain = [examples(around(n), [0, 0, 1, 1]) for n in range(3)]
    no = around(9)
    with_no = examples(np.concatenate([plain[0].states, no]), [0, 0, 1, 1] * 2, [False] * 4 + [True] * 4)
    rows, without = fit_rows([with_no, *plain[1:]]).rows, fit_rows(plain).rows
    scores = rows @ axes[9]
    assert scores[0] < -0.4 * rows[0, 0] < 0.2 * rows[1, 1] < scores[1] == pytest.approx(scores[2], rel=0.1)
    assert np.abs(without @ axes[9]).max() < 0.1 * np.abs(without).max()
    # What is not expert 0's is not less so for being told twice.
    twice = examples(np.concatenate([plain[0].states, no, no]), [0, 0, 1, 1] * 3, [False] * 4 + [True] * 8)
    np.testing.assert_allclose(fit_rows([twice, *plain[1:]]).rows @ axes[9], scores, rtol=1e-4)


@pytest.mark.parametrize("hidden", [8, 80])
def test_one_prompt_an_expert_leaves_nothing_to_hold_out(hidden: int) -> None:
    given = clusters(hidden, prompts=1, tokens=5)
    assert given[2].prompts.unique().numel() == 3 > given[0].prompts.unique().numel() == 1
    fitted = fit_rows(given)
    assert fitted.scores is None
    np.testing.assert_allclose(fitted.rows, 8 * Reference(given).rows(0.1), rtol=1e-5, atol=1e-6)


def test_prompts_that_share_a_fold_leave_nothing_to_hold_out() -> None:
    first, *others = clusters(8)
    same = Examples(states=first.states, prompts=first.prompts * 5, negative=first.negative)
    assert same.prompts.unique().numel() > 5
    assert fit_rows([same, *others]).scores is None


def test_one_expert_gets_everything() -> None:
    fitted = fit_rows(clusters(8, experts=1))
    assert fitted.scores is None
    assert fitted.rows.dtype == np.float32
    np.testing.assert_array_equal(fitted.rows, np.zeros((1, 8)))


@pytest.mark.parametrize("hidden", [4, 40])
def test_states_of_zero_give_rows_of_zero(hidden: int) -> None:
    given = [examples(np.zeros((6, hidden)), [0, 0, 1, 1, 2, 2]) for _ in range(2)]
    fitted = fit_rows(given)
    np.testing.assert_array_equal(fitted.rows, np.zeros((2, hidden)))
    assert fitted.scores is not None and fitted.scores.accuracy == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [10, 100])
def test_narrow_states_are_computed_with_in_float64(hidden: int, dtype: torch.dtype) -> None:
    given = [
        Examples(states=e.states.to(dtype), prompts=e.prompts, negative=e.negative) for e in clusters(hidden, noise=2.0)
    ]
    wide = [Examples(states=e.states.double(), prompts=e.prompts, negative=e.negative) for e in given]
    narrow, expected = fit_rows(given), fit_rows(wide)
    assert narrow.scores == expected.scores
    np.testing.assert_array_equal(narrow.rows, expected.rows)


def test_lambda_is_chosen_with_fewer_tokens_where_there_are_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third token chooses; all of them are fitted."""
    given = clusters(30, tokens=2, noise=2.0)
    monkeypatch.setattr(least_squares, "CHOICE_SIZE", 20)
    reference = Reference(given)
    for name in ("x", "prompts", "negative", "labels", "targets", "weights"):
        setattr(reference, name, getattr(reference, name)[::3])
    reference.scale = np.einsum("n,nh,nh->", reference.weights, reference.x, reference.x) / 30
    best, scale, _ = reference.choice()
    fitted = fit_rows(given)
    assert fitted.scores is not None
    assert (fitted.scores.ridge, fitted.scores.scale) == pytest.approx((best, scale))
    np.testing.assert_allclose(fitted.rows, scale * Reference(given).rows(best), rtol=1e-5, atol=1e-6)


def test_a_sample_that_lost_an_experts_prompts_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(3)
    long = [examples(numbers.standard_normal((20, 30)), [0] * 19 + [1]) for _ in range(2)]
    assert fit_rows(long).scores is not None
    monkeypatch.setattr(least_squares, "CHOICE_SIZE", 20)  # tokens 0, 2, ..., 38: neither token of a prompt 1
    fitted = fit_rows(long)
    assert fitted.scores is None
    np.testing.assert_allclose(fitted.rows, 8 * Reference(long).rows(0.1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_a_shared_experts_gate_is_open_on_its_own_prompts(noise: float) -> None:
    own, *others = clusters(24, noise=noise, negatives=3)
    gate = fit_shared_gate([own], others)
    assert gate.shape == (24,) and gate.dtype == np.float32
    score = own.states.numpy() @ gate
    closed = np.concatenate([score[own.negative.numpy()], *(e.states.numpy() @ gate for e in others)])
    assert np.median(score[~own.negative.numpy()]) > 0.3 > -0.3 > np.median(closed)
    if noise < 1:
        assert score[~own.negative.numpy()].min() > 0 > closed.max()
    # Two experts' softmax is the sigmoid of their scores' difference.
    positive = examples(own.states[~own.negative].numpy(), own.prompts[~own.negative].tolist())
    rest = examples(
        np.concatenate([own.states[own.negative], *(e.states for e in others)]),
        torch.cat([own.prompts[own.negative], *(e.prompts for e in others)]).tolist(),
    )
    rows = fit_rows([positive, rest]).rows
    np.testing.assert_allclose(gate, rows[0] - rows[1], rtol=1e-6)


def test_the_gate_of_several_shared_experts_is_open_on_the_prompts_of_all() -> None:
    expert, *shared = clusters(24)
    gate = fit_shared_gate(shared, [expert])
    assert gate.shape == (24,)
    for own in shared:
        assert np.median(own.states.numpy() @ gate) > 0.3
    assert np.median(expert.states.numpy() @ gate) < -0.3


def test_negative_prompts_of_experts_close_no_shared_gate() -> None:
    expert, *_, own = clusters(16, negatives=4)
    plain = Examples(
        states=expert.states[~expert.negative],
        prompts=expert.prompts[~expert.negative],
        negative=expert.negative[~expert.negative],
    )
    np.testing.assert_array_equal(fit_shared_gate([own], [expert]), fit_shared_gate([own], [plain]))
