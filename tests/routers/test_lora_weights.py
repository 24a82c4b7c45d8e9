"""Models that are one base with different adapters: read together, each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raymoe
from raymoe.gate_modes.layer_values import LayerActivations
from raymoe.planning import MergePlan
from raymoe.routers.activations import capture, capture_layers
from raymoe.routers.layer_loader import LayerLoader, LayerParts, LoadedLayer
from raymoe.routers.lora_weights import apply_lora
from raymoe.routers.prompt_passes import plan_readings
from raymoe.sources.dtypes import FLOAT_DTYPES
from raymoe.sources.facts import LoraPair
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES, load_array, with_lora
from tests.pico import LAYERS, load_dense, merge_config, save_lora
from tests.storage.plans import save

FFN, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def sources(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A base, and itself with three adapters: of FFNs, of attention too, and of another rank."""
    base, root = zoo("llama", dtype="bfloat16"), tmp_path_factory.mktemp("adapters")
    adapters = [
        save_lora(root / "ffn", base, FFN, seed=1),
        save_lora(root / "both", base, FFN + ATTENTION, seed=2),
        save_lora(root / "other", base, FFN[:2], rank=7, alpha=3.0, seed=3),
    ]
    return base, [f"{base}+{adapter}" for adapter in adapters]


def planned(sources: tuple[Path, list[str]], mode: str, prompt_model: str) -> MergePlan:
    base, experts = sources
    return raymoe.plan(merge_config(base, [*experts, base], mode=mode, prompt_model=prompt_model))


def layers_of(plan: MergePlan, number: int, reader: SourceReader) -> list[LayerActivations]:
    return capture(plan.gates, plan.gates.experts[number], reader, members=4, device="cpu")


@pytest.mark.parametrize("prompt_model", ["grafted", "expert", "base"])
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "ridge"])
def test_read_together_they_leave_what_each_leaves_alone(
    mode: str, prompt_model: str, sources: tuple[Path, list[str]]
) -> None:
    plan = planned(sources, mode, prompt_model)
    (together,) = plan_readings(plan.gates.experts, 1, plan.gates.hidden)
    with SourceReader(HubOptions()) as reader:
        found = list(zip(*capture_layers(plan.gates, together, reader, members=4, device="cpu"), strict=True))
        alone = [layers_of(plan, number, reader) for number in range(4)]
    for one, other in zip(found, alone, strict=True):
        for layer, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(layer.states, same.states)
            if mode != "ridge":
                np.testing.assert_array_equal(layer.sums, same.sums)
    if prompt_model != "base":
        with SourceReader(HubOptions()) as reader:
            plain = capture_layers(plan.gates, [plan.gates.experts[3]], reader, members=4, device="cpu")
            last = [layer.states for (layer,) in plain][LAYERS - 2]
        assert not np.array_equal(last, found[0][LAYERS - 2].states[: len(last)])


