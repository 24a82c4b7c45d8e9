"""Image-text models as published, in several files on the Hub and in a bucket: merged, verified and inspected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import raymoe
from raymoe.architectures.wrappers import WRAPPERS
from raymoe.planning import MergeOptions
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.hub import HubOptions
from tests.architectures.test_gemma4 import E2B
from tests.pico import merge_config, save_lora, tensors_of
from tests.sources.hub_server import HubServer
from tests.sources.test_bucket_folder import upload
from tests.wrapped import OTHER_NAMES, rename_tensors, save_wrapped, split_into_shards

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("without_ray")]

PROCESSOR = {"preprocessor_config.json": {"patch_size": 8}, "processor_config.json": {"processor_class": "P"}}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, hub: HubServer, tmp_path: Path) -> RuntimeSettings:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return RuntimeSettings(verbosity=-1, hub=HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=hub.url))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def published(folder: Path, wrapper: str, seed: int, *, other_names: bool = False) -> Path:
    save_wrapped(folder, wrapper, seed=seed, **(E2B if wrapper == "gemma4" else {}))
    if other_names:
        rename_tensors(folder, OTHER_NAMES[wrapper])
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return split_into_shards(folder, 3)


@pytest.mark.parametrize(
    ("wrapper", "other_names"),
    [
        *(("qwen3_5", False), ("gemma4", False), ("qwen3_vl", False)),
        *(("llava", False), ("llava", True), ("mistral3", True)),
    ],
)
def test_a_merge_of_them_is_that_of_local_folders(
    wrapper: str, other_names: bool, hub: HubServer, bucket: str, settings: RuntimeSettings, tmp_path: Path
) -> None:
    """The base is on the Hub, with an adapter for one expert; the other expert is in a bucket."""
    base = published(tmp_path / "base", wrapper, 0, other_names=other_names)
    other = published(tmp_path / "other", wrapper, 1)
    adapter = save_lora(tmp_path / "adapter", base, ["up_proj", "q_proj"])
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)
    url = upload(other, f"{bucket}/other")

    options = MergeOptions(max_shard_bytes=300_000)
    config = merge_config("org/base", ["org/base+org/adapter", url], mode="random", backbone="linear")
    raymoe.merge(config, tmp_path / "merged", options, settings=settings)
    local = merge_config(base, [f"{base}+{adapter}", other], mode="random", backbone="linear")
    raymoe.merge(local, tmp_path / "of_local", options, settings=settings)

    merged, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "of_local")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    verification = raymoe.verify(tmp_path / "merged", settings=settings)
    assert (verification.tensors, verification.differences) == (len(merged), ())
    found = raymoe.inspect(tmp_path / "merged")
    assert found["experts"] == 2
    assert [source["owner"] for source in found["merge"]["sources"]] == ["base", "expert 0", "expert 1"]
    keeps_images = bool(WRAPPERS[wrapper].mixture)
    assert all((tmp_path / "merged" / name).is_file() == keeps_images for name in PROCESSOR)


def test_planning_reads_headers_of_all_files_only(hub: HubServer, settings: RuntimeSettings, tmp_path: Path) -> None:
    """From the Hub, the vision encoder costs nothing but its part of the headers."""
    base = published(tmp_path / "base", "qwen3_5", 0)
    hub.add("org/base", base)

    plan = raymoe.plan(merge_config("org/base", ["org/base"] * 2, mode="random"), hub=settings.hub, allow_all_same=True)

    assert any(name.startswith("model.visual.") for name in plan.index["weight_map"])
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert hub.body_bytes(".safetensors") < size / 4
