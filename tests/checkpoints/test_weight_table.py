"""Mixtures whose config.json promises more than their tensors hold: refused before anything is counted out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.checkpoints import weight_table
from raymoe.errors import ProblemReport
from tests.evaluation.streamed import open_mixture

MIXTRAL = {"model_type": "mixtral", "num_experts_per_tok": 2}
GRANITE = {"model_type": "granitemoe", "num_experts_per_tok": 2}
SIZES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2),
}
HEAD = {"lm_head.weight": (8, 8)}
MOE = "model.layers.0.block_sparse_moe."


def refusal(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | config))
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    with pytest.raises(ProblemReport) as caught:
        open_mixture(folder)
    return str(caught.value)


@pytest.fixture
def few_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that a checkpoint must have are a few hundred at most, whatever its config.json says."""
    output_names = weight_table._output_names

    def limited(*args: Any) -> Any:
        for count, name in enumerate(output_names(*args)):
            assert count < 1000, "too many names are made"
            yield name

    monkeypatch.setattr(weight_table, "_output_names", limited)


@pytest.mark.usefixtures("few_names")
@pytest.mark.parametrize(
    ("config", "shapes", "said"),
    [
        (MIXTRAL | {"num_local_experts": 10**9}, HEAD, "gives 1000000000 experts to each of 2 layers, which 1 tensors"),
        (
            MIXTRAL | {"num_local_experts": 4},
            {f"a{number}": (1,) for number in range(7)},
            "4 experts to each of 2 layers, which 7 tensors can't hold",
        ),
        (MIXTRAL | {"num_local_experts": 4}, {f"a{number}": (1,) for number in range(8)}, "tensor(s) missing"),
        (MIXTRAL | {"num_local_experts": 4, "num_hidden_layers": 10**9}, HEAD, "num_hidden_layers is 1000000000"),
        (GRANITE | {"num_local_experts": 10**9}, HEAD, "1000000000 experts to each of 2 layers (at most 200,000"),
        (GRANITE | {"num_local_experts": 9999}, HEAD, "tensor(s) missing: model.embed_tokens.weight"),
        (
            GRANITE | {"num_local_experts": 9999},
            {f"{MOE}input_linear.weight": (2, 16, 8)},
            f"9999 experts to each of 2 layers, and {MOE}input_linear.weight has the shape [2, 16, 8]",
        ),
        (
            GRANITE | {"num_local_experts": 9999},
            {f"{MOE}input_linear.weight": (9999, 0, 8)},
            "has the shape [9999, 0, 8]",
        ),
        (GRANITE | {"num_local_experts": 2}, {f"{MOE}output_linear.weight": (2,)}, "has the shape [2]"),
        (
            MIXTRAL | {"num_local_experts": 10**9},
            {"model.layers.0.mlp.experts.gate_up_proj": (2, 8, 8)},
            "all experts of a layer are in one tensor (model.layers.0.mlp.experts.gate_up_proj)",
        ),
    ],
)
def test_more_experts_than_the_tensors_hold(
    tmp_path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    assert said in refusal(tmp_path / "out", config, shapes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"partial_rotary_factor": 10**400}}, "partial_rotary_factor is 1000"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"rope_parameters": ["yarn"]}, "rope_parameters is ['yarn']"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"intermediate_size": None}, "intermediate_size is None"),
    ],
)
def test_values_that_no_model_has(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path / "out", MIXTRAL | {"num_local_experts": 2} | changes, HEAD)
