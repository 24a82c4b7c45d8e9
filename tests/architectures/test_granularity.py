"""FFNs cut into several experts (`granularity`): at the start, the merge computes what whole FFNs compute.

With E sources, granularity G and K of `experts_per_token`, a layer has E * G experts, of which K * G work on a token.
The experts of a source have equal router rows, so the router chooses all of them or none. Each has 1 / G of the
source's weight, and `ffn.down` is multiplied by G.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import raymoe
from raymoe.architectures import MOE_ARCHITECTURES
from tests.architectures.pairs import MAX_DIFFERENCE, PAIRS, Pair, load_merged
from tests.pico import load_dense, logits_of, merge_config, merge_without_ray, plan_problems, tensors_of, token_ids

pytestmark = pytest.mark.engines

TOKENS = 24
G = 4
# One pair for each architecture without a shared expert, and one with.
FIRST = list({(pair.host, pair.shared): pair for pair in reversed(PAIRS) if pair.family != "hunyuan_v1_dense"}.values())
COPIES = [*FIRST, next(pair for pair in PAIRS if pair.family == "hunyuan_v1_dense" and not pair.shared)]


def off(pair: Pair) -> dict[str, Any]:
    return {"shared_options": {"residual_scale": 0.0}} if pair.shared else {}


@pytest.mark.parametrize("pair", COPIES, ids=str)
def test_cut_copies_compute_what_the_model_computes(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    pair.skip_where_unknown()
    dense, ids = zoo(pair.family, **pair.options), token_ids(TOKENS)
    # One source works on a token, which takes all of its experts.
    config = pair.config(dense, [dense] * 3, dense, mode="random", granularity=G, experts_per_token=1, **off(pair))

    plan = merge_without_ray(config, tmp_path / "merged")

    merged = load_merged(tmp_path / "merged")
    assert MOE_ARCHITECTURES[pair.host].entry(plan.text_config, MOE_ARCHITECTURES[pair.host].experts_key)[1] == 3 * G
    assert (logits_of(merged, ids) - logits_of(load_dense(dense), ids)).abs().max() < MAX_DIFFERENCE


@pytest.mark.parametrize("name", ["qwen3-qwen3_moe", "llama-mixtral", "lfm2-lfm2_moe", "granite_swa-granitemoe_swa"])
@pytest.mark.parametrize("granularity", [2, 8])
def test_cut_experts_compute_what_whole_ones_compute(
    name: str, granularity: int, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Also of models that differ, with two of three at work."""
    pair = next(pair for pair in PAIRS if str(pair) == name)
    pair.skip_where_unknown()
    base, *experts = (zoo(pair.family, seed=seed, **pair.options) for seed in range(4))
    config = pair.config(base, experts, base, mode="random", experts_per_token=2)
    merge_without_ray(config, tmp_path / "whole")
    merge_without_ray({**config, "granularity": granularity}, tmp_path / "cut")
    whole, cut = (logits_of(load_merged(tmp_path / folder), token_ids(TOKENS)) for folder in ("whole", "cut"))
    assert (whole - cut).abs().max() < MAX_DIFFERENCE


def test_with_layers_noise_and_an_adapter(zoo: Callable[..., Path], tmp_path: Path) -> None:
    from tests.pico import save_lora

    base = zoo("qwen3", num_hidden_layers=3)
    lora = save_lora(tmp_path / "lora", base, ("down_proj", "up_proj"))
    config = merge_config(base, [f"{base}+{lora}", base], mode="random", granularity=2, moe_layers="odd")
    merge_without_ray(config, tmp_path / "cut")
    merge_without_ray({**config, "granularity": 1}, tmp_path / "whole")
    cut, whole = tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "whole")
    names = {name for name in cut if ".experts." in name}
    assert {name.split(".")[2] for name in names} == {"1"}
    block = "model.layers.1.mlp.experts"
    for expert in range(2):
        parts = [cut[f"{block}.{2 * expert + part}.down_proj.weight"] for part in range(2)]
        assert torch.equal(torch.cat(parts, dim=1), 2 * whole[f"{block}.{expert}.down_proj.weight"])
        parts = [cut[f"{block}.{2 * expert + part}.up_proj.weight"] for part in range(2)]
        assert torch.equal(torch.cat(parts), whole[f"{block}.{expert}.up_proj.weight"])
    rows = cut["model.layers.1.mlp.gate.weight"]
    assert torch.equal(rows, whole["model.layers.1.mlp.gate.weight"].repeat_interleave(2, dim=0))


def test_gate_and_up_are_copied(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("llama"), [zoo("llama")] * 2, mode="random", granularity=2)
    plan = raymoe.plan(config, allow_all_same=True)
    kinds = {type(part.what).__name__ for shard in plan.shards for part in shard.parts if ".w1." in part.name}
    assert kinds == {"Copy"}
    assert (plan.experts, plan.text_config["num_experts_per_tok"], plan.text_config["intermediate_size"]) == (4, 4, 48)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"granularity": 5}, ["granularity is 5, which does not divide the width of the base's FFN, 96", "2, 3, 4, 6"]),
        ({"granularity": 2, "experts_per_token": 3}, ["experts_per_token is 3, but there are only 2 experts"]),
    ],
)
def test_refusals(keys: dict[str, Any], said: list[str], zoo: Callable[..., Path]) -> None:
    report = plan_problems(merge_config(zoo("llama"), [zoo("llama")] * 2, mode="random", **keys))
    assert all(text in report for text in said), report


def test_a_shared_expert_as_wide_as_an_expert_is_refused(zoo: Callable[..., Path]) -> None:
    dense = zoo("hunyuan_v1_dense")
    report = plan_problems(merge_config(dense, [dense] * 2, shared=dense, mode="random", granularity=2))
    assert "Hunyuan MoE: granularity 2 with shared_experts: its shared expert is as wide as an expert" in report


@pytest.mark.parametrize(("dtype", "most", "least"), [(torch.float32, 0.0, 0.0), (torch.bfloat16, 0.006, 0.002)])
def test_ties_of_sources_are_rare(dtype: torch.dtype, most: float, least: float) -> None:
    """The share of tokens for which a router chooses experts of two sources, with one at work: docs/upcycling.md."""
    generator, hidden, sources = torch.Generator().manual_seed(0), 1024, 8
    rows = (2 * torch.rand(sources, hidden, generator=generator) - 1) * hidden**-0.5
    states = torch.randn(20_000, hidden, generator=generator)
    scores = states.to(dtype) @ rows.repeat_interleave(G, dim=0).to(dtype).T
    _, chosen = scores.softmax(dim=-1, dtype=torch.float32).topk(G, dim=-1)
    mixed = (chosen // G != chosen[:, :1] // G).any(dim=-1).float().mean().item()
    assert least <= mixed <= most
