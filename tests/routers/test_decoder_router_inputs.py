"""What a router sees, streamed: against hooks on the FFNs of a resident transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.architectures import FAMILIES as DENSE_FAMILIES
from raymoe.architectures import DenseSpec, read_spec
from raymoe.config.model_refs import parse_model_ref
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePrompts
from raymoe.planning.tensor_sources import weight_refs
from raymoe.routers.streamed_decoder import StreamedDecoder
from raymoe.routers.tokenize import Batch, batches
from raymoe.sources.facts import SourceFile
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import resolve_model
from raymoe.storage.source_reader import SourceReader
from tests.pico import LAYERS, load_dense, merge_config
from tests.routers.test_streamed_decoder import LENGTHS, prompts_of

pytestmark = pytest.mark.engines

WINDOWS = {"use_sliding_window": True, "sliding_window": 12}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {**WINDOWS, "max_window_layers": 0}),
    "qwen2, window on some layers": ("qwen2", {**WINDOWS, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
}


def readable(folder: Path, *, last_ffn: bool) -> GatePrompts:
    """A dense model to stream, with or without the FFN of its last layer."""
    facts = resolve_model(parse_model_ref(str(folder)))
    spec = read_spec(facts.config, facts.label)
    assert isinstance(spec, DenseSpec)
    refs = weight_refs(facts, spec)
    if not last_ffn:
        refs = {name: ref for name, ref in refs.items() if not name.startswith(f"model.layers.{LAYERS - 1}.mlp.")}
        assert len(refs) < len(weight_refs(facts, spec))
    return GatePrompts(owner=Owner.expert(0), positive=(), negative=(), config=facts.config, weights=refs)


def streamed(model: GatePrompts, groups: Sequence[Sequence[Sequence[int]]]) -> dict[tuple[int, ...], torch.Tensor]:
    """(layers, tokens, hidden) at the real tokens of each text."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def visit(layer: int, number: int, state_BTH: torch.Tensor) -> None:
        for row, text in enumerate(groups[number]):
            found.setdefault(tuple(text), []).append(state_BTH[row, : len(text)].clone())
            assert len(found[tuple(text)]) == layer + 1

    with SourceReader(HubOptions()) as reader:
        list(StreamedDecoder(model, reader, "cpu").router_inputs([Batch(group) for group in groups], LAYERS, visit))
    return {text: torch.stack(layers) for text, layers in found.items()}


def hooked(folder: Path, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """(layers, tokens, hidden) for each text: what the FFNs of the resident model get."""
    model, seen = load_dense(folder), []
    for layer in model.model.layers:
        ffn = getattr(layer, DENSE_FAMILIES[model.config.model_type].ffn)
        ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].clone()))
    found = []
    for text in texts:
        seen.clear()
        with torch.inference_mode():
            model(torch.tensor([text]), use_cache=False)
        found.append(torch.stack(seen))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_router_inputs_are_what_the_ffns_get(name: str, zoo: Callable[..., Path]) -> None:
    family, options = FAMILIES[name]
    folder, texts = zoo(family, **options), prompts_of(LENGTHS)
    whole = readable(folder, last_ffn=True)
    padded = streamed(whole, list(batches(texts)))
    assert padded.keys() == {tuple(text) for text in texts}
    for text, expected in zip(texts, hooked(folder, texts), strict=True):
        torch.testing.assert_close(padded[tuple(text)], expected, rtol=0, atol=2e-5)
    # The FFN of the last layer has no say, whether it is there to be read or not.
    without = streamed(readable(folder, last_ffn=False), list(batches(texts)))
    for text in texts:
        assert torch.equal(without[tuple(text)], padded[tuple(text)])


def test_the_ffn_of_the_last_layer_is_not_read(zoo: Callable[..., Path]) -> None:
    model = readable(zoo("llama"), last_ffn=True)
    last = f"model.layers.{LAYERS - 1}.mlp."
    gone = {
        name: replace(ref, entry=replace(ref.entry, file=SourceFile(location="/gone.safetensors", size=1)))
        if name.startswith(last)
        else ref
        for name, ref in model.weights.items()
    }
    text = prompts_of([5])
    found, expected = streamed(replace(model, weights=gone), [text]), streamed(model, [text])
    assert torch.equal(found[tuple(text[0])], expected[tuple(text[0])])


def test_a_grafted_model_sees_the_experts_ffn(zoo: Callable[..., Path]) -> None:
    base, expert = zoo("llama"), zoo("llama", seed=1)
    text = prompts_of([9])[0]
    plan = raymoe.plan(merge_config(base, [expert, base], prompt_model="grafted"))
    own = streamed(readable(base, last_ffn=True), [[text]])[tuple(text)]
    # `hidden` plans the first layers only: as many are run.
    found: list[torch.Tensor] = []
    with SourceReader(HubOptions()) as reader:
        decoder = StreamedDecoder(plan.gates.experts[0], reader, "cpu")
        for _ in decoder.router_inputs([Batch([text])], LAYERS - 1, lambda *seen: found.append(seen[2][0].clone())):
            pass
    assert torch.equal(found[0], own[0])
    assert (found[1] - own[1]).abs().max() > 0.01
