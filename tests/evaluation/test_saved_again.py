"""A merge that transformers has loaded and saved again: other keys in its config.json, the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.errors import ProblemReport
from raymoe.report.inspect import inspect_checkpoint
from tests.architectures.pairs import PAIRS, Mixture, Pair, load_merged
from tests.evaluation.streamed import open_mixture, streamed, texts_of
from tests.pico import copy_model, tensors_of

pytestmark = pytest.mark.engines

# One a host, and one that turns a part of each head; DeepSeek-MoE v1 has a configuration of its own, which is not in
# transformers.
HOST_PAIRS = [next(p for p in PAIRS if p.host == host) for host in MOE_ARCHITECTURES if host != "deepseek"]
HOST_PAIRS.append(next(p for p in PAIRS if p.family == "glm"))


@pytest.mark.parametrize("pair", HOST_PAIRS, ids=str)
def test_it_is_read_as_before(pair: Pair, mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    pair.skip_where_unknown()
    first, again = mixture(pair).folder, tmp_path / "again"
    load_merged(first).save_pretrained(again)
    models = [open_mixture(first), open_mixture(again)]
    assert models[0].rule == models[1].rule
    before, after = (streamed(model, texts_of((17, 5)))["own"] for model in models)
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fused_experts_are_named(mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    """What transformers 5 writes when it is told not to go back to the Hub's names."""
    pair = next(p for p in PAIRS if p.host == "qwen3_moe")
    model = load_merged(mixture(pair).folder)
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    if "mlp.experts.gate_up_proj" not in " ".join(model.state_dict()):
        pytest.skip("transformers 4 has a module for each expert")
    with pytest.raises(
        ProblemReport,
        match=r"all experts of a layer are in one tensor \(model\.layers\.0\.mlp\.experts\.gate_up_proj\)",
    ):
        open_mixture(tmp_path / "again")


def test_qwen3_5_as_older_versions_wrote_it_is_read(mixture: Callable[..., Mixture], tmp_path: Path) -> None:
    """A config.json of the text model alone, and a tensor for each expert and matrix."""
    pair = next(p for p in PAIRS if p.host == "qwen3_5_moe")
    pair.skip_where_unknown()
    now, older = mixture(pair).folder, tmp_path / "older"
    older.mkdir()
    config = json.loads((now / "config.json").read_text())
    (older / "config.json").write_text(
        json.dumps({"architectures": config["architectures"], **config["text_config"], "full_attention_interval": 4})
    )
    tensors = {}
    for name, tensor in tensors_of(now).items():
        block, _, kind = name.partition(".experts.")
        for expert, matrices in enumerate(tensor if kind else []):
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for each, matrix in zip(kinds, matrices.chunk(len(kinds)), strict=True):
                tensors[f"{block}.experts.{expert}.{each}.weight"] = matrix.contiguous()
        if not kind:
            tensors[name] = tensor
    save_file(tensors, older / "model.safetensors", {"format": "pt"})

    models = [open_mixture(now), open_mixture(older)]
    assert models[0].rule == models[1].rule
    before, after = (streamed(model, texts_of((17, 5)))["own"] for model in models)
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    counted = [inspect_checkpoint(folder) for folder in (now, older)]
    for key in ("experts", "parameters", "active_parameters", "routers"):
        assert counted[0][key] == counted[1][key], key


@pytest.mark.parametrize(
    ("host", "changes", "said"),
    [
        ("qwen3_moe", {"num_experts": None, "num_local_experts": 1}, "num_local_experts is 1 and num_experts_per_tok"),
        ("ernie4_5_moe", {"num_experts_per_tok": None, "moe_k": 9}, "moe_num_experts is 3 and moe_k is 9"),
        ("ernie4_5_moe", {"use_bias": True}, r"gives it attn\.k\.bias, attn\.o\.bias, .*, which no merge has"),
        ("hunyuan_v1_moe", {"num_experts_per_tok": None, "moe_topk": [2, 2]}, r"moe_topk is \[2, 2\]"),
    ],
)
def test_numbers_that_can_not_be_are_told_by_their_key(
    host: str, changes: dict[str, object], said: str, mixture: Callable[..., Mixture], tmp_path: Path
) -> None:
    pair = next(p for p in PAIRS if p.host == host)
    pair.skip_where_unknown()
    changed = copy_model(mixture(pair).folder, tmp_path / "changed", config=changes)
    with pytest.raises(ProblemReport, match=said):
        open_mixture(changed)
