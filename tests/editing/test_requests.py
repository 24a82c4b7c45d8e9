"""What can't be an edit is refused before anything is written, in one report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.editing import make_request
from raymoe.errors import ProblemReport
from tests.editing.test_edits import edit_here, same_weights
from tests.pico import PROMPTS, copy_model, merge_config, merge_here, save_lora, tensors_of


@pytest.fixture(scope="module")
def old(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edits") / "old"
    base, *models = (zoo("llama", seed=seed) for seed in range(4))
    merge_here(merge_config(base, models, mode="hidden"), folder)
    return folder


def refused(old: Path | str, **changes: Any) -> str:
    new = Path(str(old)).parent / "refused"
    with pytest.raises(ProblemReport) as report:
        edit_here(old, new, **changes)
    assert not new.exists()
    return str(report.value)


def test_one_value_is_a_list_of_it() -> None:
    request = make_request(add="org/law", remove=12, replace="1=org/code", prompts="law.jsonl")
    assert request.add == ({"source_model": "org/law", "positive_prompts": {"file": "law.jsonl"}},)
    assert request.remove == (12,) == make_request(remove="12").remove
    assert request.replace == {1: {"source_model": "org/code"}}
    entry = {"source_model": "org/law"}
    assert make_request(add=entry).add == (entry,)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "nothing is to be changed"),
        ({"remove": [0, 1, 2]}, "all 3 experts are removed"),
        ({"remove": [0, 1]}, "1 expert would be left, and 2 work on each token"),
        ({"remove": [3]}, "there is no expert 3"),
        ({"remove": ["1,1"]}, "expert 1 is named twice"),
        ({"remove": ["x"]}, "'x' is not the number of an expert"),
        ({"remove": ["-1"]}, "'-1' is not the number of an expert"),
        ({"replace": ["1=a", "1=b"]}, "expert 1 is named twice"),
        ({"replace": ["a"]}, "'a' is not NUMBER=MODEL"),
        ({"replace": {7: "a"}}, "there is no expert 7"),
        ({"remove": [1], "replace": {1: "a"}}, "expert 1 is removed too"),
        ({"remove": [1], "prompts": ["1=a.txt"]}, "expert 1 is removed, and needs no prompts"),
        ({"remove": [1], "prompts": ["a.txt"]}, "1 file is for an added model, and none is added"),
        ({"remove": [1], "prompts": ["0=a.txt", "0=b.txt"]}, "expert 0 has two files"),
        ({"remove": [1], "gate_mode": "rigde"}, "there is no gate mode 'rigde'"),
        ({"remove": [1], "experts_per_token": 0}, "0 is below one"),
        ({"remove": [1], "experts_per_token": 3}, "give --experts-per-token 2"),
    ],
)
def test_changes_that_can_not_be(changes: dict[str, Any], what: str, old: Path) -> None:
    assert what in refused(old, **changes)


def test_models_that_can_not_be_added(old: Path, zoo: Callable[..., Path], tmp_path: Path) -> None:
    prompts = {"positive_prompts": list(PROMPTS[3])}
    other = {"source_model": str(zoo("qwen2", seed=1)), **prompts}
    wide = {"source_model": str(zoo("llama", seed=1, intermediate_size=64)), **prompts}
    found = refused(old, add=[other, wide])
    assert "model_type is 'qwen2'" in found and "experts[4]" in found and "64" in found
    assert "has no prompts" in refused(old, add=[str(zoo("llama", seed=3))])
    assert "gone" in refused(old, add=[{"source_model": "./gone", **prompts}])


def test_what_is_no_finished_mixture(old: Path, zoo: Callable[..., Path], tmp_path: Path) -> None:
    assert "which is not a mixture" in refused(zoo("llama", seed=0), remove=[0])
    assert "gone" in refused(tmp_path / "gone", remove=[0])
    assert "names more than a mixture" in refused(f"{old}#1", remove=[0])
    half = copy_model(old, tmp_path / "half")
    (half / ".raymoe").mkdir()
    (half / ".raymoe" / "plan.json").write_text("{}")
    assert "this merge is not finished" in refused(half, remove=[0])
    with pytest.raises(ProblemReport, match="choose another output"):
        edit_here(old, old, remove=[0], overwrite=True)


def test_a_merged_backbone_is_kept_only_if_asked(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base, *models = (zoo("llama", seed=seed) for seed in range(4))
    config = merge_config(base, models, mode="ridge", backbone="linear")
    merge_here(config, tmp_path / "old")
    assert "--keep-backbone" in refused(tmp_path / "old", remove=[0])
    edit_here(tmp_path / "old", tmp_path / "new", remove=[0], keep_backbone=True)
    # The backbone is OLD's, and the prompts are read with it and with the experts' FFNs.
    expected = {**config, "base_model": str(tmp_path / "old"), "experts": config["experts"][1:], "backbone": "base"}
    merge_here(expected, tmp_path / "expected")
    same_weights(tmp_path / "new", tmp_path / "expected")
    hidden = {**config, "gate_mode": "hidden"}
    merge_here(hidden, tmp_path / "hidden")
    found = refused(tmp_path / "hidden", remove=[0], keep_backbone=True)
    assert "--gate-mode ridge" in found and "--keep-routers" in found


def test_no_other_backbone_comes_in_unseen(old: Path, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Also where no router is computed: the base of the edit gives attention, norms and embeddings."""
    wrong = str(zoo("llama", seed=3))
    for changes in ({}, {"keep_routers": True}):
        found = refused(old, remove=[0], base_model=wrong, **changes)
        assert "another backbone than" in found and "--keep-backbone" in found
    trained = Path(shutil.copytree(old, tmp_path / "trained"))
    shard = next(path for path in trained.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    size = tensors["model.norm.weight"].numel()
    save_file({**tensors, "model.norm.weight": torch.full((size,), 2.0)}, shard, {"format": "pt"})
    assert "model.norm.weight" in refused(trained, remove=[0], keep_routers=True)
    edit_here(trained, tmp_path / "new", remove=[0], keep_routers=True, keep_backbone=True)
    assert tensors_of(tmp_path / "new")["model.norm.weight"].tolist() == [2.0] * size


def test_adapters_are_read_as_they_were(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Prompts are read with an expert's FFNs before they were rounded, so the result is that of its sources."""
    base = zoo("llama", seed=0, dtype="bfloat16")
    loras = [save_lora(tmp_path / str(seed), base, ["up_proj", "down_proj"], seed=seed) for seed in range(4)]
    config = merge_config(base, [f"{base}+{lora}" for lora in loras], mode="ridge")
    entries = config["experts"]
    merge_here({**config, "experts": entries[:3]}, tmp_path / "old")
    edit_here(tmp_path / "old", tmp_path / "new", add=[entries[3]], remove=[1])
    merge_here({**config, "experts": [entries[0], *entries[2:]]}, tmp_path / "expected")
    same_weights(tmp_path / "new", tmp_path / "expected")
    shutil.rmtree(loras[0])
    seen: list[str] = []
    edit_here(
        tmp_path / "old",
        tmp_path / "without",
        remove=[1],
        on_translated=lambda translation: seen.extend(translation.notes),
    )
    assert any("can't be read" in note and "by rounding" in note for note in seen)


def test_prompts_for_an_expert_and_an_edit_of_an_edit(old: Path, zoo: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS[3]) + "\n")
    edit_here(old, tmp_path / "one", replace={1: str(zoo("llama", seed=5))}, prompts=[f"1={file}"])
    edit_here(tmp_path / "one", tmp_path / "two", remove=["0"], add=[str(zoo("llama", seed=6))], prompts=[str(file)])
    record = json.loads((tmp_path / "two" / "raymoe.json").read_text())
    assert record["config"]["experts"][0]["positive_prompts"]["file"] == str(file)
    assert record["edit"]["mixture"] == str(tmp_path / "one") and record["plan_digest"] != record["edit"]["plan_digest"]
    from raymoe.checkpoints.merge_record import read_record
    from raymoe.sources.local_folder import LocalFolder

    # An expert that stays is called as it was, for the labels of `raymoe eval`.
    names = [read_record(LocalFolder(str(folder))).expert_names for folder in (old, tmp_path / "two")]
    assert names[1] == (zoo("llama", seed=5).name, names[0][2], zoo("llama", seed=6).name)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "An edit of the mixture `one`" in card and "expert 0 is removed" in card and str(tmp_path) not in card


def test_requests_are_read() -> None:
    request = make_request(
        add=["a", {"source_model": "b"}], remove=["1, 2", 5], replace=["3=s3://x/y=z"], prompts=["p"]
    )
    assert request.remove == (1, 2, 5) and dict(request.replace) == {3: {"source_model": "s3://x/y=z"}}
    assert request.add == ({"source_model": "a", "positive_prompts": {"file": "p"}}, {"source_model": "b"})


def test_verify_repeats_an_edit(old: Path, tmp_path: Path) -> None:
    from tests.runtime.in_process import in_this_process

    for number, changes in enumerate(({}, {"keep_routers": True})):
        edit_here(old, tmp_path / str(number), remove=[1], **changes)
        with in_this_process():
            assert raymoe.verify(tmp_path / str(number)).ok


def test_starts_for_training(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Experts that are parts of models are refused; channels that were drawn stay as they are."""
    base, *models = (zoo("llama", seed=seed) for seed in range(4))
    config = merge_config(base, models, mode="hidden")
    merge_here({**config, "granularity": 2}, tmp_path / "cut")
    assert "was cut into 2 experts (granularity)" in refused(tmp_path / "cut", remove=[0])
    merge_here({**config, "reinit": 0.5}, tmp_path / "drawn")
    edit_here(tmp_path / "drawn", tmp_path / "new", remove=[0])
    before, after = (tensors_of(tmp_path / name) for name in ("drawn", "new"))
    moved = {name: name.replace(".experts.1.", ".experts.0.") for name in before if ".experts.1." in name}
    assert moved and all(torch.equal(before[name], after[now]) for name, now in moved.items())
