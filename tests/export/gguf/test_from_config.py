"""A config is converted without its merge being written, to the bytes that the written merge is converted to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymoe.config import make_config
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.object_store.options import StorageOptions
from raymoe.planning import MergeOptions
from raymoe.report.model_card import model_card
from raymoe.report.source_metadata import source_cards
from raymoe.sources.hub import HubOptions
from tests.cli.commands import write_config
from tests.export.gguf.conftest import TOKENIZER_FILES
from tests.pico import merge_config, merge_without_ray, save_lora


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        # Copies, LoRA, noise and scale; another dtype than the sources'.
        (
            "llama",
            {"mode": "hidden", "dtype": "bfloat16", "expert_options": {"noise_scale": 0.01, "residual_scale": 0.9}},
        ),
        # A shared expert of zeros, and biases.
        ("llama", {"mode": "random", "architecture": "qwen2_moe"}),
        # Two shared experts as one.
        ("llama", {"mode": "random", "architecture": "deepseek"}),
        ("qwen3", {"mode": "cheap_embed"}),
        # All experts in one tensor.
        ("granite", {"mode": "random"}),
        ("lfm2", {"mode": "random", "experts_per_token": 1}),
        # A tied head, stored for engines that never tie.
        ("qwen3", {"mode": "random", "architecture": "glm4_moe", "model": {"tie_word_embeddings": True}}),
    ],
)
def test_same_bytes(family: str, options: dict[str, Any], kind: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    model = options.get("model", {})
    options = {key: value for key, value in options.items() if key != "model"}
    base = zoo(family, **model)
    adapter = save_lora(tmp_path / "adapter", base, ["up_proj", "down_proj", "w1", "w2"])
    config = merge_config(base, [zoo(family, seed=1, **model), f"{base}+{adapter}"], **options)
    if options.get("architecture") == "deepseek":
        sharer = {"source_model": str(zoo(family, seed=2))}
        config["shared_experts"] = [{**sharer, "residual_scale": 0.5}, sharer]
    plan = merge_without_ray(config, tmp_path / "merged", MergeOptions(seed=5))
    for name in TOKENIZER_FILES:
        shutil.copy(base / name, tmp_path / "merged" / name)
    card = model_card(plan, make_config(config), None, source_cards(plan, HubOptions(), StorageOptions()))
    (tmp_path / "merged/README.md").write_text(card)
    asked = GgufOptions(type=kind, name="same", merge=MergeOptions(seed=5), device="cpu")
    of_files = write_gguf(tmp_path / "merged", tmp_path / "files.gguf", asked)
    of_config = write_gguf(write_config(tmp_path / "merge.yaml", config), tmp_path / "config.gguf", asked)
    assert of_config.path.read_bytes() == of_files.path.read_bytes()


def test_the_file_says_where_it_is_from(zoo: Callable[..., Path], tmp_path: Path) -> None:
    import gguf

    base = Path(shutil.copytree(zoo("llama"), tmp_path / "base"))
    head = "license: apache-2.0\nlanguage: en\nbase_model: org/first\ntags: [merge, own]\n"
    (base / "README.md").write_text(f"---\n{head}---\n\n# A model\n")
    written = write_gguf(base, tmp_path / "model.gguf", GgufOptions())
    fields = {key: field.contents() for key, field in gguf.GGUFReader(written.path).fields.items()}
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/org/first"
    assert (fields["general.base_model.0.name"], fields["general.base_model.0.organization"]) == ("first", "org")
    assert fields["general.tags"] == ["merge", "own"] and fields["general.languages"] == ["en"]
    # Of a merge that is not written: what its card would say.
    config = write_config(tmp_path / "merge.yaml", merge_config(base, [base, zoo("llama", seed=1)], mode="random"))
    merged = write_gguf(config, tmp_path / "merged.gguf", GgufOptions())
    of_merge = {key: field.contents() for key, field in gguf.GGUFReader(merged.path).fields.items()}
    assert "general.license" not in of_merge, "one source states none"
    assert of_merge["general.base_model.0.name"] == "first" and "frankenmoe" in of_merge["general.tags"]


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        ({"license": ["mit", "cc-by-nc-4.0"]}, {}),
        ({"license": ["MIT"]}, {"license": "mit"}),
        ({"license": "see the file LICENSE"}, {}),
        (
            {"license": "other", "license_name": "own terms", "license_link": "https://example.org/terms"},
            {"license": "other", "license.name": "own terms", "license.link": "https://example.org/terms"},
        ),
        (
            {"license": "other", "license_name": "own terms", "license_link": "LICENSE"},
            {"license": "other", "license.name": "own terms"},
        ),
        ({"base_model": ["base", "here/base", "./base", "/data/base"]}, {}),
        (
            {"base_model": ["here/base", "org/first"]},
            {
                "base_model.count": 1,
                "base_model.0.name": "first",
                "base_model.0.organization": "org",
                "base_model.0.repo_url": "https://huggingface.co/org/first",
            },
        ),
    ],
)
def test_nothing_is_said_that_the_card_does_not_say(
    head: dict[str, Any],
    wanted: dict[str, Any],
    zoo: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several licences none is the model's, and a folder of the one who trained it is no model of the Hub."""
    import gguf

    model = Path(shutil.copytree(zoo("llama", num_hidden_layers=1), tmp_path / "model"))
    (model / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n\n# A model\n")
    (tmp_path / "here/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    reader = gguf.GGUFReader(write_gguf(model, tmp_path / "model.gguf").path)
    parts = ("general.license", "general.base_model")
    said = {key.removeprefix("general."): f.contents() for key, f in reader.fields.items() if key.startswith(parts)}
    assert said == wanted
