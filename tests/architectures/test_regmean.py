"""RegMean in every dense family: its matrices against a reference from the paper, with transformers' own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from raymoe.planning.plan import MergePlan
from tests.architectures.pairs import Pair
from tests.architectures.test_backbone import FAMILY_PAIRS, expected_backbone
from tests.pico import (
    PROMPTS,
    Tensors,
    copy_model,
    load_dense,
    merge_config,
    merge_without_ray,
    save_lora,
    tensors_of,
)

ALPHA = 0.8
NOT_ATTENTION = (".mlp.", ".shared_mlp.", ".feed_forward.")
Moments = dict[str, torch.Tensor]


def second_moments(folder: Path, prompts: tuple[str, ...]) -> Moments:
    """By the name of a matrix of attention: the mean of x x^T over its inputs, which are rounded to bfloat16,
    and the first token of each prompt does not count."""
    model, tokenizer = load_dense(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    inputs: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: inputs.setdefault(name, []).append(args[0].flatten(0, -2)[1:]))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name and not any(n in name for n in NOT_ATTENTION):
            watch(f"{name}.weight", module)
    for text in prompts:
        with torch.inference_mode():
            model(torch.tensor([tokenizer.encode(f"<s>{text}", add_special_tokens=False).ids]))
    found = {}
    for name, seen in inputs.items():
        x = torch.cat(seen).bfloat16().double()
        found[name] = x.T @ x / len(x)
    return found


def merged_as_in_the_paper(experts: list[Tensors], moments: list[Moments], weights: list[float]) -> Tensors:
    merged: Tensors = {}
    for name in experts[0]:
        matrices = [expert[name].double() for expert in experts]
        if name not in moments[0]:
            merged[name] = sum(w * x for w, x in zip(weights, matrices, strict=True)) / sum(weights)  # type: ignore[assignment]
            continue
        grams = []
        for weight, each in zip(weights, moments, strict=True):
            gram = each[name]
            grams.append(weight * (ALPHA * gram + (1 - ALPHA) * torch.diag(gram.diagonal())))
        products = sum(x @ gram for x, gram in zip(matrices, grams, strict=True))
        merged[name] = products @ torch.linalg.inv(sum(grams))  # type: ignore[arg-type]
    return merged


@pytest.mark.engines
@pytest.mark.parametrize("pair", FAMILY_PAIRS, ids=str)
def test_matrices_are_those_of_the_paper(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """All matrices of attention, or of what a layer has in its place; the mean of all else."""
    pair.skip_where_unknown()
    base, *experts = (zoo(pair.family, seed=seed, **pair.options) for seed in range(3))
    weights, backbone = [1.0, 3.0], {"method": "regmean", "alpha": ALPHA, "weights": [1, 3], "scale": 0.75}
    config = merge_config(base, experts, mode="random", architecture=pair.host, dtype="float32", backbone=backbone)
    plan = merge_without_ray(config, tmp_path / "out")

    moments = [second_moments(expert, texts) for expert, texts in zip(experts, PROMPTS, strict=False)]
    start, tensors = tensors_of(base), [tensors_of(expert) for expert in experts]
    assert plan.moments is not None
    assert {each.base.entry.name for each in plan.moments.tensors} == moments[0].keys()
    merged, mean = (merged_as_in_the_paper(tensors, each, weights) for each in (moments, [{}, {}]))
    scaled = [{n: start[n].double() + 0.75 * (m[n] - start[n].double()) for n in start} for m in (merged, mean)]
    expected, plain = (expected_backbone(pair, plan, each) for each in scaled)
    written = tensors_of(tmp_path / "out")
    for name, tensor in expected.items():
        error, change = (written[name] - tensor).norm(), (tensor - plain[name]).norm()
        if change:  # inputs near the middle of two bfloat16 numbers may be rounded to the other one
            assert error < 0.02 * change, (name, error / change)
        else:
            assert torch.allclose(written[name].double(), tensor, rtol=0, atol=2e-6), name


@pytest.mark.parametrize("family", ["llama", "phi3", "glm"])
def test_copies_of_one_model_are_exact(family: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """In files of their own, so that all is computed: the bytes are those of the base."""
    dense = zoo(family, dtype="bfloat16")
    copies = [copy_model(dense, tmp_path / f"copy{number}") for number in range(2)]
    config = merge_config(dense, copies, mode="random", backbone="regmean")
    plan = merge_without_ray(config, tmp_path / "out")
    assert plan.moments is not None
    merge_without_ray({**config, "backbone": "base"}, tmp_path / "base")
    assert_same_bits(tmp_path / "base", tmp_path / "out")


def test_one_expert_is_copied(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, expert = zoo("llama"), zoo("llama", seed=1)
    config = merge_config(base, [expert], mode="random", experts_per_token=1)
    config["experts"][0]["positive_prompts"] = list(PROMPTS[0])
    plans: list[MergePlan] = []
    for number, backbone in enumerate(("linear", "regmean")):
        plans.append(merge_without_ray({**config, "backbone": backbone}, tmp_path / str(number)))
    assert plans[1].moments is None and plans[0].shards == plans[1].shards


def test_adapters_are_merged_as_the_models_that_they_make(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Their base's layers are read once for all of them."""
    base = zoo("llama", seed=4)
    modules, models, adapters = ["q_proj", "v_proj", "o_proj", "up_proj"], [], []
    for seed in range(2):
        adapter = save_lora(tmp_path / f"lora{seed}", base, modules, seed=seed)
        held, factors = tensors_of(base), tensors_of_adapter(adapter)
        for name in list(held):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in factors:
                held[name] += 1.5 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
        models.append(copy_model(base, tmp_path / f"model{seed}", tensors=held))
        adapters.append(f"{base}+{adapter}")
    written = []
    for number, experts in enumerate((adapters, models)):
        config = merge_config(base, experts, mode="random", backbone="regmean")
        merge_without_ray(config, tmp_path / str(number))
        written.append(tensors_of(tmp_path / str(number)))
    for name, tensor in written[0].items():
        change = (tensor - tensors_of(base)[name]).norm() if ".self_attn." in name else torch.tensor(0.0)
        assert (tensor - written[1][name]).norm() <= 2e-3 * change + 1e-5, name


def tensors_of_adapter(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    before, after = tensors_of(one), tensors_of(other)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].view(torch.int16).equal(after[name].view(torch.int16)), name
