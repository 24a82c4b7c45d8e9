"""Experts that stay keep their router rows; rows of others are in their scale."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raymoe
from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.errors import ProblemReport
from raymoe.gate_modes import MODES
from raymoe.routers.kept_rows import kept_row_problems
from tests.architectures.pairs import PAIRS, Pair
from tests.editing.test_edits import FIRST, edit_here, same_weights
from tests.pico import LAYERS, PROMPTS, copy_model, merge_config, merge_here, plan_problems, tensors_of

SHARED_GATES = [pair for pair in PAIRS if pair.gates_shared and pair.family in ("qwen2", "qwen3_5_text")]


def routers(folder: Path, template: str) -> list[torch.Tensor]:
    """The router of each layer of a mixture; image-text classes have a prefix of their own."""
    tensors = tensors_of(folder)
    found = []
    for layer in range(LAYERS):
        end = template.format(layer=layer).removeprefix("model.")
        (name,) = [name for name in tensors if name.endswith(end)]
        found.append(tensors[name])
    return found


@pytest.mark.parametrize("pair", [*FIRST, *SHARED_GATES], ids=str)
def test_rows_that_stay_and_rows_in_their_scale(pair: Pair, zoo: Callable[..., Path], tmp_path: Path) -> None:
    pair.skip_where_unknown()
    base, *models = (zoo(pair.family, seed=seed, **pair.options) for seed in range(5))
    host = MOE_ARCHITECTURES[pair.host]
    whole = pair.config(base, models[:4], models[3], mode="hidden")
    entries = whole["experts"]
    merge_here({**whole, "experts": entries[:3]}, tmp_path / "old")
    edit_here(tmp_path / "old", tmp_path / "new", add=[entries[3]], remove=[0], keep_routers=True)
    merge_here({**whole, "experts": entries[1:]}, tmp_path / "computed")
    for old, new, computed in zip(*(routers(tmp_path / name, host.router) for name in ("old", "new", "computed"))):
        assert torch.equal(new[:2], old[1:])
        length = old[1:].double().norm(dim=1).mean()
        assert float(new[2].double().norm()) == pytest.approx(float(length), rel=1e-6)
        unit = computed[2].double() / computed[2].double().norm()
        np.testing.assert_allclose(new[2].double() / length, unit, rtol=0, atol=1e-6)
    if pair.gates_shared:
        for old, new in zip(*(routers(tmp_path / name, host.shared_router) for name in ("old", "new"))):
            assert torch.equal(new, old)


@pytest.mark.parametrize("mode", MODES)
def test_every_gate_mode(mode: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *models = (zoo("llama", seed=seed) for seed in range(5))
    entries = merge_config(base, models[:4], mode=mode)["experts"]
    merge_here({"base_model": str(base), "gate_mode": mode, "experts": entries[:3]}, tmp_path / "old")
    edit_here(tmp_path / "old", tmp_path / "new", add=[entries[3]], replace={0: str(models[3])}, keep_routers=True)
    template = MOE_ARCHITECTURES["mixtral"].router
    for old, new in zip(routers(tmp_path / "old", template), routers(tmp_path / "new", template)):
        assert torch.equal(new[1:3], old[1:])
        length = float(old[1:].double().norm(dim=1).mean())
        for row in (new[0], new[3]):
            assert float(row.double().norm()) == pytest.approx(length, rel=1e-6)
    record = (tmp_path / "new" / "raymoe.json").read_text()
    assert '"keep_routers"' in record and '"routers": "kept"' in record
    edit_here(tmp_path / "new", tmp_path / "again", remove=[0, 3], keep_routers=True)
    for old, again in zip(routers(tmp_path / "old", template), routers(tmp_path / "again", template)):
        assert torch.equal(again, old[1:])


def test_nothing_but_the_mixture_is_needed(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Experts are removed from a mixture whose sources are gone, and which has no record."""
    base, *models = (shutil.copytree(zoo("llama", seed=seed), tmp_path / str(seed)) for seed in range(4))
    config = merge_config(base, models, mode="hidden")
    merge_here(config, tmp_path / "old")
    merge_here({**config, "experts": config["experts"][1:]}, tmp_path / "expected")
    for folder in (base, *models):
        shutil.rmtree(folder)
    edit_here(tmp_path / "old", tmp_path / "new", remove=[0], keep_routers=True)
    bare = copy_model(tmp_path / "old", tmp_path / "bare")
    (bare / "raymoe.json").unlink()
    edit_here(bare, tmp_path / "from bare", remove=[0], keep_routers=True)
    # In this mode a row does not depend on the other experts, so these rows are those that would be computed.
    same_weights(tmp_path / "new", tmp_path / "expected")
    same_weights(tmp_path / "from bare", tmp_path / "expected")
    with pytest.raises(ProblemReport, match=r"--base-model PATH .*or --keep-routers"):
        edit_here(tmp_path / "old", tmp_path / "computed", remove=[0])
    new = {"source_model": str(zoo("llama", seed=5)), "positive_prompts": ["a text"]}
    with pytest.raises(ProblemReport, match="--base-model PATH") as report:
        edit_here(tmp_path / "old", tmp_path / "computed", add=[new], keep_routers=True)
    assert "--keep-routers" not in str(report.value), "it is given already"


def test_a_config_may_keep_rows(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *models = (zoo("llama", seed=seed) for seed in range(4))
    config = merge_config(base, models, mode="hidden")
    merge_here(config, tmp_path / "old")
    old = str(tmp_path / "old")
    kept = [{"source_model": old, "expert": number} for number in (2, 1)]
    edited: dict[str, Any] = {"base_model": old, "keep_routers": old, "experts": kept}
    merge_here(edited, tmp_path / "new")
    template = MOE_ARCHITECTURES["mixtral"].router
    for before, after in zip(routers(tmp_path / "old", template), routers(tmp_path / "new", template)):
        assert torch.equal(after, before[[2, 1]])
    gates = raymoe.plan(edited).gates
    assert kept_row_problems(gates) == []
    (tmp_path / "old").rename(tmp_path / "moved")
    assert {problem.remedy for problem in kept_row_problems(gates)} == {
        "copy the mixture to the driver's node, or to a bucket"
    }
    (tmp_path / "moved").rename(tmp_path / "old")
    assert raymoe.MergeConfig.model_validate(edited).needs_prompts is False
    ridge = {**edited, "base_model": str(base), "gate_mode": "ridge"}
    new = {"source_model": str(models[0]), "positive_prompts": list(PROMPTS[0])}
    # Rows that are fitted together need all prompts.
    assert "experts[0-1].positive_prompts: the expert has no prompts" in plan_problems(
        {**ridge, "experts": [*kept, new]}
    )
    assert "no expert is one of" in plan_problems({**config, "keep_routers": old})
    assert "names more than a mixture" in plan_problems({**edited, "keep_routers": f"{old}#1"})
    other = plan_problems({**edited, "base_model": str(base), "architecture": "qwen2_moe"})
    assert "whose routers differ" in other and "architecture: mixtral" in other
