"""`raymoe.evaluate` of dense models: losses are those of transformers, and bad input is one message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import raymoe
from raymoe.errors import ProblemReport
from raymoe.evaluation import dense_run
from raymoe.progress_line import ProgressLine
from raymoe.report.eval_page import evaluation_page
from raymoe.report.eval_table import print_evaluation
from raymoe.sources.hub import HubOptions
from tests.evaluation.streamed import resident
from tests.evaluation.test_dataset import adds_bos
from tests.pico import load_dense, merge_config, merge_here, save_lora
from tests.report.html_check import Page

pytestmark = pytest.mark.engines

TEXTS = {"poems": ["Two roads diverged in a wood", "and that has made all the difference"], "7": ["x = [y for y in z]"]}


@dataclass(frozen=True)
class World:
    """A model, a fine-tune of it, an adapter, and texts with any labels."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapted(self) -> str:
        return f"{self.model}+{self.folder / 'adapter'}"

    @property
    def data(self) -> Path:
        return self.folder / "texts.jsonl"

    def losses(self, model: Any) -> dict[str, float]:
        """What transformers computes, with the tokenizer of `model`."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        found = {}
        for label, texts in TEXTS.items():
            ids: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
            found[label] = float(-np.concatenate(resident(model, ids)).mean())
        return found | {"mean": sum(found.values()) / len(found)}


@pytest.fixture(scope="module")
def world(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("dense")
    for number, name in enumerate(("model", "tuned")):
        shutil.copytree(zoo("llama", seed=number), folder / name)
    save_lora(folder / "adapter", folder / "model", ["q_proj", "up_proj", "down_proj"])
    lines = [json.dumps({"label": label, "text": text}) + "\n" for label, texts in TEXTS.items() for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    return World(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "granite", "cohere"])
def test_losses_are_what_transformers_computes(family: str, zoo: Callable[..., Path], world: World) -> None:
    model = zoo(family)
    found = raymoe.evaluate(model, world.data, device="cpu")
    assert found["loss"] == {"model": pytest.approx(world.losses(load_dense(model)), abs=2e-5)}
    assert found["architecture"] == family and found["warnings"] == [] and "routing" not in found


def test_an_adapter_is_a_part_of_its_model(world: World) -> None:
    tuned = transformers.AutoModelForCausalLM.from_pretrained(world.model).eval()
    tuned.load_adapter(str(world.folder / "adapter"))
    found = raymoe.evaluate(world.adapted, world.data, against=f"plain={world.model}", device="cpu")
    assert found["loss"]["model"] == pytest.approx(world.losses(tuned), abs=2e-5)
    assert found["loss"]["plain"] == pytest.approx(world.losses(load_dense(world.model)), abs=2e-5)
    assert abs(found["loss"]["plain"]["mean"] - found["loss"]["model"]["mean"]) > 1e-3
    assert found["compared"] == {"plain": str(world.model)}


def test_a_mixture_is_a_model_to_compare_with(world: World, tmp_path: Path) -> None:
    config = merge_config(world.model, [world.model, world.folder / "tuned"], mode="random")
    merge_here(config, tmp_path / "out")
    merge_here(config | {"backbone": "linear"}, tmp_path / "other")
    named = {"labels": ("poems=0", "7=1"), "against": ["none", f"linear={tmp_path / 'other'}"], "device": "cpu"}
    of_merge = raymoe.evaluate(tmp_path / "out", world.data, **named)
    assert [name for name, loss in of_merge["loss"].items() if loss] == ["merged", "linear"]
    of_other = raymoe.evaluate(tmp_path / "other", world.data, **{**named, "against": "none"})
    assert of_merge["loss"]["linear"] == of_other["loss"]["merged"] != of_merge["loss"]["merged"]
    of_dense = raymoe.evaluate(world.model, world.data, against=f"moe={tmp_path / 'out'}", device="cpu")
    assert of_dense["loss"]["moe"] == of_merge["loss"]["merged"]
    # Further models come beside what a merge is compared with anyhow.
    added = raymoe.evaluate(tmp_path / "out", world.data, **{**named, "against": f"again={world.model}"})
    assert added["loss"]["again"] == added["loss"]["base"] and added["loss"]["average"] and added["loss"]["oracle"]


@pytest.mark.s3
def test_models_on_the_hub_and_in_a_bucket(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from tests.object_store.servers import environment, running_server
    from tests.sources.hub_server import HubServer

    here = raymoe.evaluate(world.adapted, world.data, against=f"plain={world.model}", device="cpu")["loss"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    store = running_server("moto")
    store.client().create_bucket(Bucket="dense")
    for name in ("model", "adapter"):
        for path in (world.folder / name).iterdir():
            store.client().put_object(Bucket="dense", Key=f"{name}/{path.name}", Body=path.read_bytes())
    with HubServer() as server, environment(store.environment):
        for name in ("model", "adapter"):
            server.add(f"org/{name}", world.folder / name)
        hub = HubOptions(endpoint=server.url, cache_dir=str(tmp_path))
        options = raymoe.EvaluationOptions(device="cpu", quiet=True, hub=hub, against=("plain=s3://dense/model",))
        for name in ("org/model+org/adapter", "s3://dense/model+s3://dense/adapter"):
            assert raymoe.evaluate(name, world.data, options)["loss"] == here
        assert "s3://dense/gone" in refused("s3://dense/gone", world.data)


def test_what_it_says(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    further = [f"tuned={world.folder / 'tuned'}", f"base={world.model}"]
    found = raymoe.evaluate(world.model, world.data, against=further, device="cpu")
    assert found["data"]["per_label"].keys() == TEXTS.keys()
    assert found["data"]["per_label"]["poems"].keys() == {"texts", "tokens"}
    json.dumps(found, allow_nan=False)
    mean = found["loss"]["model"]["mean"]
    assert repr(found) == f"Evaluation({str(world.model)!r}, 3 texts, loss {mean:.3f})"
    assert "own expert" not in found._repr_html_()
    print_evaluation(found)
    said = capsys.readouterr().out
    assert f"tuned: {world.folder / 'tuned'}" in said and f"{mean:.3f} (" in said and "expert" not in said
    page = Page(evaluation_page(found))
    words = " ".join(page.text)
    assert page.problems == [] and f"The mean loss is {mean:.2f} nats" in words and "xpert" not in words
    (line,) = [str(svg["aria-label"]) for svg in page.all("svg") if "Mean loss, lower" in str(svg["aria-label"])]
    assert line.count("base ") == line.count("tuned ") == line.count("this model ") == 1


def test_progress_ends_at_its_total(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[ProgressLine] = []

    class Line(ProgressLine):
        def __exit__(self, *raised: object) -> None:
            shown.append(self)

    monkeypatch.setattr(dense_run, "ProgressLine", Line)
    raymoe.evaluate(world.model, world.data, against=[f"a={world.model}", f"b={world.adapted}"], device="cpu")
    (line,) = shown
    assert line._before + line._done == line._total > 0


# --- what is refused


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ProblemReport) as report:
        raymoe.evaluate(*arguments, **options)
    return str(report.value)


@pytest.mark.parametrize(
    ("against", "message"),
    [
        (["experts", "average"], "experts, average: {model} is no merge"),
        (["bse"], "did you mean base? (any of base, experts, average, oracle, hidden, or none, or NAME=MODEL)"),
        (["none", "base"], "'none' goes with no other comparison"),
        (["a={model}", "a = {tuned}"], "two models have one name"),
        (["a,b={model}"], "--against a,b={model}: the name has other characters"),
        (["model={model}"], "'model' is already the name of a loss"),
        (["a="], "--against a=: no model is named"),
        (["a=/gone/model"], "/gone/model: no folder '/gone/model' here"),
        (["a={model}+{model}"], "this is a model, not a LoRA adapter"),
        (["a=ftp://host/x"], "ftp://"),
    ],
)
def test_comparisons_that_can_not_be(world: World, against: list[str], message: str) -> None:
    names = {"model": str(world.model), "tuned": str(world.folder / "tuned")}
    found = refused(world.model, world.data, against=[each.format(**names) for each in against])
    assert message.format(**names) in found
    assert "Traceback" not in found and found.count("\n") <= 4


def test_models_that_can_not_be(world: World, tmp_path: Path) -> None:
    assert f"no folder '{tmp_path / 'gone'}' here" in refused(tmp_path / "gone", world.data)
    assert "name it together with its base model" in refused(world.folder / "adapter", world.data)
    assert "has no effect, since" in refused(world.model, world.data, labels=("poems=0",))
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty", world.data)
    bare = Path(shutil.copytree(world.model, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    assert f"{bare}: there are no tokenizer files" in refused(bare, world.data)
    torn = Path(shutil.copytree(world.model, tmp_path / "torn"))
    (torn / "tokenizer.json").write_text("{")
    assert f"{torn}: its tokenizer can't be loaded" in refused(torn, world.data)


def test_models_with_other_tokens_are_not_compared(world: World, tmp_path: Path) -> None:
    other = Path(shutil.copytree(world.folder / "tuned", tmp_path / "other"))
    adds_bos(other)
    found = refused(world.model, world.data, against=f"other={other}")
    assert f"--against other ({other}): its tokenizer reads 3 of 3 texts as other tokens" in found
    for name in ("tokenizer.json", "tokenizer_config.json"):  # then it is taken to be the same
        (other / name).unlink(missing_ok=True)
    assert raymoe.evaluate(world.model, world.data, against=f"other={other}", device="cpu")["loss"]["other"]


def test_results_do_not_replace_models(world: World) -> None:
    for file in (world.model / "config.json", world.folder / "tuned" / "model.safetensors"):
        found = refused(world.model, world.data, against=f"tuned={world.folder / 'tuned'}", json=file)
        assert "name another file" in found
    assert (world.model / "config.json").stat().st_size > 10
