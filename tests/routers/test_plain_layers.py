"""raymoe's own decoder layers against transformers', for every family and kind of RoPE that takes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.architectures import FAMILIES
from raymoe.planning.plan import GatePrompts
from raymoe.routers import streamed_decoder
from raymoe.routers.streamed_decoder import StreamedDecoder
from raymoe.routers.tokenize import Batch, batches
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from tests.pico import LAYERS
from tests.routers.test_decoder_router_inputs import readable
from tests.routers.test_streamed_decoder import prompts_of

pytestmark = pytest.mark.engines

PLAIN = [name for name, family in FAMILIES.items() if family.has_plain_layers]
LENGTHS = (1, 40, 3, 100, 17)
SOME = [0.5 + 0.1 * pair for pair in range(8)]
OTHERS = [1.0 + 0.3 * pair for pair in range(8)]
# The models' max_position_embeddings is 256, and texts have up to 100 tokens.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic, within the length": {"factor": 3.0},
    "dynamic, beyond it": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all keys": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {"short_factor": SOME, "long_factor": OTHERS, "original_max_position_embeddings": 32},
    "longrope, with factor": {
        "short_factor": SOME,
        "long_factor": OTHERS,
        "original_max_position_embeddings": 128,
        "factor": 5.0,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide heads": {"head_dim": 48},
    "all heads": {"num_key_value_heads": 4},
    "gelu": {"hidden_act": "gelu"},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "ministral": {
        "sliding_window": 12,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "cwm": {"sliding_window": 12, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "phi3": {"sliding_window": 12},
}

States = dict[tuple[int, ...], torch.Tensor]


def states(model: GatePrompts, groups: Sequence[Sequence[Sequence[int]]]) -> States:
    """What the routers see and the layers' inputs, (2, layers, tokens, hidden), by text."""
    seen: dict[tuple[int, ...], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def keep(kind: int) -> Callable[[int, int, torch.Tensor], None]:
        def visit(layer: int, number: int, state_BTH: torch.Tensor) -> None:
            for row, text in enumerate(groups[number]):
                both = seen.setdefault(tuple(text), ([], []))
                both[kind].append(state_BTH[row, : len(text)].clone())

        return visit

    made = [Batch(group) for group in groups]
    with SourceReader(HubOptions()) as reader:
        list(StreamedDecoder(model, reader, "cpu").router_inputs(made, LAYERS, keep(0)))
        list(StreamedDecoder(model, reader, "cpu").layer_inputs(made, LAYERS, keep(1)))
    return {text: torch.stack([torch.stack(kind) for kind in both]) for text, both in seen.items()}


def both(folder: Path, monkeypatch: pytest.MonkeyPatch, *, alone: bool = False) -> tuple[States, States]:
    """The states of own layers, and of transformers'."""
    model, texts = readable(folder, last_ffn=True), prompts_of(LENGTHS)
    groups = [[text] for text in texts] if alone else list(batches(texts))
    own = states(model, groups)
    with monkeypatch.context() as patch:
        patch.setattr(streamed_decoder, "plain_spec", lambda config: None)
        theirs = states(model, groups)
    assert own.keys() == theirs.keys() == {tuple(text) for text in texts}
    return own, theirs


def assert_alike(folder: Path, monkeypatch: pytest.MonkeyPatch, *, alone: bool = False) -> None:
    own, theirs = both(folder, monkeypatch, alone=alone)
    for text, found in own.items():
        torch.testing.assert_close(found, theirs[text], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_families(family: str, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(zoo(family), monkeypatch)


@pytest.mark.parametrize("name", ROPES)
def test_kinds_of_rope(name: str, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = name.partition(",")[0]
    length = {"max_position_embeddings": 32} if "beyond" in name else {}
    folder = zoo("llama", rope_scaling={"rope_type": kind, **ROPES[name]}, **length)
    plain, _ = both(zoo("llama"), monkeypatch)
    scaled, _ = both(folder, monkeypatch, alone=True)
    if name != "dynamic, within the length":
        assert any((plain[text] - scaled[text]).abs().max() > 1e-3 for text in plain)
    assert_alike(folder, monkeypatch, alone=True)


@pytest.mark.parametrize("family", ["phi3", "ernie4_5", "smollm3"])
def test_scaled_rope_of_other_families(family: str, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "phi3":  # rotates a part of each head, and has the original length outside
        options: dict[str, Any] = {
            "rope_scaling": {"rope_type": "longrope", "short_factor": SOME[:4], "long_factor": OTHERS[:4]},
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
        }
    else:
        options = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    assert_alike(zoo(family, **options), monkeypatch, alone=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(zoo("llama", **VARIANTS[variant]), monkeypatch)


@pytest.mark.parametrize("family", WINDOWED)
def test_windows(family: str, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(zoo(family, **WINDOWED[family]), monkeypatch)


@pytest.mark.parametrize("family", PLAIN)
def test_states_in_bfloat16(family: str, zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor multiplies bfloat16, models in it are computed in it: states differ by rounding alone."""
    own, theirs = both(zoo(family, dtype="bfloat16"), monkeypatch)
    for text, found in own.items():
        cosines = torch.nn.functional.cosine_similarity(found.float(), theirs[text].float(), dim=-1)
        assert cosines.min() > 0.999
        means = (part.float().mean(dim=2) for part in (found, theirs[text]))
        assert torch.nn.functional.cosine_similarity(*means, dim=-1).min() > 0.9999


def test_another_activation_is_left_to_transformers(zoo: Callable[..., Path]) -> None:
    assert streamed_decoder.plain_spec(readable(zoo("llama"), last_ffn=True).config) is not None
    config = {**readable(zoo("llama"), last_ffn=True).config, "hidden_act": "mish"}
    assert streamed_decoder.plain_spec(config) is None


def test_transformers_is_not_imported(zoo: Callable[..., Path]) -> None:
    code = f"""
import sys
from raymoe.architectures import read_spec
from raymoe.config.model_refs import parse_model_ref
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePrompts
from raymoe.planning.tensor_sources import weight_refs
from raymoe.routers.streamed_decoder import StreamedDecoder
from raymoe.routers.tokenize import Batch
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import resolve_model
from raymoe.storage.source_reader import SourceReader
facts = resolve_model(parse_model_ref({str(zoo("llama"))!r}))
refs = weight_refs(facts, read_spec(facts.config, facts.label))
model = GatePrompts(owner=Owner.expert(0), positive=(), negative=(), config=facts.config, weights=refs)
with SourceReader(HubOptions()) as reader:
    list(StreamedDecoder(model, reader, "cpu").router_inputs([Batch([[3, 4, 5]])], {LAYERS}, lambda *_: None))
print("transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"
