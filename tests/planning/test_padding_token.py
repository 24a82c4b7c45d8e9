"""A padding token without a row in the embedding, with which transformers loads no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pico import VOCAB, copy_model, load_dense, merge_config, merge_without_ray, tensors_of


@pytest.mark.parametrize("mode", ["hidden", "random"])
@pytest.mark.parametrize("token", [VOCAB, -VOCAB - 1, [2], "x"])
def test_a_padding_token_without_a_row_is_left_out_and_told_of(
    token: object, mode: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    plain, other = zoo("llama"), zoo("llama", seed=1)
    base = copy_model(plain, tmp_path / "base", config={"pad_token_id": token})
    plan = merge_without_ray(merge_config(base, [plain, other], mode=mode), tmp_path / "merged")
    (warning,) = [warning for warning in plan.warnings if "pad_token_id" in warning]
    assert f"pad_token_id is {token!r}, which has no row in the embedding of {VOCAB} rows" in warning
    assert load_dense(tmp_path / "merged").config.pad_token_id is None
    same = merge_without_ray(merge_config(plain, [plain, other], mode=mode), tmp_path / "same")
    assert not any("pad_token_id" in warning for warning in same.warnings)
    merged, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "same")
    assert all(merged[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("token", [None, -1, 0, VOCAB - 1])
def test_a_padding_token_with_a_row_stays(token: int | None, zoo: Callable[..., Path], tmp_path: Path) -> None:
    plain = zoo("llama")
    base = copy_model(plain, tmp_path / "base", config={"pad_token_id": token})
    plan = merge_without_ray(merge_config(base, [plain, zoo("llama", seed=1)]), tmp_path / "merged")
    assert plan.config["pad_token_id"] == token and not any("pad_token_id" in warning for warning in plan.warnings)
    load_dense(tmp_path / "merged")


def test_the_default_of_a_family_is_no_exception(zoo: Callable[..., Path], tmp_path: Path) -> None:
    plain = zoo("phi3")
    base = copy_model(plain, tmp_path / "base", drop_config=["pad_token_id"])
    plan = merge_without_ray(merge_config(base, [plain, zoo("phi3", seed=1)]), tmp_path / "merged")
    assert any("pad_token_id is 32000" in warning for warning in plan.warnings)
    load_dense(tmp_path / "merged")
