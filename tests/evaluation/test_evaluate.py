"""`raymoe.evaluate` from end to end: merges made on Ray, numbers checked against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.torch import save_file

import raymoe
from raymoe.errors import ProblemReport
from raymoe.evaluation import run
from raymoe.planning import MergeOptions
from raymoe.progress_line import ProgressLine
from tests.architectures.pairs import PAIRS, load_grafted, load_merged
from tests.evaluation.streamed import resident
from tests.evaluation.test_dataset import adds_bos
from tests.pico import HIDDEN, LAYERS, copy_model, load_dense, merge_config, merge_here, save_lora, tensors_of

pytestmark = pytest.mark.engines

TEXTS = {
    "code": ["def area(radius): return 3.14159 * radius ** 2", "for i in range(10): print(i)", "x = [y for y in z]"],
    "law": ["The licensor grants you a copyright licence.", "You may reproduce the Work"],
    "food": ["Add two eggs, stir, and bake for an hour.", "A pinch of salt"],
}
COMPARED = "base,experts,average,oracle,hidden"
EVALUATED = (
    *("merged", "base", "average", "oracle", "hidden", "experts"),
    *("expert code", "expert law", "expert food"),
)


@dataclass(frozen=True)
class World:
    """Three experts with names, one of them a LoRA, their base, and texts for each."""

    folder: Path
    base: Path
    experts: dict[str, Path | str]

    @property
    def data(self) -> Path:
        return self.folder / "texts.jsonl"

    def config(self, **options: Any) -> dict[str, Any]:
        return merge_config(self.base, list(self.experts.values()), **options)

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = transformers.AutoTokenizer.from_pretrained(self.base)(text)["input_ids"]
        return ids


@pytest.fixture(scope="module")
def world(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("evaluation")
    for number, name in enumerate(("base", "code", "law")):
        shutil.copytree(zoo("llama", seed=number), folder / name)
    adds_bos(folder / "base")
    save_lora(folder / "food", folder / "base", ["q_proj", "up_proj", "down_proj"])
    with open(folder / "texts.jsonl", "w") as file:
        for label, texts in TEXTS.items():
            file.writelines(json.dumps({"label": label, "text": text}) + "\n" for text in texts)
    experts: dict[str, Path | str] = {
        "code": folder / "code",
        "law": folder / "law",
        "food": f"{folder / 'base'}+{folder / 'food'}",
    }
    return World(folder, folder / "base", experts)


@pytest.fixture(scope="module")
def hidden(world: World) -> Path:
    merge_here(world.config(mode="hidden"), world.folder / "hidden")
    return world.folder / "hidden"


@pytest.fixture(scope="module")
def result(world: World, hidden: Path) -> dict[str, Any]:
    return raymoe.evaluate(hidden, world.data, against=COMPARED, device="cpu")


def loss(model: Any, world: World, texts: Sequence[str]) -> float:
    return float(-np.concatenate(resident(model, [world.tokens(text) for text in texts])).mean())


def test_losses_are_what_transformers_computes(world: World, hidden: Path, result: dict[str, Any]) -> None:
    merged, base = load_merged(hidden), load_dense(world.base)
    assert set(result["loss"]) == set(EVALUATED)
    tuned = transformers.AutoModelForCausalLM.from_pretrained(world.base).eval()
    tuned.load_adapter(str(world.folder / "food"))
    experts = {"code": load_dense(world.folder / "code"), "law": load_dense(world.folder / "law"), "food": tuned}
    for label, texts in TEXTS.items():
        assert result["loss"]["merged"][label] == pytest.approx(loss(merged, world, texts), abs=2e-5)
        assert result["loss"]["base"][label] == pytest.approx(loss(base, world, texts), abs=2e-5)
        for name, expert in experts.items():
            assert result["loss"][f"expert {name}"][label] == pytest.approx(loss(expert, world, texts), abs=2e-5)
    for label in ("code", "law"):
        grafted = load_grafted(world.base, world.folder / label)
        assert result["loss"]["oracle"][label] == pytest.approx(loss(grafted, world, TEXTS[label]), abs=2e-5)
        # The experts are the goal: each on its own texts.
        assert result["loss"]["experts"][label] == result["loss"][f"expert {label}"][label]
    for each in result["loss"].values():
        assert each["mean"] == pytest.approx(np.mean([each[label] for label in TEXTS]), abs=2e-6)
    # The merge's own gates are of that mode.
    assert result["loss"]["hidden"] == pytest.approx(result["loss"]["merged"], abs=1e-5)


def test_the_average_is_that_of_the_experts(world: World, result: dict[str, Any], tmp_path: Path) -> None:
    """Written in float32, and run by transformers."""
    tuned = transformers.AutoModelForCausalLM.from_pretrained(world.base)
    tuned.load_adapter(str(world.folder / "food"))
    tuned = merged_adapter(tuned)
    experts = [tensors_of(world.folder / "code"), tensors_of(world.folder / "law"), tuned]
    mean = {name: sum(expert[name] for expert in experts) / 3 for name in experts[0]}
    average = load_dense(copy_model(world.base, tmp_path / "average", tensors=mean))
    for label, texts in TEXTS.items():
        assert result["loss"]["average"][label] == pytest.approx(loss(average, world, texts), abs=2e-5)


def merged_adapter(model: Any) -> dict[str, Any]:
    """The weights of a model with an adapter of PEFT, which holds both beside each other."""
    held = model.state_dict()
    tensors = {name.replace(".base_layer", ""): tensor for name, tensor in held.items() if ".lora_" not in name}
    for name in tensors:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in held:
            factors = (held[f"{module}.lora_{factor}.default.weight"] for factor in "BA")
            tensors[name] = tensors[name] + 1.5 * next(factors) @ next(factors)
    return tensors


def test_experts_that_can_not_be_averaged_are_told(zoo: Callable[..., Path], world: World, tmp_path: Path) -> None:
    other = Path(shutil.copytree(zoo("llama", seed=2, num_key_value_heads=4), tmp_path / "other"))
    merge_here(merge_config(world.base, [world.folder / "code", other], mode="random"), tmp_path / "out")
    asked: dict[str, Any] = {"labels": ("law=other", "food=other"), "limit": 1, "device": "cpu"}
    found = raymoe.evaluate(tmp_path / "out", world.data, **asked)
    assert found["loss"]["average"] is None and found["loss"]["experts"]
    (warning,) = [each for each in found["warnings"] if "average" in each]
    assert warning.startswith("not compared with the average of the experts: ") and "its attention has" in warning
    said = refused(tmp_path / "out", world.data, against="base,average", **asked)
    assert f"{other}: it can't be averaged with" in said and "--against base" in said


def test_the_result_says_what_it_is_of(world: World, hidden: Path, result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)
    expected = {
        "format": 1,
        "model": str(hidden),
        "architecture": "mixtral",
        "gate_mode": "hidden",
        "prompt_model": "base",
        "layers": LAYERS,
        "experts_per_token": 2,
        "backbone": "base",
        "experts": ["code", "law", "food"],
        "compared": {},
        "seed": 0,
        "warnings": [],
    }
    assert {key: result[key] for key in expected} == expected
    counts = {label: sum(len(world.tokens(text)) - 1 for text in texts) for label, texts in TEXTS.items()}
    assert result["data"] == {
        "file": str(world.data),
        "texts": 7,
        "tokens": sum(counts.values()),
        "per_label": {
            label: {"expert": number, "texts": len(TEXTS[label]), "tokens": counts[label]}
            for number, label in enumerate(TEXTS)
        },
    }


def test_routing_is_what_the_resident_routers_choose(world: World, hidden: Path, result: dict[str, Any]) -> None:
    merged, routing = load_merged(hidden), result["routing"]
    for label, texts in TEXTS.items():
        scores: list[list[Any]] = [[] for _ in range(LAYERS)]
        for text in texts:
            for layer, seen in enumerate(router_scores(merged, world.tokens(text))):
                scores[layer].append(seen[1:])  # BOS is no text
        for layer in range(LAYERS):
            scores_NE = np.concatenate(scores[layer])
            best = np.argsort(-scores_NE, axis=1)[:, :2]
            first = np.bincount(best[:, 0], minlength=3) / len(best)
            chosen = np.bincount(best.ravel(), minlength=3) / len(best)
            np.testing.assert_allclose(routing["first_choice"][label][layer], first, atol=1e-6)
            np.testing.assert_allclose(routing["chosen"][label][layer], chosen, atol=1e-6)
    weights = np.array(list(routing["weight"].values()))
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=5e-6)
    np.testing.assert_allclose(np.sum(routing["load"], axis=1), 1.0, atol=5e-6)


@pytest.mark.parametrize("against", ["none", COMPARED])
def test_progress_ends_at_its_total(
    world: World, hidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: str
) -> None:
    """What `eval` counts as its work before it begins is what it does then, the reading of prompts too."""
    shown: list[ProgressLine] = []

    class Line(ProgressLine):
        def __exit__(self, *raised: object) -> None:
            shown.append(self)

    monkeypatch.setattr(run, "ProgressLine", Line)
    merge = hidden
    if "hidden" in against:
        merge_here(world.config(mode="hidden_avg"), merge := tmp_path / "out")
    raymoe.evaluate(merge, world.data, against=against, device="cpu")
    (line,) = shown
    assert line._before + line._done == line._total > 0


def router_scores(model: Any, tokens: list[int]) -> list[Any]:
    from tests.architectures.pairs import moe_blocks

    seen: list[Any] = []
    hooks = [
        block.gate.register_forward_pre_hook(
            lambda gate, args: seen.append((args[0].reshape(-1, HIDDEN) @ gate.weight.T).numpy())
        )
        for block in moe_blocks(model)
    ]
    resident(model, [tokens])
    for hook in hooks:
        hook.remove()
    return seen


def test_samples_are_the_texts_token_by_token(result: dict[str, Any]) -> None:
    assert [sample["label"] for sample in result["samples"]] == ["code", "code", "law", "law", "food", "food"]
    for sample, text in zip(result["samples"], [text for texts in TEXTS.values() for text in texts[:2]], strict=True):
        assert "".join(token["text"] for token in sample["tokens"]) == text
        assert all(sum(token["experts"]) == LAYERS for token in sample["tokens"])


def test_mode_hidden_is_computed_from_the_recorded_prompts(
    world: World,
    hidden: Path,
    result: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Random experts: a text's own one is no better than another, and there is no gap that a router could close.
    assert result["gap_closed"] is None
    monkeypatch.setattr("raymoe.evaluation.metrics.SMALLEST_GAP", -1.0)
    merge_here(world.config(mode="cheap_embed"), tmp_path / "other")
    other = raymoe.evaluate(tmp_path / "other", world.data, device="cpu", against=("hidden", "oracle"))
    assert other["loss"]["hidden"] == pytest.approx(result["loss"]["merged"], abs=1e-5)
    assert other["loss"]["oracle"] == pytest.approx(result["loss"]["oracle"], abs=1e-5)
    assert other["loss"]["base"] is None and other["loss"]["expert law"] is None
    assert other["prompt_model"] is None
    means = {name: other["loss"][name]["mean"] for name in ("merged", "hidden", "oracle")}
    expected = (means["hidden"] - means["merged"]) / (means["hidden"] - means["oracle"])
    assert other["gap_closed"] == pytest.approx(expected, rel=1e-3)


FFN_OF_ANOTHER_NAME = ("lfm2-lfm2_moe", "granitemoehybrid-granitemoehybrid")
GATED = [pair for pair in PAIRS if pair.gates_shared][:1]


@pytest.mark.parametrize("pair", [*GATED, *(pair for pair in PAIRS if str(pair) in FFN_OF_ANOTHER_NAME)], ids=str)
def test_mode_hidden_has_the_shared_experts_gate_and_any_family(
    pair: Any, zoo: Callable[..., Path], world: World, tmp_path: Path
) -> None:
    base, *experts = (zoo(pair.family, seed=seed) for seed in range(3))
    labels = tuple(f"{label}={number}" for number, label in enumerate(("code", "law")))
    found = {}
    for mode in ("hidden", "cheap_embed"):
        merge_here(pair.config(base, experts, zoo(pair.family, seed=4), mode=mode), tmp_path / mode)
        asked = {"against": ("hidden",), "labels": (*labels, "food=0"), "device": "cpu"}
        found[mode] = raymoe.evaluate(tmp_path / mode, world.data, **asked)["loss"]
    assert found["cheap_embed"]["hidden"] == pytest.approx(found["hidden"]["merged"], abs=1e-5)
    assert abs(found["cheap_embed"]["merged"]["mean"] - found["hidden"]["merged"]["mean"]) > 1e-4


def test_a_merge_without_prompts_is_not_compared_with_hidden(world: World, tmp_path: Path) -> None:
    merge_here(world.config(mode="random"), tmp_path / "random", MergeOptions(seed=3))
    found = raymoe.evaluate(tmp_path / "random", world.data, device="cpu", limit=1)
    assert found["loss"]["hidden"] is None and found["gap_closed"] is None and found["seed"] == 3
    assert found["warnings"] == ["not compared with gate mode hidden: the merge has no prompts"]
    with pytest.raises(ProblemReport, match=r"leave out the comparisons that need it: --against oracle"):
        raymoe.evaluate(tmp_path / "random", world.data, against=("hidden", "oracle"))


def test_what_is_left_out_is_said(world: World, hidden: Path, tmp_path: Path) -> None:
    data = tmp_path / "two.jsonl"
    lines = [{"label": label, "text": text} for label in ("law", "code") for text in TEXTS[label]]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = raymoe.evaluate(hidden, data, against=(), max_tokens=6, device="cpu")
    cut, without = found["warnings"]
    assert cut == "5 of 5 texts were cut to 6 tokens (--max-tokens)"
    assert without.startswith("no text is for food")
    assert list(found["data"]["per_label"]) == ["law", "code"] and found["data"]["tokens"] == 5 * 5
    assert [name for name, value in found["loss"].items() if value] == ["merged"]


def test_a_merge_without_tokenizer_is_read_with_the_bases(world: World, result: dict[str, Any], tmp_path: Path) -> None:
    merge_here(world.config(mode="hidden"), tmp_path / "bare", MergeOptions(copy_tokenizer=False))
    assert not (tmp_path / "bare/tokenizer.json").exists()
    found = raymoe.evaluate(tmp_path / "bare", world.data, against=(), device="cpu")
    assert found["loss"]["merged"] == pytest.approx(result["loss"]["merged"], abs=1e-5)


def test_experts_of_one_name_have_numbers(world: World, tmp_path: Path) -> None:
    twins = merge_config(
        world.base, [world.folder / "code", world.folder / "code", world.folder / "law"], mode="random"
    )
    merge_here(twins, tmp_path / "twins")
    with pytest.raises(ProblemReport, match="the label 'code' is the name of experts 0 and 1"):
        raymoe.evaluate(tmp_path / "twins", world.data, labels=("food=law",))
    asked = {"labels": ("code=1", "food=law"), "against": ("experts",), "device": "cpu"}
    found = raymoe.evaluate(tmp_path / "twins", world.data, **asked)
    assert found["experts"] == ["code (0)", "code (1)", "law"]
    assert found["loss"]["expert code (0)"] == found["loss"]["expert code (1)"] != found["loss"]["expert law"]


def scaled(source: Path, target: Path, part: str, factor: float) -> Path:
    """A copy of a merge with the tensors whose names hold `part` times a factor."""
    shutil.copytree(source, target)
    weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {weight_map[name] for name in weight_map if part in name}:
        held = {name: tensor for name, tensor in tensors_of(target).items() if weight_map[name] == file}
        held = {name: tensor * factor if part in name else tensor for name, tensor in held.items()}
        save_file(held, target / file, {"format": "pt"})
    return target


def test_the_bytes_of_the_merge_are_what_is_evaluated(
    world: World, hidden: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    damaged = scaled(hidden, tmp_path / "damaged", "experts.2.w2", 0)
    found = raymoe.evaluate(damaged, world.data, against=("oracle",), device="cpu")
    assert found["loss"]["oracle"]["code"] == result["loss"]["oracle"]["code"]
    assert abs(found["loss"]["oracle"]["food"] - result["loss"]["oracle"]["food"]) > 1e-3


def test_a_loss_that_is_no_number_is_null_and_said(world: World, hidden: Path, tmp_path: Path) -> None:
    broken = scaled(hidden, tmp_path / "broken", "experts.2.w2", float("nan"))
    found = raymoe.evaluate(broken, world.data, against=("oracle", "hidden"), device="cpu")
    json.dumps(found, allow_nan=False)
    assert found["loss"]["oracle"]["food"] is None and found["loss"]["oracle"]["mean"] is None
    assert found["loss"]["oracle"]["code"] > 0 and found["gap_closed"] is None
    assert any(warning.startswith("the loss of oracle on food is not a finite number") for warning in found["warnings"])


# --- what is refused, all at once


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ProblemReport) as report:
        raymoe.evaluate(*arguments, **options)
    return str(report.value)


def test_sources_that_are_gone_can_be_left_out(world: World, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(world.folder / "law", tmp_path / "law"))
    config = merge_config(world.base, [world.folder / "code", moved], mode="hidden")
    merge_here(config, tmp_path / "out")
    shutil.rmtree(moved)
    found = refused(tmp_path / "out", world.data, labels=("food=0",))
    assert str(moved) in found and "expert 1 of this merge" in found
    assert "leave out the comparisons that need it: --against base,oracle" in found
    asked = {"labels": ("food=0",), "against": ("base", "oracle"), "device": "cpu"}
    assert raymoe.evaluate(tmp_path / "out", world.data, **asked)["loss"]["base"]


def test_problems_of_every_kind_are_told_together(world: World, hidden: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"label": "rust", "text": "fn main"}\n')
    found = refused(hidden, data, against=("orcale",), limit=-1)
    assert "'average' is already the name of a loss" in refused(hidden, data, against=f"average={world.base}")
    assert "'expert 1' is already the name of a loss" in refused(hidden, data, against=f"expert 1={world.base}")
    for part in ("'orcale' is not a comparison", "--limit: -1", "line 1: unknown label 'rust'"):
        assert part in found


def test_what_is_no_merge(world: World, hidden: Path, tmp_path: Path) -> None:
    assert f"no folder '{tmp_path / 'gone'}' here" in refused(tmp_path / "gone", world.data)
    lost = Path(shutil.copytree(hidden, tmp_path / "lost"))
    (lost / "raymoe.json").unlink()
    assert "there is no raymoe.json" in refused(lost, world.data)
    config = json.loads((hidden / "config.json").read_text()) | {"num_local_experts": 2}
    fewer = Path(shutil.copytree(hidden, tmp_path / "fewer"))
    (fewer / "config.json").write_text(json.dumps(config))
    assert "it has 2 experts, but its record (raymoe.json) names 3" in refused(fewer, world.data)
    broken = Path(shutil.copytree(hidden, tmp_path / "broken"))
    (broken / "raymoe.json").write_text("{}")
    assert "this record can't be read" in refused(broken, world.data)
    dense = Path(shutil.copytree(world.base, tmp_path / "dense"))
    shutil.copy(hidden / "raymoe.json", dense)
    assert "model_type is 'llama', which is not a mixture that raymoe writes" in refused(dense, world.data)


def test_numbers_of_experts_per_token(world: World, hidden: Path, result: dict[str, Any], tmp_path: Path) -> None:
    """Each is what the same files with that number in config.json give; the config's own is not run again."""
    found = raymoe.evaluate(hidden, world.data, against=(), experts_per_token="3,1, 2", device="cpu")
    rows = {row["experts_per_token"]: row for row in found["by_experts_per_token"]}
    assert list(rows) == [1, 2, 3] and "by_experts_per_token" not in result
    assert rows[2]["loss"] == found["loss"]["merged"] == result["loss"]["merged"]
    record = json.loads((hidden / "raymoe.json").read_text())
    assert (
        rows[2]["active_parameters"] == record["active_parameters"]
        and rows[3]["active_parameters"] == record["parameters"]
    )
    for count in (1, 3):
        other = copy_model(hidden, tmp_path / str(count), config={"num_experts_per_tok": count})
        merged = raymoe.evaluate(other, world.data, against=(), device="cpu")["loss"]["merged"]
        assert rows[count]["loss"] == pytest.approx(merged, abs=1e-6) and merged != result["loss"]["merged"]


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ("0,1", "0 is below one"),
        ("4", "4 is more than the 3 experts"),
        ("two", "'two' is not a number"),
        ("1,,2", "'' is not a number"),
        ("2,1,2", "2 is given twice"),
        ((2, True), "true is not a number"),
        ("9" * 5000, "is not a number"),
        ("-1,4,x", "'x' is not a number, -1 is below one, 4 is more than the 3 experts"),
    ],
)
def test_numbers_of_experts_that_can_not_be(numbers: Any, what: str, world: World, hidden: Path) -> None:
    found = refused(hidden, world.data, experts_per_token=numbers)
    assert what in found and found.count("--experts-per-token") == 1 and "from 1 to 3" in found
    if numbers == "4":
        assert "is no merge, and has no experts" in refused(world.base, world.data, experts_per_token=numbers)


@pytest.mark.s3
def test_a_merge_in_an_object_store(world: World, hidden: Path, result: dict[str, Any]) -> None:
    from tests.object_store.servers import environment, running_server

    server = running_server("moto")
    client = server.client()
    client.create_bucket(Bucket="evaluated")
    for path in hidden.iterdir():
        client.put_object(Bucket="evaluated", Key=f"out/{path.name}", Body=path.read_bytes())
    with environment(server.environment):
        found = raymoe.evaluate("s3://evaluated/out", world.data, against=("oracle",), device="cpu")
    assert found["loss"]["merged"] == pytest.approx(result["loss"]["merged"], abs=1e-6)
    assert found["routing"] == result["routing"]
