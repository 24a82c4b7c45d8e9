"""The table of llama.cpp's architectures and that of MoE architectures say the same of a merge."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES, DenseSpec, MoeArchitecture, MoeShape, read_spec
from raymoe.checkpoints.weight_table import RoutingRule
from raymoe.errors import ProblemReport
from raymoe.export.gguf.choose_target import choose_target
from raymoe.export.gguf.llama_cpp_archs import ARCHITECTURES, BY_FAMILY, DENSE, MIXTURES
from tests.architectures.pairs import MAMBA
from tests.pico import REPOSITORY, make_config

EXPERTS = 3
# Of the families that mixtures are read as: values that llama.cpp takes for granted.
OPTIONS: dict[str, dict[str, Any]] = {
    "youtu": {"rms_norm_eps": 1e-6},
    "qwen3_5_text": {"linear_value_head_dim": 64},
    "granitemoehybrid": MAMBA,
}


def takes(architecture: MoeArchitecture, shape: MoeShape) -> bool:
    family = architecture.dense_family
    spec = read_spec(json.loads(make_config(family, **OPTIONS.get(family, {})).to_json_string()), "m")
    assert isinstance(spec, DenseSpec)
    rule = RoutingRule(
        experts=shape.experts,
        per_token=shape.experts_per_token,
        renormalizes=True,
        has_shared_expert=shape.shared > 0,
        has_shared_gate=bool(architecture.shared_router),
        activation=spec.hidden_act,
        score_function=architecture.score_function,
    )
    try:
        choose_target(spec, rule, shared_is_empty=False, label="m")
    except ProblemReport:
        return False
    return True


@pytest.mark.parametrize("per_token", [2, EXPERTS])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("architecture", MOE_ARCHITECTURES.values(), ids=lambda architecture: architecture.name)
def test_what_the_card_says_of_llama_cpp_is_what_raymoe_converts(
    architecture: MoeArchitecture, shared: int, per_token: int
) -> None:
    if shared and not architecture.shared:
        pytest.skip("it has no shared experts")
    shape = MoeShape(experts=EXPERTS, experts_per_token=per_token, shared=shared)
    is_converted = architecture.model_type in MIXTURES and takes(architecture, shape)
    assert architecture.runs_in_llama_cpp(shape) is is_converted


def test_a_family_is_in_one_row() -> None:
    """A second row would take a family away from the first, and nothing would say so."""
    assert len(DENSE) == sum(len(architecture.dense) for architecture in ARCHITECTURES.values())
    assert len(BY_FAMILY) == sum(len(architecture.families) for architecture in ARCHITECTURES.values())
    assert {*DENSE, *BY_FAMILY} <= FAMILIES.keys()


def test_the_page_of_gguf_has_every_dense_family_that_is_converted() -> None:
    text = (REPOSITORY / "docs/gguf.md").read_text(encoding="utf-8")
    named = tuple(", ".join(re.findall(r"^\| dense (.*?) \|", text, flags=re.MULTILINE)).split(", "))
    assert [FAMILIES[name].title for name in DENSE if not FAMILIES[name].title.startswith(named)] == []
