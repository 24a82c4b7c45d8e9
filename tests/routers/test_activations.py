"""What prompts leave behind for a router: which tokens are kept, whose they are, and that they are what it will see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import raymoe
from raymoe.errors import MergeFailed, ProblemReport
from raymoe.gate_modes import MODES
from raymoe.gate_modes.layer_values import LayerActivations
from raymoe.routers.activations import capture
from raymoe.routers.tokenize import batches, prompt_ids
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.architectures.pairs import load_grafted
from tests.pico import (
    LAYERS,
    copy_model,
    load_dense,
    merge_config,
    merge_without_ray,
    save_model,
    save_tokenizer,
    tensors_of,
)
from tests.routers.test_fit_layer import LONG, WITH_NEGATIVES

Zoo = Callable[..., Path]
Prompts = dict[str, list[str]]


def captured(config: dict[str, Any], *, members: int = 2) -> list[LayerActivations]:
    """What the first expert's prompts leave at each layer."""
    plan = raymoe.plan(config, allow_all_same=True)
    with SourceReader(HubOptions()) as reader:
        return capture(plan.gates, plan.gates.experts[0], reader, members=members, device="cpu")


def numbered_ids(config: dict[str, Any]) -> list[list[list[int]]]:
    """Token ids of the first expert's positive and of its negative prompts, in the order in which they are numbered."""
    plan = raymoe.plan(config, allow_all_same=True)
    with SourceReader(HubOptions()) as reader:
        positive, negative, _ = prompt_ids(plan.gates, plan.gates.experts[0], reader, trust_remote_code=False)
    return [[list(prompt) for group in batches(ids) for prompt in group] for ids in (positive, negative)]


def config_of(base: Path, expert: Path, prompts: Prompts, **options: Any) -> dict[str, Any]:
    config = merge_config(base, [expert, base], mode="ridge", **options)
    config["experts"][0] |= prompts
    return config


def bfloat16(bits: npt.NDArray[np.int16]) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float()


@torch.inference_mode()
def router_inputs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """(layers, tokens, hidden): what the FFNs of a resident model get, where the merge has its routers."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for layer in model.model.layers
    ]
    model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


READ_BY = [
    ("llama", True, {}),
    ("mistral", True, {"sliding_window": 12}),
    ("qwen2", False, {}),
    ("qwen3", True, {}),
]


@pytest.mark.parametrize(
    ("family", "bos", "options", "prompt_model"),
    [
        pytest.param(*read, prompt_model, marks=() if read is READ_BY[0] or prompt_model is None else pytest.mark.slow)
        for read in READ_BY
        for prompt_model in ("base", "expert", None)
    ],
)
def test_states_are_what_the_routers_will_see(
    family: str, bos: bool, options: dict[str, Any], prompt_model: str | None, zoo: Zoo, tmp_path: Path
) -> None:
    base, expert = zoo(family, **options), zoo(family, seed=1, **options)
    if not bos:
        base = copy_model(base, tmp_path / "base")
        save_tokenizer(base, bos=False)
    model = {
        "base": lambda: load_dense(base),
        "expert": lambda: load_dense(expert),
        None: lambda: load_grafted(base, expert),  # the mode's own
    }[prompt_model]()
    config = config_of(base, expert, WITH_NEGATIVES, **({"prompt_model": prompt_model} if prompt_model else {}))
    layers = captured(config)
    expected, prompts, negative = [], [], []
    for sign, texts in zip((False, True), numbered_ids(config), strict=True):
        for number, ids in enumerate(texts):
            assert (ids[0] == 0) is bos
            expected.append(router_inputs(model, ids)[:, int(bos) :])
            prompts += [number] * (len(ids) - bos)
            negative += [sign] * (len(ids) - bos)
    assert len(layers) == LAYERS
    assert len(prompts) > 300 and prompts.count(0) < 5
    for layer, states in zip(layers, torch.cat(expected, dim=1), strict=True):
        assert layer.prompts.tolist() == prompts
        assert layer.negative.tolist() == negative
        torch.testing.assert_close(bfloat16(layer.states), states, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_modes_that_sum_keep_states_to_be_judged_by(mode: str, zoo: Zoo) -> None:
    base = zoo("llama")
    config = {**config_of(base, base, WITH_NEGATIVES), "gate_mode": mode}
    fitted, summed = captured({**config, "gate_mode": "ridge"}, members=1), captured(config, members=1)
    for number in range(LAYERS - 1):
        np.testing.assert_array_equal(summed[number].states, fitted[number].states)
        np.testing.assert_array_equal(summed[number].prompts, fitted[number].prompts)
        counts = summed[number].counts
        assert counts is not None and counts.tolist() == [1, 1, 1, 1, 0]
        assert fitted[number].sums is None
    assert len(summed[-1].states) == len(summed[-1].prompts) == len(summed[-1].negative) == 0


def words(count: int, length: int) -> list[str]:
    return [f"{n} " + "ab cd " * length for n in range(count)]


@pytest.mark.parametrize("mode", ["ridge", "hidden"])
@pytest.mark.parametrize("members", [2, 5])
def test_past_the_limit_tokens_are_kept_at_even_distances(
    mode: str, members: int, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo("llama")
    config = {**config_of(base, base, {"positive_prompts": words(20, 10)}), "gate_mode": mode}
    everything = captured(config, members=1)[1]
    monkeypatch.setattr(type(MODES[mode]), "max_tokens", 200)
    some = captured(config, members=members)[1]
    limit = 200 // members
    assert len(everything.prompts) > 3 * limit == 3 * len(some.prompts)
    counts = Counter(some.prompts.tolist())
    assert len(counts) == 20
    assert max(counts.values()) - min(counts.values()) <= 1
    at = np.arange(limit) * len(everything.prompts) // limit
    np.testing.assert_array_equal(some.states, everything.states[at])
    np.testing.assert_array_equal(some.prompts, everything.prompts[at])


@pytest.mark.parametrize(
    ("positive", "negative", "kept"),
    [(4, 60, (None, 100)), (60, 4, (100, None)), (40, 40, (50, 50)), (2, 2, (None, None))],
)
def test_few_prompts_are_not_lost_among_many_of_the_other_sign(
    positive: int, negative: int, kept: tuple[int | None, int | None], zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: all there are; 100: what these leave."""
    base = zoo("llama")
    config = config_of(base, base, {"positive_prompts": words(positive, 1), "negative_prompts": words(negative, 1)})
    everything = captured(config)[0].negative
    monkeypatch.setattr(type(MODES["ridge"]), "max_tokens", 200)
    some = captured(config)[0].negative
    assert len(some) == min(100, len(everything))
    for sign, count in zip((False, True), kept, strict=True):
        there, found = int((everything == sign).sum()), int((some == sign).sum())
        if count is None:
            assert found == there
        elif count == 50:
            assert found == count < there
        else:
            assert 50 < found == 100 - int((some != sign).sum()) < there


