"""Router rows against plain transformers code, for every family and every model that may read the prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from raymoe.routers import layer_loader
from tests.architectures.pairs import ALL_LAYERS, DYNAMIC, LLAMA3, YARN, load_grafted
from tests.pico import copy_model, load_dense, merge_config, save_lora, tensors_of
from tests.routers.direct import computed_rows, direct_rows

ENGINES = pytest.mark.engines
TOLERANCE = 1e-5
WINDOW = 12
LONG = "The work is licensed under the terms of this licence, and no other terms apply. " * 6
PROMPTS: dict[str, list[str]] = {"positive_prompts": ["a", "def area(r): return r * r", LONG, "Ünïcode 漢字 🙂"]}
WITH_NEGATIVES = {**PROMPTS, "negative_prompts": [LONG[7:], LONG[200:], "?", "The river bends north of the old town."]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama, dynamic rope": ("llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": 16}),
    "mistral": ("mistral", {"head_dim": 32}),
    "mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"rope_scaling": YARN}),
    "qwen2, window": ("qwen2", {**ALL_LAYERS, "sliding_window": WINDOW}),
    "qwen3": ("qwen3", {"attention_bias": True}),
}


def two_experts(base: Path, experts: list[Path | str], first: dict[str, Any], **options: Any) -> dict[str, Any]:
    config = merge_config(base, experts, **options)
    config["experts"][0] |= first
    return config


@pytest.mark.parametrize("prompt_model", ["base", "expert", "grafted"])
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=ENGINES) for name in FAMILIES if name != "llama")]
)
def test_rows_are_what_transformers_computes(name: str, mode: str, prompt_model: str, zoo: Callable[..., Path]) -> None:
    family, options = FAMILIES[name]
    base, expert = zoo(family, **options), zoo(family, seed=1, **options)
    reader = {
        "base": lambda: load_dense(base),
        "expert": lambda: load_dense(expert),
        "grafted": lambda: load_grafted(base, expert),
    }[prompt_model]()

    rows, _ = computed_rows(two_experts(base, [expert, base], WITH_NEGATIVES, mode=mode, prompt_model=prompt_model))

    prompts = (WITH_NEGATIVES["positive_prompts"], WITH_NEGATIVES["negative_prompts"])
    expected = direct_rows(reader, base, mode, *prompts)
    assert rows.dtype == np.float32
    assert np.abs(rows - expected).max() < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_a_blank_prompt_is_the_beginning_of_a_text(mode: str, zoo: Callable[..., Path]) -> None:
    """As in mergekit-moe, which puts the BOS token before it."""
    base, expert = zoo("llama"), zoo("llama", seed=1)
    prompts: dict[str, Any] = {"positive_prompts": [""], "negative_prompts": ["def area(r)"]}
    rows, _ = computed_rows(two_experts(base, [expert, base], prompts, mode=mode))
    expected = direct_rows(load_dense(base), base, mode, ["<s>"], prompts["negative_prompts"])
    assert np.abs(rows - expected).max() < TOLERANCE


def test_the_three_models_that_read_prompts_give_different_rows(zoo: Callable[..., Path]) -> None:
    base, expert = zoo("llama"), zoo("llama", seed=1)
    rows = [
        computed_rows(two_experts(base, [expert, base], PROMPTS, prompt_model=name))[0]
        for name in ("base", "expert", "grafted")
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(rows[first][1:] - rows[second][1:]).max() > 0.01
    # The input of layer 0 is the embedding, which is the base's in the grafted model too.
    np.testing.assert_allclose(rows[0][0], rows[2][0], atol=1e-7)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_the_window_is_felt_by_long_prompts(mode: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    windowed = zoo("mistral", sliding_window=WINDOW)
    wide = copy_model(windowed, tmp_path / "wide", config={"sliding_window": None})
    difference = {}
    for name, text in (("long", LONG), ("short", "a b c")):
        rows = [
            computed_rows(two_experts(model, [model, model], {"positive_prompts": [text]}, mode=mode))[0]
            for model in (windowed, wide)
        ]
        difference[name] = np.abs(rows[0] - rows[1]).max()
    assert difference["long"] > 1e-3
    assert difference["short"] == 0.0


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=ENGINES) for name in ("mistral", "qwen2", "qwen3"))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [PROMPTS, WITH_NEGATIVES], ids=["positive", "negative"])
def test_cheap_embed_sums_token_embeddings(
    extra: dict[str, Any], dtype: str, family: str, zoo: Callable[..., Path]
) -> None:
    base, expert = zoo(family, dtype=dtype), zoo(family, seed=1, dtype=dtype)
    rows, _ = computed_rows(two_experts(base, [expert, base], extra, mode="cheap_embed"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    table = load_dense(base).get_input_embeddings().weight.detach().double().numpy()

    def direction(prompts: list[str]) -> Any:
        total = sum(table[token] for text in prompts for token in tokenizer("<s>" + text)["input_ids"])
        return total / np.linalg.norm(total)

    expected = direction(extra["positive_prompts"])
    if "negative_prompts" in extra:
        expected = expected - direction(extra["negative_prompts"])
        expected /= np.linalg.norm(expected)
    assert rows.shape == (3, 64)
    assert np.abs(rows - expected).max() < TOLERANCE


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_a_bos_in_the_prompt_is_not_doubled(mode: str, zoo: Callable[..., Path]) -> None:
    base = zoo("llama")
    texts = ["a", "def area(r): return r * r"]
    without, with_bos, twice = (
        computed_rows(two_experts(base, [base, base], {"positive_prompts": prompts}, mode=mode))[0]
        for prompts in (texts, ["<s>" + text for text in texts], ["<s><s>" + text for text in texts])
    )
    np.testing.assert_array_equal(without, with_bos)
    assert np.abs(without - twice).max() > 1e-3


@pytest.mark.parametrize("prompt_model", ["expert", "grafted"])
def test_the_gate_pass_sees_a_lora_delta(prompt_model: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    modules = ["self_attn.v_proj", "mlp.down_proj"]
    adapter = save_lora(tmp_path / "adapter", base, modules, rank=4, alpha=6.0)
    factors = transformers.modeling_utils.load_state_dict(adapter / "adapter_model.safetensors")
    changed = {}
    for name, weight in tensors_of(base).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in factors:
            changed[name] = weight + 1.5 * (factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"])
    assert len(changed) == 6
    tuned = copy_model(base, tmp_path / "tuned", tensors=changed)
    reader = load_dense(tuned) if prompt_model == "expert" else load_grafted(base, tuned)

    experts: list[Path | str] = [f"{base}+{adapter}", base]
    rows, plain = computed_rows(two_experts(base, experts, PROMPTS, prompt_model=prompt_model))

    expected = direct_rows(reader, base, "hidden", PROMPTS["positive_prompts"])
    assert np.abs(rows - expected).max() < TOLERANCE
    untouched = direct_rows(load_dense(base), base, "hidden", PROMPTS["positive_prompts"])
    assert np.abs(rows - untouched).max() > 1e-3
    assert plain.shape == rows.shape


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_rows_agree_with_a_resident_bfloat16_model(
    family: str, native: bool, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_loader, "_multiplies_bfloat16", lambda: native)
    base = zoo(family, dtype="bfloat16")
    resident = load_dense(base)
    assert resident.dtype == torch.bfloat16
    rows, _ = computed_rows(two_experts(base, [base, base], PROMPTS))
    expected = direct_rows(resident, base, "hidden", PROMPTS["positive_prompts"])
    assert (rows * expected).sum(axis=1).min() > 0.9999
    # On a CPU without products of bfloat16 it computes in float32: the very rows of the same weights widened.
    widened = direct_rows(resident.float(), base, "hidden", PROMPTS["positive_prompts"])
    assert (np.abs(rows - widened).max() < TOLERANCE) is not native
