"""A merged backbone in every dense family: its values, the function of the merge, and what prompts are read with."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raymoe
from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES, DenseSpec, read_spec
from raymoe.planning.plan import Combine, MergePlan
from raymoe.planning.tensor_sources import head_permutation
from raymoe.routers.in_process import compute_routers_locally
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_chunks, shard_range
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import permute_heads
from tests.architectures.pairs import PAIRS, Pair, load_merged
from tests.architectures.test_same_experts import assert_same_logits
from tests.pico import (
    Tensors,
    copy_model,
    load_dense,
    logits_of,
    merge_config,
    merge_without_ray,
    tensors_of,
    token_ids,
)

# One pair per dense family.
FAMILY_PAIRS = list({pair.family: pair for pair in reversed(PAIRS) if not pair.shared}.values())
assert {pair.family for pair in FAMILY_PAIRS} == FAMILIES.keys()
# Plain, fused, permuted, latent, layers of several kinds: the tensors of each other family are as in one of these. The
# values of `linear` are compared in all families.
LAYOUTS = ("llama", "phi3", "glm", "youtu", "granitemoehybrid", "lfm2", "qwen3_5_text", "gemma4_text")
METHODS: list[Any] = ["linear", "slerp", {"method": "ties", "density": 0.3}]


def expected_backbone(pair: Pair, plan: MergePlan, merged: Tensors) -> Tensors:
    """What the output must hold under its names, of tensors under the names of the dense model."""
    config = json.loads((Path(plan.sources[0].folders[0]) / "config.json").read_text())
    spec, host = read_spec(config, "model"), MOE_ARCHITECTURES[pair.host]
    assert isinstance(spec, DenseSpec)
    heads, expected = head_permutation(spec, host), {}
    for row, layer, name in spec.tensors():
        for role, first, last in spec.fused_parts(row) if not row.is_ffn else ():
            tensor = merged[name][first:last]
            if heads is not None and role in ("attn.q", "attn.k", "attn.q.bias", "attn.k.bias"):
                tensor = permute_heads(tensor, heads.head_dim, heads.to_half_split)
            for output in (host.backbone[role], *host.copies.get(role, ())):
                expected[output.format(layer=layer)] = tensor
    return expected


@pytest.mark.engines
@pytest.mark.parametrize("pair", FAMILY_PAIRS, ids=str)
def test_linear_is_the_mean_in_float64(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Of experts of several dtypes, every tensor of the backbone: fused, permuted and renamed ones too."""
    pair.skip_where_unknown()
    base = zoo(pair.family, **pair.options)
    experts = [zoo(pair.family, seed=n, dtype=d, **pair.options) for n, d in ((1, "float32"), (2, "bfloat16"))]
    config = {**merge_config(base, experts, mode="random", architecture=pair.host, dtype="float32")}
    config["backbone"] = {"method": "linear", "weights": [1, 3], "scale": 0.75}
    plan = merge_without_ray(config, tmp_path / "out")

    first, second = map(tensors_of, experts)
    start = {name: tensor.double() for name, tensor in tensors_of(base).items()}
    mean = {name: (first[name].double() + 3 * second[name].double()) / 4 for name in start}
    expected = expected_backbone(pair, plan, {name: start[name] + 0.75 * (mean[name] - start[name]) for name in start})
    written = tensors_of(tmp_path / "out")
    assert expected.keys() == {
        part.name for shard in plan.shards for part in shard.parts if isinstance(part.what, Combine)
    }
    for name, tensor in expected.items():
        assert torch.allclose(written[name].double(), tensor, rtol=0, atol=2e-6), name


