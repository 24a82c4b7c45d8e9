"""The streamed decoder: what it reads, in which batches, and that neither changes a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raymoe
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePrompts
from raymoe.routers.streamed_decoder import StreamedDecoder
from raymoe.routers.tokenize import TOKEN_BUDGET, Batch, batches
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.pico import LAYERS, copy_model, load_dense, merge_config, tensors_of
from tests.routers.direct import rows_of_plan

pytestmark = pytest.mark.engines

LENGTHS = (1, 40, 3, 17, 2, 40, 9, 1, 26, 5)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, 400, length).tolist() for length in lengths]


def states(plan_prompts: GatePrompts, groups: Sequence[Sequence[Sequence[int]]]) -> dict[tuple[int, ...], torch.Tensor]:
    """Inputs of all layers at the real tokens, (layers, tokens, hidden) at unit length, by prompt."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    made = [Batch(group) for group in groups]

    def visit(layer: int, number: int, hidden_BTH: torch.Tensor) -> None:
        for row, prompt in enumerate(groups[number]):
            found.setdefault(tuple(prompt), []).append(hidden_BTH[row, : len(prompt)].clone())
            assert len(found[tuple(prompt)]) == layer + 1

    with SourceReader(HubOptions()) as reader:
        list(StreamedDecoder(plan_prompts, reader, "cpu").layer_inputs(made, LAYERS, visit))
    return {prompt: torch.nn.functional.normalize(torch.stack(layers), dim=-1) for prompt, layers in found.items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 12}), ("qwen2", {}), ("qwen3", {})],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_batching_changes_nothing(family: str, options: dict[str, Any], zoo: Callable[..., Path]) -> None:
    base = zoo(family, **options)
    prompts = raymoe.plan(merge_config(base, [base] * 2), allow_all_same=True).gates.experts[0]
    ids = prompts_of(LENGTHS)
    alone = states(prompts, [[prompt] for prompt in ids])
    model = load_dense(base)
    for budget in (1, 60, TOKEN_BUDGET):
        together = states(prompts, list(batches(ids, budget)))
        assert together.keys() == alone.keys()
        for prompt, expected in alone.items():
            torch.testing.assert_close(together[prompt], expected, rtol=0, atol=1e-6)
    for prompt, found in alone.items():
        with torch.inference_mode():
            inputs = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[:LAYERS]
        expected = torch.nn.functional.normalize(torch.stack(inputs)[:, 0], dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 10, 40, 100, TOKEN_BUDGET])
def test_batches_hold_all_prompts_within_the_budget(budget: int) -> None:
    ids = prompts_of(LENGTHS)
    groups = list(batches(ids, budget))
    assert sorted(prompt for group in groups for prompt in group) == sorted(ids)
    for group in groups:
        assert len(group) == 1 or len(group) * max(map(len, group)) <= budget
    assert list(batches([], budget)) == []


def test_a_batch_is_padded_on_the_right() -> None:
    batch = Batch([[5, 6, 7], [8]])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed", "random"])
@pytest.mark.parametrize("prompt_model", ["base", "expert", "grafted"])
def test_what_no_gate_needs_is_not_in_the_plan(mode: str, prompt_model: str, zoo: Callable[..., Path]) -> None:
    base, expert = zoo("llama"), zoo("llama", seed=1)
    plan = raymoe.plan(merge_config(base, [expert, base], mode=mode, prompt_model=prompt_model))
    weights = plan.gates.experts[0].weights
    embedding = {"model.embed_tokens.weight"}
    layers = {name for name in tensors_of(base) if name.startswith(("model.layers.0.", "model.layers.1."))}
    expected = {"random": set(), "cheap_embed": embedding}.get(mode, embedding | layers)
    assert set(weights) == expected
    assert not any("layers.2." in name or "lm_head" in name or name == "model.norm.weight" for name in weights)
    if mode.startswith("hidden"):
        folders = {name: Path(ref.entry.file.location).parent for name, ref in weights.items()}
        ffn = expert if prompt_model in ("expert", "grafted") else base
        rest = expert if prompt_model == "expert" else base
        assert {folders[name] for name in layers if ".mlp." in name} == {ffn}
        assert {folders[name] for name in layers if ".mlp." not in name} == {rest}
        assert folders["model.embed_tokens.weight"] == rest


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_the_last_layer_and_the_head_have_no_say(mode: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    nan = {
        name: torch.full_like(tensor, torch.nan)
        for name, tensor in tensors_of(base).items()
        if name.startswith("model.layers.2.") or name in ("lm_head.weight", "model.norm.weight")
    }
    assert len(nan) == 11
    broken = copy_model(base, tmp_path / "broken", tensors=nan)
    plans = [raymoe.plan(merge_config(m, [m] * 2, mode=mode), allow_all_same=True) for m in (base, broken)]
    whole, partial = (rows_of_plan(plan) for plan in plans)
    for expected, rows in zip(whole, partial, strict=True):
        np.testing.assert_array_equal(rows, expected)
        assert np.isfinite(rows).all()


def test_a_model_of_one_layer_needs_no_layer(zoo: Callable[..., Path]) -> None:
    base = zoo("llama", num_hidden_layers=1)
    plan = raymoe.plan(merge_config(base, [base] * 2), allow_all_same=True)
    assert set(plan.gates.experts[0].weights) == {"model.embed_tokens.weight"}
    rows = rows_of_plan(plan)
    assert [row.shape for row in rows] == [(1, 64)] * 2


def test_progress_counts_every_token_of_every_layer(zoo: Callable[..., Path]) -> None:
    from raymoe.routers.activations import capture
    from raymoe.routers.tokenize import load_tokenizer, tokenize

    base = zoo("llama")
    plan = raymoe.plan(merge_config(base, [base] * 2), allow_all_same=True)
    prompts = plan.gates.experts[0]
    counts: list[int] = []
    with SourceReader(HubOptions()) as reader:
        capture(plan.gates, prompts, reader, members=2, device="cpu", layer_done=counts.append)
    tokenizer = load_tokenizer(base, trust_remote_code=False)
    ids = tokenize(tokenizer, prompts.positive, vocab=416, owner=Owner.expert(0))
    assert sum(counts) == (LAYERS - 1) * sum(map(len, ids))


def test_layers_are_read_and_converted_within_inference_mode(zoo: Callable[..., Path]) -> None:
    """As `raymoe eval` does: the loader's own thread is in no such mode, and fills buffers that were made before."""
    base = zoo("llama", dtype="bfloat16")
    prompts = raymoe.plan(merge_config(base, [base] * 2), allow_all_same=True).gates.experts[0]
    outside = states(prompts, [prompts_of(LENGTHS)])
    with torch.inference_mode():
        within = states(prompts, [prompts_of(LENGTHS)])
    assert within.keys() == outside.keys()
    assert all(torch.equal(within[prompt], outside[prompt]) for prompt in within)