def test_a_layer_is_loaded_once_for_all(sources: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, load = planned(sources, "ridge", "grafted"), LayerLoader._load
    loaded: list[LayerParts] = []

    def watched(loader: LayerLoader, parts: LayerParts, buffer: torch.Tensor) -> LoadedLayer:
        loaded.append(parts)
        return load(loader, parts, buffer)

    monkeypatch.setattr(LayerLoader, "_load", watched)
    with SourceReader(HubOptions()) as reader:
        for members in plan_readings(plan.gates.experts, 1, plan.gates.hidden):
            list(capture_layers(plan.gates, members, reader, members=4, device="cpu"))
    assert len(loaded) == LAYERS
    assert {number for number, _, _ in loaded[0].factors} == {0, 1, 2}
    # The last layer's FFN is not run, and no adapter is on anything else of a grafted model.
    assert not loaded[-1].factors and all("mlp" not in name for name in loaded[-1].weights)


def test_several_actors_share_the_adapters(sources: tuple[Path, list[str]]) -> None:
    plan = planned(sources, "ridge", "grafted")
    assert [[str(m.owner) for m in part] for part in plan_readings(plan.gates.experts, 2, plan.gates.hidden)] == [
        ["expert 0", "expert 1"],
        ["expert 2", "expert 3"],
    ]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),  # sources/test_lora.py compares deltas with peft's
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
        pytest.param({"use_rslora": True, "rank_pattern": {"up_proj": 3}}, marks=pytest.mark.slow),
    ],
)
def test_states_are_those_of_the_model_that_peft_merges(
    options: dict[str, Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    base = zoo("llama")
    modules = FFN + ATTENTION
    wrapped = peft.get_peft_model(load_dense(base), peft.LoraConfig(r=4, target_modules=modules, **options))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand(parameter.shape) + 0.5
        elif "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / name).write_bytes((base / name).read_bytes())

    def states(expert: str) -> list[torch.Tensor]:
        plan = raymoe.plan(merge_config(base, [expert, base], mode="ridge", prompt_model="expert"), allow_all_same=True)
        with SourceReader(HubOptions()) as reader:
            found = capture(plan.gates, plan.gates.experts[0], reader, members=2, device="cpu")
        return [torch.from_numpy(layer.states.copy()).view(torch.bfloat16).float() for layer in found]

    plain = states(str(base))
    for ours, merged, without in zip(
        states(f"{base}+{tmp_path / 'adapter'}"), states(str(tmp_path / "merged")), plain, strict=True
    ):
        torch.testing.assert_close(ours, merged, rtol=1e-2, atol=1e-2)  # of bfloat16
        assert (ours - without).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_blocks_of_rows_make_no_difference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 12, generator=generator).bfloat16()
    factors = {
        "a": torch.randn(3, 12, generator=generator, dtype=torch.float64),
        "b": torch.randn(37, 3, generator=generator, dtype=torch.float64),
        "magnitude": torch.rand(37, generator=generator, dtype=torch.float64) + 0.5,
    }
    monkeypatch.setattr("raymoe.routers.lora_weights._BLOCK_ELEMENTS", 12 * rows)
    delta = 0.5 * (factors["b"] @ factors["a"])
    adapted = apply_lora(weight, {"a": factors["a"], "b": factors["b"]}, 0.5)
    assert torch.equal(adapted, (weight.float() + delta.float()).bfloat16())
    with_magnitudes = apply_lora(weight, factors, 0.5)
    torch.testing.assert_close(
        torch.linalg.vector_norm(with_magnitudes.double(), dim=1), factors["magnitude"], rtol=1e-2, atol=0
    )


def test_rows_without_length_under_dora_stay_zero() -> None:
    """As where shards are written: no magnitude can give them a length."""
    factors = {"a": torch.ones(2, 6), "b": torch.ones(4, 2), "magnitude": torch.full((4,), 3.0)}
    weight = torch.full((4, 6), -2.0)
    weight[0] = 1.0
    adapted = apply_lora(weight, {name: factor.double() for name, factor in factors.items()}, 1.0)
    expected = torch.zeros(4, 6)
    expected[0] = 3.0 / 6**0.5
    torch.testing.assert_close(adapted, expected)


@pytest.mark.parametrize("has_magnitude", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_weights_for_prompts_and_for_shards_agree(dtype: str, has_magnitude: bool, tmp_path: Path) -> None:
    """Torch makes the ones on the device, numpy the others from files."""
    numbers = np.random.default_rng(5)
    values = {"w": numbers.standard_normal((40, 24)), "a": numbers.standard_normal((3, 24))}
    values |= {"b": numbers.standard_normal((40, 3)), "magnitude": numbers.random(40) + 0.5}
    values["w"][7] = values["b"][7] = 0.0
    entries = save(tmp_path, {name: array.astype(NUMPY_DTYPES[dtype]) for name, array in values.items()})
    magnitude = entries["magnitude"] if has_magnitude else None
    pair = LoraPair(a=entries["a"], b=entries["b"], scaling=0.75, magnitude=magnitude)
    with SourceReader(HubOptions()) as reader:
        weight = load_array(reader, entries["w"]).astype(np.float32)
        for_shards = with_lora(reader, weight, pair, slice(0, 40))
        factors = {
            name: torch.from_numpy(load_array(reader, entry).astype(np.float64)) for name, entry in pair.entries.items()
        }
        for_prompts = apply_lora(torch.from_numpy(weight), factors, pair.scaling)
    np.testing.assert_allclose(for_prompts.numpy(), for_shards, rtol=1e-6, atol=1e-6)
    assert not for_shards[7].any() and np.abs(for_shards - weight).max() > 0.1
