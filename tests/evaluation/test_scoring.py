"""The streamed pass against transformers with the whole model in memory: every family, every host."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raymoe
from raymoe.checkpoints.weight_table import active_parameters, mixture_model
from raymoe.config.model_refs import parse_model_ref
from raymoe.evaluation import scoring
from raymoe.evaluation.scoring import Variant
from raymoe.routers.layer_loader import LayerLoader, LayerParts, LoadedLayer
from raymoe.sources.resolve import resolve_model
from tests.architectures.pairs import (
    DYNAMIC,
    LLAMA3,
    MAX_DIFFERENCE,
    PAIRS,
    YARN,
    Mixture,
    Pair,
    graft,
    load_merged,
    make_mixture,
    moe_blocks,
    router_module,
    router_of,
)
from tests.evaluation.streamed import LENGTHS, assert_close, open_dense, open_mixture, resident, streamed, texts_of
from tests.pico import HIDDEN, LAYERS, copy_model, load_dense, merge_config, merge_without_ray, save_lora, tensors_of

pytestmark = pytest.mark.engines

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_scaling": LLAMA3}),
    "llama, dynamic rope": ("llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": 16}),
    "mistral, window": ("mistral", {"sliding_window": 12}),
    "qwen2, yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_is_what_transformers_computes(name: str, zoo: Callable[..., Path]) -> None:
    family, options = DENSE[name]
    folder, texts = zoo(family, **options), texts_of()
    model = load_dense(folder)
    expected = []
    for text in texts:
        # Dynamic RoPE remembers the longest sequence; each text is to be read as if it were the first.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        expected += resident(model, [text])
    assert_close(streamed(open_dense(folder), texts)["own"], expected)


def test_a_lora_is_part_of_the_model(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, texts = zoo("llama"), texts_of()
    adapter = save_lora(tmp_path / "adapter", base, ["q_proj", "down_proj", "lm_head"])
    held = tensors_of(adapter_as_model(adapter))
    changed = {}
    for name, weight in tensors_of(base).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in held:
            changed[name] = weight + 1.5 * (held[f"{prefix}B.weight"] @ held[f"{prefix}A.weight"])
    assert "lm_head.weight" in changed and len(changed) == 2 * LAYERS + 1
    tuned = copy_model(base, tmp_path / "tuned", tensors=changed)
    found = streamed(open_dense(f"{base}+{adapter}"), texts)["own"]
    assert_close(found, resident(load_dense(tuned), texts))
    assert max(np.abs(a - b).max() for a, b in zip(found, resident(load_dense(base), texts), strict=True)) > 0.01


def adapter_as_model(adapter: Path) -> Path:
    (adapter / "model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_mixture_is_what_transformers_computes(pair: Pair, mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    """With each number of experts per token: the weights are the same, and only config.json tells.

    In the same pass, each text by one expert alone: that is the base with the expert's FFN. And other numbers of
    experts, which are what the merges with these numbers compute.
    """
    merged = mixture(pair)
    own = [number % len(merged.experts) for number in range(len(LENGTHS))]
    others = sorted(set(pair.experts_per_token) - {2})
    more = (Variant(name="oracle", forced=own), Variant(name="again"))
    more += tuple(Variant(name=f"{count} per token", per_token=count) for count in others)
    found = assert_is_what_transformers_computes(merged.folder, 2, *more)
    assert_close(found["oracle"], expected_of_experts(merged, own), tolerance=MAX_DIFFERENCE)
    # Variants share the pass, and nothing else.
    assert_close(found["again"], found["own"], tolerance=0)
    facts = resolve_model(parse_model_ref(str(merged.folder)))
    model = mixture_model(facts)
    assert active_parameters(facts, model, 2) == raymoe.plan(merged.config).totals.active_parameters
    for per_token in others:
        plan = raymoe.plan({**merged.config, "experts_per_token": per_token})
        other = copy_model(merged.folder, tmp_path / str(per_token), config=plan.config)
        of_config = assert_is_what_transformers_computes(other, per_token)["own"]
        assert_close(found[f"{per_token} per token"], of_config, tolerance=0)
        assert active_parameters(facts, model, per_token) == plan.totals.active_parameters


# Two layouts of routers that a gate mode computes.
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4]], ids=str)
def test_routers_of_a_gate_mode_are_read_the_same_way(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    assert_is_what_transformers_computes(make_mixture(pair, zoo, tmp_path / "merged", "hidden").folder, 2)


def assert_is_what_transformers_computes(folder: Path, per_token: int, *more: Variant) -> dict[str, list[Any]]:
    """The log-likelihoods of its own routers, and of more variants that are not looked at."""
    model, texts = load_merged(folder), texts_of()
    choices: dict[tuple[int, int], Any] = {}

    def see(layer: int, text: int, experts: Any, weights: Any) -> None:
        assert experts.shape == weights.shape == (LENGTHS[text], per_token)
        choices[layer, text] = experts

    found = streamed(open_mixture(folder), texts, Variant(name="own", on_routing=see), *more)
    with seen_by_routers(model) as seen:
        assert_close(found["own"], resident(model, texts), tolerance=MAX_DIFFERENCE)
    assert len(choices) == LAYERS * len(texts) == len(seen)
    for number, scores_TE in enumerate(seen):
        text, layer = divmod(number, LAYERS)
        # A tie within rounding may fall either way.
        best = scores_TE.max(axis=1)
        first = np.take_along_axis(scores_TE, choices[layer, text][:, :1], axis=1)[:, 0]
        np.testing.assert_allclose(first, best, rtol=0, atol=1e-5)
    return found


@contextmanager
def seen_by_routers(model: Any) -> Iterator[list[Any]]:
    """(tokens, experts) of each text and layer, from what the resident model's routers see."""
    seen: list[Any] = []

    def watch(block: Any) -> Any:
        rows = router_of(block)
        return router_module(block).register_forward_pre_hook(
            lambda _, args: seen.append((args[0].reshape(-1, HIDDEN) @ rows.T).numpy())
        )

    hooks = [watch(block) for block in moe_blocks(model)]
    yield seen
    for hook in hooks:
        hook.remove()


