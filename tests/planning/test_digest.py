"""The digest: the same for the same output, another for what changes a byte of it. Equal digests let a merge go on."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.planning import MergeOptions
from raymoe.planning.digest import OUTPUT_FORMAT
from raymoe.planning.multipart import upload_layout
from raymoe.planning.owner import Owner

Config = dict[str, Any]
SMALL = MergeOptions(max_shard_bytes=100_000)


@pytest.fixture(scope="module")
def config(zoo: Callable[..., Path]) -> Config:
    from tests.pico import merge_config

    return merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="hidden")


def digest(config: Config, options: MergeOptions = SMALL) -> str:
    return raymoe.plan(config, options, allow_all_same=True).digest


def changed(config: Config, **keys: Any) -> Config:
    return {**copy.deepcopy(config), **keys}


def with_expert(config: Config, number: int, **keys: Any) -> Config:
    other = copy.deepcopy(config)
    other["experts"][number] |= keys
    return other


def test_same_inputs(config: Config) -> None:
    assert digest(config) == digest(copy.deepcopy(config))


def test_every_key_that_matters(config: Config, zoo: Callable[..., Path]) -> None:
    """Each variant differs from the plain config and from every other variant."""
    swapped = copy.deepcopy(config)
    swapped["experts"].reverse()
    prompts = config["experts"][0]["positive_prompts"]
    variants = {
        "plain": config,
        "gate mode": changed(config, gate_mode="hidden_avg"),
        "no prompts": changed(config, gate_mode="random"),
        "dtype": changed(config, dtype="bfloat16"),
        "experts per token": changed(config, experts_per_token=1),
        "architecture": changed(config, architecture="qwen"),
        "prompt model": changed(config, prompt_model="grafted"),
        "base": changed(config, base_model=str(zoo("llama", seed=4))),
        "order of experts": swapped,
        "fewer experts": changed(config, experts=config["experts"][:2]),
        "a source": with_expert(config, 1, source_model=str(zoo("llama", seed=4))),
        "a prompt": with_expert(config, 0, positive_prompts=[*prompts, "one more"]),
        "order of prompts": with_expert(config, 0, positive_prompts=prompts[::-1]),
        "negative prompts": with_expert(config, 0, negative_prompts=["not this"]),
        "noise": with_expert(config, 2, noise_scale=0.1),
        "other noise": with_expert(config, 2, noise_scale=0.2),
        "residual scale": with_expert(config, 2, residual_scale=0.5),
    }
    digests = {name: digest(variant) for name, variant in variants.items()}
    assert len(set(digests.values())) == len(variants), digests


def test_options_that_matter(config: Config) -> None:
    options = {
        "plain": SMALL,
        "shard size": MergeOptions(max_shard_bytes=200_000),
        "seed": MergeOptions(max_shard_bytes=100_000, seed=1),
        "tokenizer": MergeOptions(max_shard_bytes=100_000, copy_tokenizer=False),
        "quantised gates": MergeOptions(max_shard_bytes=100_000, quantize_gates="8bit"),
    }
    digests = {name: digest(config, option) for name, option in options.items()}
    assert len(set(digests.values())) == len(options), digests


def test_what_does_not_matter(config: Config, zoo: Callable[..., Path]) -> None:
    """Other words for the same, defaults written out, keys in another order, and flags that only permit something."""
    plain = digest(config)
    assert digest(changed(config, gate_mode="hidden_last")) == plain
    assert digest(changed(config, experts_per_token=2, shared_experts=None, prompt_model="base")) == plain
    assert digest(dict(reversed(config.items()))) == plain
    assert digest(with_expert(config, 0, noise_scale=0.0)) == plain
    assert digest(with_expert(config, 0, negative_prompts=[])) == plain
    assert digest(config, MergeOptions(max_shard_bytes=100_000, allow_crimes=True)) == plain
    assert digest(config, MergeOptions(max_shard_bytes=100_000, model_card=False)) == plain
    # Prompts are not read where gates are random.
    random_gates = changed(config, gate_mode="random")
    assert digest(with_expert(random_gates, 0, positive_prompts=["other"])) == digest(random_gates)


def test_sources_that_matter(config: Config, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Another folder, another config.json, another layout of the same weights; not a file that is not taken over."""
    base = tmp_path / "base"
    shutil.copytree(zoo("llama"), base)
    here = changed(config, base_model=str(base))
    before = digest(here)
    assert before != digest(config)
    (base / "notes.txt").write_text("not part of a model")
    assert digest(here) == before
    (base / "generation_config.json").write_text('{"temperature": 0.123456}')
    after = digest(here)
    assert after != before
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))
    assert digest(here) != after


def test_canonical_text_is_plain_json(config: Config, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """The digest is that of the plan as one JSON text with sorted keys, as earlier versions wrote it in one piece."""
    for variant in (
        changed(config, gate_mode="ridge", prompt_model="grafted"),
        with_expert(
            config, 2, noise_scale=0.25, residual_scale=0.5, positive_prompts=["Übung \u2028 %s", "b" * 9, "c"]
        ),
        changed(config, gate_mode="random", dtype="bfloat16"),
    ):
        plan = raymoe.plan(variant, SMALL, allow_all_same=True)
        content = {
            "format": OUTPUT_FORMAT,
            "shards": plan.shards,
            "config": plan.config,
            "side_files": plan.side_files,
            "gates": plan.gates,
            "upload": upload_layout(plan.shards),
        }
        text = json.dumps(content, default=plain, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == plan.digest


def plain(value: Any) -> object:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Owner):
        return str(value)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}
    for key in (
        *("whole", "magnitude", "heads", "content", "combined", "factor"),
        *("router_layers", "columns", "reinit", "repeat", "kept"),
    ):
        if fields.get(key, ...) is None:
            del fields[key]
    names = {"HeadPermutation": "HeadRows", "rotary_dim": "turned", "quantize": "quantise"}
    kind = type(value).__name__
    return {"kind": names.get(kind, kind), **{names.get(key, key): each for key, each in fields.items()}}


def test_layout_of_uploads(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on with the parts that an earlier one has sent: parts that are cut otherwise are of another plan."""
    before = digest(config)
    monkeypatch.setattr("raymoe.planning.multipart.STREAM_PART_BYTES", 8 << 20)
    assert digest(config) != before


def test_plan_is_pure(config: Config) -> None:
    """Equal in every field, and unmoved by what is done with the config afterwards."""
    mine = copy.deepcopy(config)
    first = raymoe.plan(mine, SMALL)
    mine["experts"].clear()
    assert raymoe.plan(config, SMALL) == first


def test_totals(config: Config) -> None:
    """Sums, by hand: three experts, two active."""
    plan = raymoe.plan(config, SMALL)
    per_expert = 3 * 3 * 64 * 96  # layers x matrices x hidden x intermediate
    totals = plan.totals
    assert totals.parameters - totals.active_parameters == per_expert
    assert totals.output_bytes == sum(shard.nbytes for shard in plan.shards) == sum(totals.bytes_by_owner.values())
    assert sum(totals.bytes_by_kind.values()) == 4 * totals.parameters
    assert totals.bytes_by_kind["router"] == 4 * 3 * 3 * 64
    assert plan.index["metadata"]["total_size"] == 4 * totals.parameters
    names = [part.name for shard in plan.shards for part in shard.parts]
    assert plan.index["weight_map"].keys() == set(names)
