"""RegMean of single matrices, and what is kept of prompts for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import raymoe
from raymoe.errors import MergeFailed
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Combination, MomentPlan
from raymoe.routers import attention_inputs
from raymoe.routers.attention_inputs import LayerInputs, capture_inputs, join_inputs, layer_modules
from raymoe.routers.prompt_passes import Reading
from raymoe.routers.regmean import merge_layer
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.pico import HIDDEN, merge_config, tensors_of

NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def models(zoo: Callable[..., Path]) -> list[Path]:
    return [zoo("llama", seed=seed) for seed in range(3)]


@contextmanager
def planned(models: list[Path]) -> Iterator[tuple[MomentPlan, SourceReader]]:
    plan = raymoe.plan(merge_config(models[0], models[1:], mode="random", backbone="regmean"))
    assert plan.moments is not None
    with SourceReader(HubOptions()) as reader:
        yield plan.moments, reader


def o_proj(plan: MomentPlan, **options: object) -> Combination:
    (found,) = (each for each in plan.matrices[0] if each.base.entry.name == NAME)
    assert found.moments is not None
    return replace(found, moments=replace(found.moments, **options))  # type: ignore[arg-type]


def inputs_of(*states: torch.Tensor) -> dict[Owner, LayerInputs]:
    module = "self_attn.o_proj"
    bits = [each.bfloat16().view(torch.int16).numpy() for each in states]
    return {
        Owner.expert(number): LayerInputs(states={module: each}, module_of={module: module})
        for number, each in enumerate(bits)
    }


def values(matrix: Combination, found: dict[str, np.ndarray]) -> torch.Tensor:
    assert matrix.dtype == "F32"
    return torch.from_numpy(found[NAME].view(np.float32))


def test_outputs_are_closest_to_those_of_all_experts(models: list[Path]) -> None:
    """With alpha near 1 it is the solution of least squares."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(200, HIDDEN, generator=generator) * (1 + n) for n in range(2)]
    with planned(models) as (plan, reader):
        matrix = o_proj(plan, alpha=1 - 1e-9)
        merged = values(matrix, merge_layer([matrix], inputs_of(*states), reader, "cpu"))
    experts = [tensors_of(model)[NAME].double() for model in models[1:]]
    x = [each.bfloat16().double() for each in states]
    y = torch.cat([each @ expert.T for each, expert in zip(x, experts, strict=True)])
    solution = torch.linalg.lstsq(torch.cat(x), y).solution.T
    assert torch.allclose(merged.double(), solution, atol=1e-5)


def test_columns_without_inputs_get_the_mean(models: list[Path]) -> None:
    states = [torch.randn(90, HIDDEN, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for each in states:
        each[:, [3, 20]] = 0
    with planned(models) as (plan, reader):
        matrix = o_proj(plan)
        merged = values(matrix, merge_layer([matrix], inputs_of(*states), reader, "cpu"))
    one, other = (tensors_of(model)[NAME] for model in models[1:])
    assert torch.allclose(merged[:, [3, 20]], (one + other)[:, [3, 20]] / 2, atol=1e-6)
    assert not torch.allclose(merged, (one + other) / 2, atol=1e-2)


def test_second_moments_without_an_inverse(models: list[Path]) -> None:
    with planned(models) as (plan, reader):
        matrix = o_proj(plan, alpha=1.5)  # no config may have it
        with pytest.raises(MergeFailed, match=r"self_attn\.o_proj in layer 0 have no inverse, with alpha 1\.5"):
            merge_layer([matrix], inputs_of(torch.ones(9, HIDDEN), torch.ones(9, HIDDEN)), reader, "cpu")


def test_float16_can_not_hold_all_values(models: list[Path]) -> None:
    states = [torch.randn(9, HIDDEN) for _ in range(2)]
    with planned(models) as (plan, reader):
        matrix = replace(o_proj(plan), dtype="F16", scale=1e7)
        with pytest.raises(MergeFailed, match="float16 ends at 65504"):
            merge_layer([matrix], inputs_of(*states), reader, "cpu")


def test_prompts_that_are_read_together_or_in_parts(models: list[Path]) -> None:
    """They give the same inputs; q, k and v share theirs."""
    with planned(models) as (plan, reader):
        expert = plan.experts[0]
        names = {name: getattr(expert, name) for name in ("owner", "positive", "negative", "config", "weights")}
        parts = [Reading(**names, part=part, parts=2) for part in range(2)]
        whole = [each[0] for each in capture_inputs(plan, [expert], reader, members=2, device="cpu")]
        read = [capture_inputs(plan, [part], reader, members=2, device="cpu") for part in parts]
        joined = [join_inputs([each[0] for each in of_layer]) for of_layer in zip(*read, strict=True)]
        modules = layer_modules(plan)
    assert len(whole) == len(joined) == len(modules)
    for one, other, names_of_layer in zip(whole, joined, modules, strict=True):
        assert one.module_of == other.module_of and one.module_of.keys() == set(names_of_layer)
        assert len(one.states) == 2 and len(set(one.module_of.values())) == 2
        for name, states in one.states.items():
            assert np.array_equal(states, other.states[name])


def test_the_number_of_tokens_that_are_kept(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_inputs, "MAX_TOKENS", 14)
    with planned(models) as (plan, reader):
        captured = [each[0] for each in capture_inputs(plan, plan.experts[:1], reader, members=2, device="cpu")]
    assert all(len(states) == 7 for layer in captured for states in layer.states.values())


def test_modules_that_are_not_linear_are_refused(models: list[Path]) -> None:
    with planned(models) as (plan, reader):
        wrong = replace(plan, matrices=((o_proj(plan, module="input_layernorm"),),))
        with pytest.raises(MergeFailed, match="input_layernorm is a RMSNorm here"):
            list(capture_inputs(wrong, plan.experts[:1], reader, members=2, device="cpu"))
