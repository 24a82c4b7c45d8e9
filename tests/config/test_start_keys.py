"""The keys of starts for training: what they take, and one clear message for each bad value."""

from __future__ import annotations

from typing import Any

import pytest

from raymoe.config import MergeConfig, make_config
from raymoe.config.start_keys import chosen_layers
from raymoe.errors import ProblemReport

TWO = {"base_model": "a", "gate_mode": "random", "experts": [{"source_model": "b"}, {"source_model": "c"}]}


def problems(**keys: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(ProblemReport) as caught:
        make_config({**TWO, **keys})
    return [(problem.where, problem.what, problem.remedy) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("given", "kept", "layers"),
    [
        (None, "all", [0, 1, 2, 3]),
        ("all", "all", [0, 1, 2, 3]),
        ("even", "even", [0, 2]),
        ("odd", "odd", [1, 3]),
        ("1-2", "1-2", [1, 2]),
        (" 1 - 3 ", "1-3", [1, 2, 3]),
        ([2, 0], (0, 2), [0, 2]),
        ((3,), (3,), [3]),
    ],
)
def test_layers(given: Any, kept: Any, layers: list[int]) -> None:
    config = make_config({**TWO, "moe_layers": given})
    assert config.moe_layers == kept
    assert chosen_layers(config.moe_layers, 4) == layers
    assert MergeConfig.from_plain(config.to_plain()) == config


@pytest.mark.parametrize(
    ("given", "what", "remedy"),
    [
        ("evn", "'evn' is not a known value", "did you mean even?"),
        ("none", "'none' is not a known value", "a list such as [0, 2, 4]"),
        ("every", "'every' is not a known value", "did you mean all?"),
        ("9-8", "the range '9-8' ends before it begins", 'write "8-9"'),
        ("1,2", "'1,2' is no range of layers", "a list such as [0, 2, 4]"),
        ([], "no layer would have experts", "layer 0 is the first"),
        ([-1], "-1 is no number of a layer", "layer 0 is the first"),
        ([1, 1], "layer 1 is listed twice", "list each layer once"),
        ([1.5], "expected a whole number, got 1.5", "for example 8"),
        (["a"], "expected a whole number, got the text 'a'", "digits without quotes"),
        (4, "expected layers, got a number", "write all, even, odd"),
        (True, "expected layers, got a boolean", "write all, even, odd"),
        ({"from": 1}, "expected layers, got a mapping", "write all, even, odd"),
    ],
)
def test_bad_layers(given: Any, what: str, remedy: str) -> None:
    ((where, said, hint),) = problems(moe_layers=given)
    assert where.startswith("moe_layers")
    assert what in said
    assert remedy in hint


def test_layers_that_the_model_does_not_have() -> None:
    assert chosen_layers("2-4", 4) == "there is no layer 4: the base has 4 layers, numbered from 0 to 3"
    assert chosen_layers("odd", 1) == "odd names no layer of a model with 1"


@pytest.mark.parametrize(
    ("keys", "where", "what", "remedy"),
    [
        ({"granularity": 0}, "granularity", "0 is no number of experts", "2 or more; 1 leaves it whole"),
        ({"granularity": "4"}, "granularity", "expected a whole number, got the text '4'", "without quotes"),
        ({"granularity": 2.5}, "granularity", "expected a whole number, got 2.5", "for example 4"),
        ({"reinit": 1.5}, "reinit", "1.5 is not a share", "from 0 to 1; the paper of Drop-Upcycling takes 0.5"),
        ({"reinit": -0.1}, "reinit", "-0.1 is not a share", "from 0 to 1"),
        ({"reinit": "half"}, "reinit", "expected a number, got the text 'half'", "for example 0.1"),
        (
            {"experts": [{"source_model": "b", "reinit": 2}, {"source_model": "c"}]},
            "experts[0].reinit",
            "2.0 is not a share",
            "from 0 to 1",
        ),
    ],
)
def test_bad_numbers(keys: dict[str, Any], where: str, what: str, remedy: str) -> None:
    ((found, said, hint),) = problems(**keys)
    assert found.startswith(where)
    assert what in said
    assert remedy in hint


def test_numbers() -> None:
    config = make_config({**TWO, "granularity": 4, "reinit": 0.5})
    (first, _), shared = config.experts, config.experts[1].model_copy(update={"reinit": 0.25})
    assert (config.granularity, config.reinit_of(first, "experts"), config.reinit_of(first, "shared_experts")) == (
        4,
        0.5,
        0,
    )
    assert config.reinit_of(shared, "shared_experts") == 0.25
    assert MergeConfig.from_plain(config.to_plain()) == config