@pytest.mark.engines
@pytest.mark.parametrize(
    "pair",
    [pytest.param(p, marks=[] if p.family in LAYOUTS else pytest.mark.soak) for p in FAMILY_PAIRS],
    ids=str,
)
def test_copies_of_one_model_are_exact(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """In files of their own, so that all is computed: the bytes are those of the base, and so is the function."""
    pair.skip_where_unknown()
    dense = zoo(pair.family, dtype="bfloat16", **pair.options)
    copies = [copy_model(dense, tmp_path / f"copy{number}") for number in range(2)]
    config = merge_config(dense, copies, mode="random", architecture=pair.host)
    merge_without_ray(config, tmp_path / "base")
    before = tensors_of(tmp_path / "base")
    for number, method in enumerate(METHODS):
        plan = merge_without_ray({**config, "backbone": method}, tmp_path / str(number))
        assert plan.backbone.combined > 0
        after = tensors_of(tmp_path / str(number))
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].view(torch.int16).equal(after[name].view(torch.int16)), (name, method)


def test_the_merge_computes_with_the_merged_backbone(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """As a dense model with the mean of both and equal FFNs does."""
    pair = next(pair for pair in PAIRS if pair.family == "llama")
    one = zoo("llama")
    tensors = tensors_of(one)
    other = copy_model(
        one,
        tmp_path / "other",
        tensors={name: tensor + 0.1 for name, tensor in tensors.items() if ".mlp." not in name},
    )
    mean = copy_model(
        one, tmp_path / "mean", tensors={name: t + 0.05 for name, t in tensors.items() if ".mlp." not in name}
    )
    merge_without_ray({**merge_config(one, [one, other]), "backbone": "linear"}, tmp_path / "out")
    ids = token_ids(40, rows=2)
    assert_same_logits(pair, logits_of(load_merged(tmp_path / "out"), ids), logits_of(load_dense(mean), ids))


@pytest.mark.parametrize(
    ("family", "mode", "method"),
    [
        # What each reads of the backbone.
        ("llama", "hidden", "linear"),
        pytest.param("llama", "ridge", "linear", marks=pytest.mark.slow),
        ("llama", "cheap_embed", "linear"),
        # Of fused tensors, and of statistics of whole ones.
        ("phi3", "ridge", METHODS[0]),
        *(pytest.param("phi3", "ridge", method, marks=pytest.mark.slow) for method in METHODS[1:]),
    ],
    ids=str,
)
def test_routers_are_those_of_the_merged_model(
    family: str, mode: str, method: Any, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit for bit those that a base gives which holds the merged tensors."""
    base, *experts = (zoo(family, seed=seed, dtype="bfloat16") for seed in range(3))
    config = {**merge_config(base, experts, mode=mode), "backbone": method}
    plan = merge_without_ray(config, tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    held = tensors_of(base)
    merged = {
        name: torch.cat([written[name.replace("qkv", letter)] for letter in "qkv"])
        if "qkv_proj" in name
        else written[name]
        for name in held
        if ".mlp." not in name
    }
    as_base = copy_model(base, tmp_path / "base", tensors=merged)
    expected = raymoe.plan(merge_config(as_base, experts, mode=mode))
    with SourceReader(HubOptions()) as reader:
        rows, _ = compute_routers_locally(plan.gates, reader, device="cpu")
        same, _ = compute_routers_locally(expected.gates, reader, device="cpu")
        others, _ = compute_routers_locally(
            raymoe.plan(merge_config(base, experts, mode=mode)).gates, reader, device="cpu"
        )
    for owner, found in rows.items():
        assert np.array_equal(found, same[owner]) and not np.array_equal(found, others[owner])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_shards_cut_into_jobs_have_the_same_bytes(method: Any, zoo: Callable[..., Path]) -> None:
    """For one actor, and for three that each send a third of every shard."""
    base, *experts = (zoo("qwen3", seed=seed) for seed in range(3))
    plan = raymoe.plan({**merge_config(base, experts, mode="random", dtype="bfloat16"), "backbone": method})
    for shard in plan.worker_shards:
        with SourceReader(HubOptions()) as reader:
            whole = b"".join(bytes(chunk) for chunk in shard_chunks(shard, reader))
        pieces, cuts = [], [shard.nbytes * third // 3 for third in range(4)]
        for start, end in pairwise(cuts):
            with SourceReader(HubOptions()) as reader:
                pieces.append(b"".join(bytes(chunk) for chunk in shard_range(shard, start, end, reader)))
        assert b"".join(pieces) == whole
