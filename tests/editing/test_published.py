"""Edits of mixtures that raymoe has no record of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures.pairs import PAIRS, Pair
from tests.editing.test_edits import edit_here, same_weights
from tests.editing.test_requests import refused
from tests.pico import LAYERS, PROMPTS, merge_config, merge_here, tensors_of


def without_record(pair: Pair, zoo: Callable[..., Path], folder: Path, **changed: Any) -> tuple[Path, dict[str, Any]]:
    """A mixture of three experts as another program may have made it, and the config that it was made by."""
    import json

    base, *models = (zoo(pair.family, seed=seed, **pair.options) for seed in range(5))
    config = pair.config(base, models[:3], models[3], mode="ridge")
    merge_here(config, folder)
    (folder / "raymoe.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changed}))
    return folder, config


def pair_of(name: str) -> Pair:
    pair = next(pair for pair in PAIRS if str(pair) == name)
    pair.skip_where_unknown()
    return pair


@pytest.mark.parametrize("name", ["llama-mixtral", "qwen2-qwen2_moe", "qwen3-glm4_moe-shared"])
def test_prompts_for_all_experts_make_new_routers(name: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """With the mixture's backbone and the experts' FFNs: the same merge, if its own backbone was the base's."""
    pair = pair_of(name)
    old, config = without_record(pair, zoo, tmp_path / "old")
    files = []
    for number in range(3):
        file = tmp_path / f"{number}.txt"
        file.write_text("\n".join(PROMPTS[number]) + "\n")
        files.append(f"{number}={file}")
    one, two, three = config["experts"]
    new = {**three, "source_model": one["source_model"]}
    edit_here(old, tmp_path / "new", replace={2: one["source_model"]}, prompts=files, gate_mode="ridge")
    merge_here({**config, "experts": [one, two, new]}, tmp_path / "expected")
    same_weights(tmp_path / "new", tmp_path / "expected")
    assert "has no record of" in refused(old, remove=[0])


def test_what_a_merge_would_lose_is_refused(zoo: Callable[..., Path], tmp_path: Path) -> None:
    old, _ = without_record(pair_of("qwen3-qwen3_moe"), zoo, tmp_path / "old", norm_topk_prob=False)
    assert "norm_topk_prob: False (it would be True)" in refused(old, remove=[0], keep_routers=True)
    old, _ = without_record(pair_of("qwen3-glm4_moe"), zoo, tmp_path / "biased")
    names = [name for name in tensors_of(old) if name.endswith("e_score_correction_bias")]
    assert len(names) == LAYERS
    edit_here(old, tmp_path / "fine", remove=[0], keep_routers=True)
    rewrite(old, {names[0]: torch.full_like(tensors_of(old)[names[0]], 0.5)})
    assert "it has trained values in " in refused(old, remove=[0], keep_routers=True)


def rewrite(folder: Path, changed: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {**tensors_of(folder), **changed}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_gate_of_shared_experts_is_kept_or_refused(zoo: Callable[..., Path], tmp_path: Path) -> None:
    old, _ = without_record(pair_of("qwen2-qwen2_moe-shared"), zoo, tmp_path / "old")
    assert "its shared expert has a gate" in refused(old, remove=[0], gate_mode="random")
    edit_here(old, tmp_path / "new", remove=[0], keep_routers=True)
    before, after = tensors_of(old), tensors_of(tmp_path / "new")
    shared = [name for name in before if ".shared_expert" in name]
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    shutil.rmtree(tmp_path / "new")


@pytest.mark.s3
def test_a_mixture_on_the_hub(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """It is read at the commit that it was opened at, which the config of the result names."""
    import json

    import raymoe
    from raymoe.checkpoints.merge_record import read_record
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.hub import HubOptions
    from raymoe.sources.local_folder import LocalFolder
    from tests.runtime.in_process import in_this_process
    from tests.sources.hub_server import HubServer

    base, *models = (zoo("llama", seed=seed) for seed in range(4))
    config = merge_config(base, models, mode="hidden")
    merge_here(config, tmp_path / "old")
    merge_here({**config, "experts": config["experts"][1:]}, tmp_path / "expected")
    with HubServer() as hub, in_this_process():
        commit = hub.add("org/old", tmp_path / "old").commit
        options = HubOptions(endpoint=hub.url, cache_dir=str(tmp_path / "cache"))
        settings = RuntimeSettings(verbosity=-1, hub=options)
        raymoe.edit("org/old", tmp_path / "new", remove=[0], settings=settings)
        raymoe.edit("org/old", tmp_path / "kept", remove=[0], keep_routers=True, settings=settings)
    same_weights(tmp_path / "new", tmp_path / "expected")
    same_weights(tmp_path / "kept", tmp_path / "expected")
    record = json.loads((tmp_path / "kept" / "raymoe.json").read_text())
    assert record["edit"]["mixture"] == f"org/old@{commit}"
    assert record["sources"][1]["model"] == f"org/old@{commit}#1"
    assert read_record(LocalFolder(str(tmp_path / "kept"))).config.keeps_all_rows
