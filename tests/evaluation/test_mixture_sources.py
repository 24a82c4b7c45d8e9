"""A merge with experts of a mixture in it: its record names them, so that it can be verified and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import raymoe
from tests.pico import merge_config, merge_here, merge_without_ray, save_tokenizer
from tests.runtime.in_process import in_this_process


@pytest.fixture(scope="module")
def mixture(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "mixture"
    merge_without_ray(merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random"), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def merged(mixture: Path, tmp_path_factory: pytest.TempPathFactory, zoo: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    experts = [f"{mixture}#1", zoo("llama", seed=3)]
    merge_here(merge_config(mixture, experts, mode="cheap_embed"), folder)
    return folder


def test_the_record_and_the_card_name_the_expert(merged: Path, mixture: Path) -> None:
    record = json.loads((merged / "raymoe.json").read_text())
    assert [source["model"] for source in record["sources"][:2]] == [str(mixture), f"{mixture}#1"]
    card = (merged / "README.md").read_text()
    assert "`mixture#1`" in card and str(mixture) not in card


def test_the_merge_is_verified_from_its_record(merged: Path) -> None:
    with in_this_process():
        assert raymoe.verify(merged).ok


def test_it_is_compared_with_the_mixture_and_the_expert(merged: Path, tmp_path: Path, zoo: Callable[..., Path]) -> None:
    names = ("mixture#1", zoo("llama", seed=3).name)
    texts = [{"label": name, "text": f"A text that is about {name}, and no other."} for name in names]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    found = raymoe.evaluate(merged, tmp_path / "texts.jsonl", device="cpu")
    assert any("not compared with gate mode hidden: the base is a mixture" in each for each in found["warnings"])
    assert "base" in json.dumps(found["loss"]) and "expert mixture#1" in json.dumps(found["loss"])


def test_an_expert_is_evaluated_as_a_dense_model(mixture: Path, tmp_path: Path, zoo: Callable[..., Path]) -> None:
    (tmp_path / "texts.jsonl").write_text(json.dumps({"label": "law", "text": "The court held that it does."}) + "\n")
    against = [f"other={zoo('llama', seed=2)}"]
    found = raymoe.evaluate(f"{mixture}#1", tmp_path / "texts.jsonl", against=against, device="cpu")
    assert len(found["loss"]) == 2 and all(loss["mean"] > 0 for loss in found["loss"].values())