def expected_of_experts(merged: Mixture, own: Sequence[int]) -> list[Any]:
    """What the base with the FFN of expert `own[text]` computes of each text."""
    gates = None
    if merged.pair.gates_shared:
        gates = [block.shared_expert_gate.weight.detach() for block in moe_blocks(load_merged(merged.folder))]
    model, found = load_dense(merged.base), {}
    for number, expert in enumerate(merged.experts):
        graft(model, expert, merged.shared_or_none, gates)
        texts = {text: ids for text, ids in enumerate(texts_of()) if own[text] == number}
        found |= dict(zip(texts, resident(model, list(texts.values())), strict=True))
    return [found[text] for text in range(len(own))]


def test_null_says_that_there_is_none(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Queries that are not made of latent numbers: where the key is missing, they would be."""
    base, expert = zoo("youtu", q_lora_rank=None), zoo("youtu", seed=1, q_lora_rank=None)
    folder = tmp_path / "merged"
    merge_without_ray(merge_config(base, [base, expert]), folder)
    texts = texts_of()
    found = streamed(open_mixture(folder), texts)["own"]
    assert_close(found, resident(load_merged(folder), texts), tolerance=MAX_DIFFERENCE)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[4]], ids=str)
def test_other_rows_are_another_merge(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    first = make_mixture(pair, zoo, tmp_path / "first")
    other = make_mixture(pair, zoo, tmp_path / "other", "hidden")
    blocks, texts = moe_blocks(load_merged(other.folder)), texts_of()
    rows = np.stack([block.gate.weight.detach().numpy() for block in blocks])
    shared = np.stack([b.shared_expert_gate.weight.detach().numpy() for b in blocks]) if pair.gates_shared else None
    found = streamed(open_mixture(first.folder), texts, Variant(name="other", rows=rows, shared_rows=shared))["other"]
    assert_close(found, streamed(open_mixture(other.folder), texts)["own"], tolerance=0)
    assert np.abs(found[1] - streamed(open_mixture(first.folder), texts)["own"][1]).max() > 1e-3


def test_neither_passes_nor_blocks_change_a_value(
    mixture: Callable[..., Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, texts = mixture(PAIRS[0]), texts_of()
    at_once = streamed(open_mixture(merged.folder), texts)["own"]
    monkeypatch.setattr(scoring, "STATE_BYTES", 40 * HIDDEN * 4)
    monkeypatch.setattr(scoring, "_VOCAB_BLOCK", 100)
    monkeypatch.setattr(scoring, "_TOKEN_BLOCK", 7)
    assert len(list(scoring._passes(texts, HIDDEN * 4))) == 4
    assert_close(streamed(open_mixture(merged.folder), texts)["own"], at_once, tolerance=2e-6)


@pytest.mark.parametrize("layers", [3, 9])
def test_two_layers_at_most_are_alive(
    layers: int, zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of a layer are gone when the next but one is read, however deep the model is."""
    pair = Pair("llama", "mixtral", options={"num_hidden_layers": layers})
    model = open_mixture(make_mixture(pair, zoo, tmp_path / "merged").folder)
    alive: list[set[int]] = []
    held: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    load = LayerLoader._load

    def watched(loader: LayerLoader, parts: LayerParts, *buffer: Any) -> LoadedLayer:
        loaded = load(loader, parts, *buffer)
        held.extend((len(alive), weakref.ref(tensor)) for tensor in loaded.weights.values())
        gc.collect()
        alive.append({number for number, tensor in held if tensor() is not None})
        return loaded

    monkeypatch.setattr(LayerLoader, "_load", watched)
    streamed(model, texts_of())
    assert len(alive) == layers
    assert all(layer in found and found <= {layer - 1, layer} for layer, found in enumerate(alive))