def test_one_token_is_kept_at_least(zoo: Zoo) -> None:
    base = zoo("llama")
    layers = captured(config_of(base, base, WITH_NEGATIVES), members=100_000)
    assert [layer.states.shape for layer in layers] == [(1, 64)] * LAYERS
    assert not layers[0].negative.any()


def test_dynamic_rope_reads_each_prompt_by_itself(zoo: Zoo) -> None:
    options = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}
    base = zoo("llama", **options)
    config = config_of(base, base, {"positive_prompts": ["a b", LONG]})
    layers, (ids, _) = captured(config), numbered_ids(config)
    short = layers[1].states[layers[1].prompts == 0]
    expected = router_inputs(load_dense(base), ids[0])[1, 1:]
    torch.testing.assert_close(bfloat16(short), expected, rtol=2**-7, atol=1e-4)


def test_prompts_of_nothing_but_bos_are_refused(zoo: Zoo) -> None:
    base = zoo("llama")
    config = config_of(base, base, {"positive_prompts": ["<s>"], "negative_prompts": ["text"]})
    with pytest.raises(ProblemReport, match="expert 0: its positive prompts have no tokens but BOS"):
        captured(config)
    # One such prompt among others is none that could be held out, and the modes that read its last token take it.
    both = captured(config_of(base, base, {"positive_prompts": ["<s>", "text"]}))[0]
    assert set(both.prompts.tolist()) == {1}
    summed = captured({**config, "gate_mode": "hidden"})[0]
    assert summed.counts is not None and summed.counts.sum() == 1
    assert summed.negative.all()


@pytest.mark.parametrize("mode", ["ridge", "hidden"])
def test_states_that_are_not_finite_are_refused(mode: str, zoo: Zoo, tmp_path: Path) -> None:
    weights = tensors_of(zoo("llama"))["model.layers.0.mlp.up_proj.weight"].clone()
    weights[3, 5] = torch.inf
    broken = copy_model(zoo("llama"), tmp_path / "x", tensors={"model.layers.0.mlp.up_proj.weight": weights})
    config = {**config_of(zoo("llama"), broken, {}), "gate_mode": mode, "prompt_model": "grafted"}
    message = "gates of expert 0: the states of its prompts are not finite numbers at layer 1"
    with pytest.raises(MergeFailed, match=message):
        captured(config)


@pytest.mark.parametrize(("mode", "name"), [("hidden", "layers.1.mlp.up_proj"), ("cheap_embed", "embed_tokens")])
def test_rows_that_are_not_finite_are_refused(mode: str, name: str, zoo: Zoo, tmp_path: Path) -> None:
    """Also where nothing but the input of the last layer, or of the first, shows it."""
    weights = tensors_of(zoo("llama"))[f"model.{name}.weight"].clone()
    weights[:, 5] = torch.nan
    broken = copy_model(zoo("llama"), tmp_path / "x", tensors={f"model.{name}.weight": weights})
    config = merge_config(broken, [broken, zoo("llama", seed=1)], mode=mode)
    with pytest.raises(
        MergeFailed, match="gates of expert 0: the states of its prompts are not finite numbers at layer"
    ):
        merge_without_ray(config, tmp_path / "merged")


def test_float16_models_are_read(tmp_path: Path) -> None:
    half = save_model(tmp_path / "half", "llama", dtype="float16")
    layers = captured(config_of(half, half, {}))
    assert all(len(layer.states) and torch.isfinite(bfloat16(layer.states)).all() for layer in layers)


def test_the_ffn_of_the_last_layer_is_not_in_the_plan(zoo: Zoo) -> None:
    base, expert = zoo("llama"), zoo("llama", seed=1)
    plan = raymoe.plan(merge_config(base, [expert, base], mode="ridge"))
    assert plan.gates.prompt_model == "grafted"
    weights = plan.gates.experts[0].weights
    layers = {name for name in tensors_of(base) if name.startswith("model.layers.")}
    last = {name for name in layers if name.startswith(f"model.layers.{LAYERS - 1}.mlp.")}
    assert len(last) == 3
    assert set(weights) == {"model.embed_tokens.weight"} | layers - last
    for name, ref in weights.items():
        assert Path(ref.entry.file.location).parent == (expert if ".mlp." in name else base)
