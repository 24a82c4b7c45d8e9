"""Prompts that do not fit one pass are read in several: the same routers, whoever reads what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.gate_modes.layer_values import join_parts
from raymoe.planning.plan import GatePlan
from raymoe.routers import prompt_passes as module
from raymoe.routers.activations import capture_layers
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.prompt_passes import Reading, plan_readings
from raymoe.routers.router_matrices import RouterRows
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.pico import LAYERS, merge_config

TEXTS = [("a few words about " * (1 + n % 4) + str(n)).strip() for n in range(16)]


def planned(zoo: Callable[..., Path], mode: str, prompt_model: str = "base") -> GatePlan:
    content: dict[str, Any] = merge_config(
        zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode=mode, prompt_model=prompt_model
    )
    for number, expert in enumerate(content["experts"]):
        expert["positive_prompts"] = [f"{number} {text}" for text in TEXTS]
        expert["negative_prompts"] = [f"no {number} {text}" for text in TEXTS[:4]]
    return raymoe.plan(content).gates


def rows_of(gates: GatePlan) -> RouterRows:
    with SourceReader(HubOptions()) as reader:
        return compute_routers_locally(gates, reader, device="cpu")[0]


def shares(passes: list[tuple[Reading, ...]]) -> list[list[str]]:
    return [[part.name for part in taken] for taken in passes]


def test_what_fits_is_read_in_one_pass(zoo: Callable[..., Path]) -> None:
    gates = planned(zoo, "hidden")
    assert shares(plan_readings(gates.experts, 1, gates.hidden)) == [["expert 0", "expert 1", "expert 2"]]
    assert shares(plan_readings(gates.experts, 2, gates.hidden)) == [["expert 0"], ["expert 1", "expert 2"]]
    grafted = planned(zoo, "ridge", "grafted")
    assert shares(plan_readings(grafted.experts, 1, grafted.hidden)) == [["expert 0"], ["expert 1"], ["expert 2"]]


def test_a_pass_holds_no_more_than_fits(zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gates = planned(zoo, "hidden")
    size = module._state_bytes(gates.experts[0], gates.hidden)
    monkeypatch.setattr(module, "STATE_BYTES", int(2.5 * size))
    assert shares(plan_readings(gates.experts, 1, gates.hidden)) == [["expert 0", "expert 1"], ["expert 2"]]
    monkeypatch.setattr(module, "STATE_BYTES", size // 2 + 1)
    parts = [f"expert {number} (part {part} of 2)" for number in range(3) for part in (1, 2)]
    assert shares(plan_readings(gates.experts, 1, gates.hidden)) == [[part] for part in parts]


def test_parts_do_not_depend_on_the_number_of_actors(zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gates = planned(zoo, "hidden")
    monkeypatch.setattr(module, "STATE_BYTES", module._state_bytes(gates.experts[0], gates.hidden) // 3)
    names = set()
    for actors in range(1, 20):
        names.add(
            tuple(sorted(part.name for taken in plan_readings(gates.experts, actors, gates.hidden) for part in taken))
        )
    assert len(names) == 1 and len(names.pop()) == 12


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "ridge"])
@pytest.mark.parametrize("parts", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_rows_are_those_of_one_pass(
    zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, mode: str, parts: int
) -> None:
    """Of `ridge` to the bit, since states are only put together; where sums are added in parts, to their last bits."""
    gates = planned(zoo, mode)
    monkeypatch.setattr("raymoe.routers.activations.TOKEN_BUDGET", 200)  # some batches of each member
    expected = rows_of(gates)
    monkeypatch.setattr(module, "STATE_BYTES", module._state_bytes(gates.experts[0], gates.hidden) // parts + 1)
    assert len(plan_readings(gates.experts, 1, gates.hidden)) >= 6
    found = rows_of(gates)
    assert found.keys() == expected.keys()
    for owner, rows in found.items():
        if mode == "ridge":
            np.testing.assert_array_equal(rows, expected[owner])
        else:
            np.testing.assert_allclose(rows, expected[owner], rtol=1e-6, atol=1e-7)


def test_each_prompt_is_in_one_part(zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gates = planned(zoo, "hidden")
    monkeypatch.setattr("raymoe.routers.activations.TOKEN_BUDGET", 64)
    member = gates.experts[0]

    def left(part: Any) -> list[Any]:
        with SourceReader(HubOptions()) as reader:
            return [layer for (layer,) in capture_layers(gates, [part], reader, members=3, device="cpu")]

    whole = left(member)
    parts = [left(part) for part in module._split_parts(member, gates.hidden)]
    assert len(parts) == 1
    monkeypatch.setattr(module, "STATE_BYTES", module._state_bytes(member, gates.hidden) // 4)
    parts = [left(part) for part in module._split_parts(member, gates.hidden)]
    assert len(parts) > 3 and all(part[0].counts.sum() + len(part[0].prompts) > 0 for part in parts)
    for layer in range(LAYERS):
        one = join_parts([part[layer] for part in parts])
        for name in ("states", "prompts", "negative", "counts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(whole[layer], name))
        np.testing.assert_allclose(one.sums, whole[layer].sums, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(one.negative_mean, whole[layer].negative_mean, rtol=1e-12, atol=1e-12)


def test_sums_are_held_only_of_layers_under_way(zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from raymoe.routers import activations

    gates = planned(zoo, "hidden")
    held: list[int] = []
    take = activations._Sums.pop_layer

    def seen(sums: Any, layer: int) -> dict[str, Any]:
        held.append(len(sums._layers))
        result = take(sums, layer)
        assert layer not in sums._layers
        return result

    monkeypatch.setattr(activations._Sums, "pop_layer", seen)
    rows_of(replace(gates, experts=gates.experts[:2]))
    assert held and max(held) <= 2
