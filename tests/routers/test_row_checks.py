"""Rows that are drawn, rows that can't tell experts apart, and prompts that can't be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.errors import ProblemReport
from raymoe.gate_modes import MODES
from raymoe.gate_modes.directions import expert_rows, normalize
from raymoe.planning import MergeOptions
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Router
from raymoe.routers.router_matrices import random_router_rows, router_rows
from raymoe.routers.row_checks import conditioning_warning, zero_row_warnings
from raymoe.routers.tokenize import load_tokenizer, tokenize
from tests.pico import VOCAB, copy_model, merge_config, merge_without_ray, save_model, save_tokenizer, tensors_of
from tests.routers.direct import computed_rows

NAMES = ["expert 0 (a)", "expert 1 (b)", "expert 2 (c)"]
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


# --- drawn rows


def test_random_rows_are_directions() -> None:
    rows = MODES["random"].draw_rows(0, "expert 0", 200, 256)
    assert (rows.dtype, rows.shape) == (np.float32, (200, 256))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    # Of 51200 numbers: five standard errors.
    assert abs(rows.mean()) < 5 / 16 / 51200**0.5
    assert abs(rows.std() * 16 - 1) < 0.02
    assert abs((np.abs(rows * 16) < 1).mean() - 0.6827) < 0.012


def test_uniform_random_rows_have_linears_initial_bound() -> None:
    rows = MODES["uniform_random"].draw_rows(0, "expert 0", 200, 256) * 16
    assert np.abs(rows).max() <= 1.0
    counts, _ = np.histogram(rows, bins=8, range=(-1, 1))
    assert np.abs(counts / rows.size - 1 / 8).max() < 0.008


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_drawn_rows_depend_on_seed_owner_and_layer_alone(mode: str) -> None:
    rows = MODES[mode].draw_rows(5, "expert 1", 4, 64)
    np.testing.assert_array_equal(rows, MODES[mode].draw_rows(5, "expert 1", 4, 64))
    np.testing.assert_array_equal(rows[:2], MODES[mode].draw_rows(5, "expert 1", 2, 64))
    others = [
        MODES[mode].draw_rows(6, "expert 1", 4, 64),
        MODES[mode].draw_rows(5, "expert 2", 4, 64),
        np.roll(rows, 1, axis=0),
    ]
    for other in others:
        assert np.abs((normalize(rows) * normalize(other)).sum(axis=1)).max() < 0.6


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_rows_of_one_layer_are_those_of_all_layers(mode: str, zoo: Callable[..., Path]) -> None:
    """A merge draws one layer after another, so that it never holds all rows."""
    gates = raymoe.plan(merge_config(zoo("llama"), [zoo("llama")] * 3, mode=mode)).gates
    gates = replace(gates, shared=(replace(gates.experts[0], owner=Owner.shared(0)),))
    rows = random_router_rows(gates)
    for layer in range(gates.layers):
        for what in (Router(layer=layer), Router(layer=layer, shared=True)):
            np.testing.assert_array_equal(router_rows(gates, {}, what), router_rows(gates, rows, what))


def test_rows_that_are_lost_are_not_drawn(zoo: Callable[..., Path]) -> None:
    gates = raymoe.plan(merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="hidden")).gates
    with pytest.raises(NotImplementedError, match="hidden"):
        router_rows(gates, {}, Router(layer=0))


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_a_merge_holds_the_rows_of_its_seed(mode: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    config = merge_config(base, [base] * 3, mode=mode)
    for seed in (0, 1):
        merge_without_ray(config, tmp_path / str(seed), MergeOptions(seed=seed))
        written = tensors_of(tmp_path / str(seed))
        drawn = [MODES[mode].draw_rows(seed, str(Owner.expert(number)), 3, 64) for number in range(3)]
        for layer in range(3):
            np.testing.assert_array_equal(written[ROUTER.format(layer)].numpy(), np.stack(drawn)[:, layer])


def test_written_rows_are_cast_to_the_output_dtype(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    config = merge_config(base, [base] * 2)
    rows = computed_rows(config)
    merge_without_ray({**config, "dtype": "bfloat16"}, tmp_path / "merged")
    written = tensors_of(tmp_path / "merged")[ROUTER.format(1)]
    import torch

    assert torch.equal(written, torch.from_numpy(np.stack(rows)[:, 1]).bfloat16())


# --- rows that are too much alike


def test_negative_prompts_are_subtracted_before_rows_get_unit_length() -> None:
    positive, negative = np.array([[3.0, 4.0], [1.0, 0.0]], "f4"), np.array([[3.0, 0.0], [0.0, 1.0]], "f4")
    np.testing.assert_allclose(expert_rows(positive, None), [[0.6, 0.8], [1.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(expert_rows(positive, negative), [[0.0, 1.0], [0.5**0.5, -(0.5**0.5)]], atol=1e-7)
    np.testing.assert_array_equal(expert_rows(positive, positive), np.zeros((2, 2)))


def test_nearly_parallel_rows_are_warned_of_with_numbers() -> None:
    first = normalize(np.eye(4, 64))
    second = normalize(np.roll(np.eye(4, 64), 8, axis=1))
    assert conditioning_warning([first, second], NAMES) is None
    assert conditioning_warning([first], NAMES) is None
    almost = second.copy()
    for layer in (0, 1, 3):
        almost[layer] = normalize(first[layer] + (0.01 if layer == 1 else 0.1) * second[layer])
    warning = conditioning_warning([first, -first, almost], NAMES) or ""
    assert re.search(r"nearly parallel .* in 3 of 4 layers \(0-1, 3\)\. ", warning)
    assert "Worst is layer 1: cosine 1.000 between expert 0 (a) and expert 2 (c). " in warning


@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.9, 0.93, 0.999])
def test_two_rows_are_judged_by_their_cosine(cosine: float) -> None:
    first, second = np.zeros((1, 8), "f4"), np.zeros((1, 8), "f4")
    first[0, 0], second[0, :2] = 1.0, (cosine, (1 - cosine**2) ** 0.5)
    warning = conditioning_warning([first, second], NAMES)
    assert warning is None if cosine < 0.92 else f"cosine {cosine:.3f} between" in (warning or "")


def test_rows_that_add_up_to_zero_are_no_fault() -> None:
    """Each expert's negative prompts are the others' positive ones."""
    states = np.random.default_rng(0).standard_normal((3, 2, 64))
    for count in (2, 3):
        others = [(states[:count].sum(axis=0) - states[n]) / (count - 1) for n in range(count)]
        rows = [normalize(states[n] - others[n]) for n in range(count)]
        assert np.linalg.matrix_rank(np.stack([row[0] for row in rows]), tol=1e-4) == count - 1
        assert conditioning_warning(rows, NAMES) is None


def test_more_experts_than_dimensions_are_no_fault() -> None:
    angles = np.arange(6) * np.pi / 3
    rows = [np.array([[np.cos(angle), np.sin(angle)]], "f4") for angle in angles]
    names = [f"expert {number}" for number in range(6)]
    assert conditioning_warning(rows, names) is None
    assert "between expert 2 and expert 6" in (conditioning_warning([*rows, rows[2]], [*names, "expert 6"]) or "")


def test_rows_that_are_equal_or_zero_are_warned_of() -> None:
    rows = normalize(np.random.default_rng(0).standard_normal((2, 64)))
    assert "layers (0-1)" in (conditioning_warning([rows, rows], NAMES) or "")
    zero = rows.copy()
    zero[1] = 0
    (warning,) = zero_row_warnings([rows, zero], NAMES[:2])
    assert warning.startswith("the router row of expert 1 (b) is zero in 1 of 2 layers (1), ")
    assert not list(zero_row_warnings([rows, rows], NAMES[:2]))


def test_mirrored_prompts_are_no_fault(
    zoo: Callable[..., Path], merge_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    """Each expert's positive prompts are the other's negative ones, as published configs have it."""
    config = merge_config(zoo("llama"), [zoo("llama", seed=number) for number in range(2)], mode="cheap_embed")
    first, second = config["experts"]
    first["negative_prompts"], second["negative_prompts"] = second["positive_prompts"], first["positive_prompts"]
    assert not merge_in_process(config, tmp_path / "merged").warnings


def test_a_merge_of_nearly_equal_prompts_warns(
    zoo: Callable[..., Path], merge_in_process: Callable[..., Any], tmp_path: Path
) -> None:
    base = zoo("llama")
    config = merge_config(base, [base, zoo("llama", seed=1)], mode="cheap_embed")
    text = "The work is licensed under the terms of this licence, and no other terms apply"
    for expert, end in zip(config["experts"], ".!", strict=True):
        expert["positive_prompts"] = [text + end]
    result = merge_in_process(config, tmp_path / "merged")
    assert len(result.warnings) == 1
    warning = r"nearly parallel .* in 3 of 3 layers \(0-2\)\. Worst is layer \d: cosine 0\.9\d\d between expert 0 "
    assert re.search(warning, result.warnings[0])
    assert not merge_in_process(merge_config(base, [base] * 2, mode="random"), tmp_path / "random").warnings


# --- prompts


def test_every_prompt_begins_with_one_bos(zoo: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(zoo("llama"), trust_remote_code=False)
    ids = tokenize(tokenizer, ["a b", "<s>a b", "<s><s>a"], vocab=VOCAB, owner=Owner.expert(0))
    assert ids[0] == ids[1]
    assert [row.count(0) for row in ids] == [1, 1, 2]
    assert tokenizer.decode(ids[0]) == "<s>a b"
    assert tokenize(tokenizer, [], vocab=VOCAB, owner=Owner.expert(0)) == []


def test_without_bos_nothing_is_put_before_a_prompt(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, bos=False)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    (ids,) = tokenize(tokenizer, ["a b"], vocab=VOCAB, owner=Owner.expert(0))
    assert tokenizer.decode(ids) == "a b"


def test_an_empty_prompt_is_refused_where_it_has_no_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, bos=False)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    with pytest.raises(ProblemReport, match=r"expert 3, prompt 2 \(''\): it has no tokens\n.*give it some text"):
        tokenize(tokenizer, ["fine", ""], vocab=VOCAB, owner=Owner.expert(3))


def test_a_token_beyond_the_vocabulary_is_refused(zoo: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(zoo("llama"), trust_remote_code=False)
    text = "The Licence"
    top = max(tokenizer(text)["input_ids"])
    assert tokenize(tokenizer, [text], vocab=top + 1, owner=Owner.expert(0))
    pattern = (
        rf"^expert 1, prompt 1 \('The.*; expert 1, prompt 2 .*: its token .*\(id {top}\) has no row in .* {top} rows"
    )
    with pytest.raises(ProblemReport, match=pattern):
        tokenize(tokenizer, [text, text + "!"], vocab=top, owner=Owner.expert(1))


def test_a_merge_with_a_small_vocabulary_is_refused(merge_in_process: Callable[..., Any], tmp_path: Path) -> None:
    small = save_model(tmp_path / "small", "llama", vocab_size=300)
    config = merge_config(small, [small] * 2, mode="cheap_embed")
    with pytest.raises(ProblemReport, match=r"expert 0, prompt 1 .*has no row in the embedding of 300 rows"):
        merge_in_process(config, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_without_a_tokenizer_is_refused(zoo: Callable[..., Path], tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare", "llama", tokenizer=False)
    with pytest.raises(ProblemReport, match=r"base_model \(.*bare\): there is no tokenizer in it"):
        computed_rows(merge_config(bare, [zoo("llama")] * 2))
    # An expert's tokenizer does not matter, and drawn rows need none.
    assert computed_rows(merge_config(zoo("llama"), [bare] * 2))
    merge_without_ray(merge_config(bare, [bare] * 2, mode="random"), tmp_path / "merged")


def test_a_damaged_tokenizer_is_refused(zoo: Callable[..., Path], tmp_path: Path) -> None:
    damaged = copy_model(zoo("llama"), tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(ProblemReport, match=r"tokenizer.json: the tokenizer can't be read: "):
        computed_rows(merge_config(damaged, [damaged] * 2))
