"""Keys of mixtures that are left in a dense model's config.json: which those are, and that none reaches a merge."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import raymoe
import raymoe.planning
from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES, MoeArchitecture
from raymoe.architectures.moe_architecture import MIXTURE_KEYS, PER_TOKEN_KEY
from raymoe.planning.build import _DROPPED_KEYS
from tests.pico import copy_model, load_dense, logits_of, merge_config, merge_without_ray, token_ids

# Keys that a host has, a family that it accepts has not, and that are right in a merge as the base's config has them.
_HARMLESS = {
    "sep_token_id",  # Hunyuan
    "sliding_window_pattern",  # Cohere, where `layer_types` is written and counts
}


def known_keys(model_type: str) -> tuple[set[str], Mapping[str, str]]:
    """What a configuration class of transformers takes, and its other names (`attribute_map`)."""
    kind = transformers.CONFIG_MAPPING[model_type]
    return taken_by(kind) | set(kind.attribute_map), kind.attribute_map


def taken_by(kind: Any) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}  # transformers 4


def pairs() -> list[Any]:
    return [
        pytest.param(host, family, id=f"{family}-{host.name}")
        for host in MOE_ARCHITECTURES.values()
        for family in host.accepts
        if not host.code_repository
    ]


def plan_of(base: Path, host: MoeArchitecture) -> raymoe.planning.MergePlan:
    return raymoe.plan(merge_config(base, [base] * 2, mode="random", architecture=host.name), allow_all_same=True)


@pytest.mark.parametrize(("host", "family"), pairs())
def test_the_table_has_every_key_that_transformers_reads(
    host: MoeArchitecture, family: str, zoo: Callable[..., Path]
) -> None:
    """A key of the host's class that the family's has not is written, or dropped, or of no account."""
    for model_type in (host.model_type, family):
        if model_type not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    of_host, names = known_keys(host.model_type)
    stray = of_host - known_keys(family)[0] - taken_by(transformers.PretrainedConfig)
    output = plan_of(zoo(family), host).text_config
    dropped = MIXTURE_KEYS | _DROPPED_KEYS | set(FAMILIES[family].dropped)
    assert stray - dropped - output.keys() <= _HARMLESS
    # A key under its other name would stand beside the one that raymoe writes.
    for other, key in names.items():
        assert other in dropped or key not in output or other in known_keys(family)[0], (other, key)


@pytest.mark.parametrize(
    "host", [host for host in MOE_ARCHITECTURES.values() if not host.code_repository], ids=lambda host: host.name
)
def test_aliases_are_those_of_transformers(host: MoeArchitecture) -> None:
    if host.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {host.model_type}")
    _, names = known_keys(host.model_type)
    ours = {(name, key) for key, name in host.aliases.items()} | {(key, name) for key, name in host.aliases.items()}
    assert {(other, key) for other, key in names.items() if {other, key} & {host.experts_key, PER_TOKEN_KEY}} <= ours


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dense_family_has_such_keys_but_those_of_its_table(family: str) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    assert known_keys(family)[0] & MIXTURE_KEYS == set(FAMILIES[family].mixture_keys)


def first_of_each_host() -> list[Any]:
    """Those of `pairs`, the others as slow, and DeepSeek-MoE."""
    found = [pytest.param(MOE_ARCHITECTURES["deepseek"], "llama", id="llama-deepseek")]
    for each in pairs():
        host, family = each.values
        found.append(
            each if host.accepts[0] == family else pytest.param(*each.values, id=each.id, marks=pytest.mark.slow)
        )
    return found


@pytest.mark.parametrize(("host", "family"), first_of_each_host())
def test_none_reaches_the_output(host: MoeArchitecture, family: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    keys = sorted(MIXTURE_KEYS - set(FAMILIES[family].mixture_keys))
    stray = copy_model(zoo(family), tmp_path / "stray", config=dict.fromkeys(keys, 7))
    plain, mixed = plan_of(zoo(family), host), plan_of(stray, host)
    assert mixed.config == plain.config
    (warning,) = (w for w in mixed.warnings if "keys of mixtures" in w)
    assert f"which a {family} model does not have: {', '.join(keys)}." in warning
    assert not any("keys of mixtures" in w for w in plain.warnings)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "num_experts"),
        ("qwen3", "num_local_experts"),
        ("hunyuan_v1_dense", "moe_topk"),
        ("cohere2", "norm_topk_prob"),
    ],
)
def test_a_merge_of_such_a_base_loads_and_computes_the_base(
    family: str, key: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    stray = copy_model(zoo(family), tmp_path / "stray", config={key: False if key.startswith("norm") else 1})
    merge_without_ray(merge_config(stray, [stray] * 3, mode="random"), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = token_ids(24)
    torch.testing.assert_close(logits_of(merged, ids), logits_of(load_dense(stray), ids), atol=1e-5, rtol=0)
