"""The average of dense models, which is never written, against averages that are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymoe.checkpoints.average_model import average_model
from raymoe.errors import ProblemReport
from raymoe.storage import combine
from tests.evaluation.streamed import assert_close, open_dense, resident, streamed, texts_of
from tests.pico import VOCAB, copy_model, load_dense, save_lora, tensors_of

pytestmark = pytest.mark.engines

SCALING = 1.5  # of `save_lora`


def written(layout: Path, models: Sequence[dict[str, torch.Tensor]], folder: Path) -> Any:
    """The mean of the models' tensors, computed in float64 and saved as float32, in transformers."""
    mean = {
        name: (sum(model[name].double() for model in models) / len(models)).float()  # type: ignore[union-attr]
        for name in models[0]
    }
    return load_dense(copy_model(layout, folder, config={"dtype": "float32"}, tensors=mean))


def with_adapter(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    held, tensors = load_file(adapter / "adapter_model.safetensors"), tensors_of(base)
    for name in tensors:
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in held:
            delta = held[f"{prefix}B.weight"].double() @ held[f"{prefix}A.weight"].double()
            tensors[name] = tensors[name].double() + SCALING * delta
    return tensors


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"dtype": "bfloat16"}),
        ("phi3", {}),
        ("granite", {}),
        ("lfm2", {}),
        ("qwen3_5_text", {}),
    ],
    ids=str,
)
def test_it_is_what_transformers_computes_from_the_written_average(
    family: str, options: dict[str, Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [zoo(family, seed=seed, **options) for seed in (1, 2, 3)]
    average = average_model([open_dense(folder) for folder in folders])
    expected = written(folders[0], [tensors_of(folder) for folder in folders], tmp_path / "average")
    texts = texts_of()
    found = streamed(average, texts)["own"]
    assert_close(found, resident(expected, texts), tolerance=2e-5)
    assert max(np.abs(a - b).max() for a, b in zip(found, resident(load_dense(folders[0]), texts), strict=True)) > 0.01


def test_adapters_are_averaged_by_their_changes(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, texts = zoo("llama"), texts_of()
    one = save_lora(tmp_path / "one", base, ["q_proj", "up_proj", "lm_head", "embed_tokens"][:3], seed=1)
    other = save_lora(tmp_path / "other", base, ["v_proj", "up_proj"], seed=2)
    average = average_model(
        [open_dense(f"{base}+{one}"), open_dense(f"{base}+{other}"), open_dense(zoo("llama", seed=5))]
    )
    models = [with_adapter(base, one), with_adapter(base, other), tensors_of(zoo("llama", seed=5))]
    assert_close(streamed(average, texts)["own"], resident(written(base, models, tmp_path / "average"), texts), 2e-5)


def test_what_all_models_have_is_read_once(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    adapters = [save_lora(tmp_path / str(seed), base, ["down_proj"], seed=seed) for seed in (1, 2)]
    average = average_model([open_dense(f"{base}+{adapter}") for adapter in adapters])
    combined = [name for name, ref in average.weights.items() if ref.combined is not None]
    assert combined and all(name.endswith("down_proj.weight") for name in combined)
    same = average_model([open_dense(base), open_dense(base)])
    assert same.weights == open_dense(base).weights


def test_rows_of_added_tokens_are_the_mean_of_those_that_have_them(zoo: Callable[..., Path], tmp_path: Path) -> None:
    first, second = zoo("llama", seed=1), zoo("llama", seed=2)
    more = {name: torch.cat([tensors_of(second)[name], torch.ones(2, 64)]) for name in EMBEDDINGS}
    longer = copy_model(second, tmp_path / "longer", config={"vocab_size": VOCAB + 2}, tensors=more)
    models = [open_dense(longer), open_dense(first)]
    average = average_model(models)
    assert average.spec.vocab == VOCAB + 2
    mean = tensors_of(first)
    for name in EMBEDDINGS:
        mean[name] = torch.cat([(tensors_of(first)[name] + tensors_of(second)[name]) / 2, torch.ones(2, 64)])
    others = {name: (tensors_of(first)[name] + tensors_of(second)[name]) / 2 for name in mean if name not in EMBEDDINGS}
    expected = copy_model(longer, tmp_path / "expected", tensors={**mean, **others})
    texts = [*texts_of(), [5, VOCAB, VOCAB + 1, 7]]
    assert_close(streamed(average, texts)["own"], resident(load_dense(expected), texts), 2e-5)


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def test_the_head_of_a_tied_model_is_its_embedding(zoo: Callable[..., Path], tmp_path: Path) -> None:
    tied, untied = zoo("llama", seed=1, tie_word_embeddings=True), zoo("llama", seed=2)
    held = tensors_of(tied)
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    average = average_model([open_dense(tied), open_dense(untied)])
    expected = written(untied, [held, tensors_of(untied)], tmp_path / "average")
    assert_close(streamed(average, texts_of())["own"], resident(expected, texts_of()), 2e-5)


def test_no_tensor_is_read_whole(zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows bound what is in memory of the tensors that are averaged; their number changes no value."""
    average, texts = average_model([open_dense(zoo("llama", seed=seed)) for seed in (1, 2, 3)]), texts_of()
    whole = streamed(average, texts)["own"]
    read: list[int] = []
    plain = combine._read

    def counted(*arguments: Any) -> Any:
        rows = plain(*arguments)
        read.append(rows.size)
        return rows

    monkeypatch.setattr(combine, "_BLOCK_ELEMENTS", 4 * 512)
    monkeypatch.setattr(combine, "_WINDOW_ELEMENTS", 512)
    monkeypatch.setattr(combine, "_read", counted)
    in_blocks = streamed(average, texts)["own"]
    assert max(read) <= 512 < VOCAB * 64
    for one, other in zip(whole, in_blocks, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3", {}, "it is a qwen3 model"),
        ("llama", {"num_hidden_layers": 2}, "it has 2 layers, and not 3"),
        ("llama", {"attention_bias": True}, "only one of them has model.layers.0.self_attn"),
        ("llama", {"num_key_value_heads": 4}, "its attention has other heads"),
        (
            "llama",
            {"intermediate_size": 48},
            "its shape is [64, 48], the other's [64, 96] (model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_models_that_can_not_be_averaged(
    family: str, options: dict[str, Any], reason: str, zoo: Callable[..., Path]
) -> None:
    first, other = zoo("llama"), zoo(family, **options)
    with pytest.raises(ProblemReport) as report:
        average_model([open_dense(first), open_dense(other)])
    assert f"{other}: it can't be averaged with {first}, since {reason}" in str(report.value)
    json.dumps(str(report.value))
