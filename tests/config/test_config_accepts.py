"""Configs that load, what they become, and that `to_plain` keeps all of it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from raymoe.config import (
    MergeConfig,
    PromptFile,
    check_config,
    config_warnings,
    load_config,
    load_config_with_positions,
    parse_config,
)
from raymoe.config.model_refs import ModelRef, PathRef

FOUR_MISTRALS = """\
base_model: mlabonne/AlphaMonarch-7B
experts:
  - source_model: mlabonne/AlphaMonarch-7B
    positive_prompts:
    - "talk"
    - "helper"
    - "describe"
    - "what is"
    - "I would like"
  - source_model: beowolx/CodeNinja-1.0-OpenChat-7B
    positive_prompts:
    - "function"
    - "python"
    - "bug"
    - "compile"
    - "class"
  - source_model: SanjiWatsuki/Kunoichi-DPO-v2-7B
    positive_prompts:
    - "novel"
    - "dialogue"
    - "plot"
    - "hero"
    - "chapter"
  - source_model: mlabonne/NeuralDaredevil-7B
    positive_prompts:
    - "sum"
    - "equation"
    - "proof"
    - "how many"
    - "percent"
"""

QWEN_SHARED = """\
base_model: Qwen/Qwen1.5-1.8B
architecture: Qwen
gate_mode: hidden   # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: Qwen/Qwen1.5-1.8B-Chat
    positive_prompts: ["<|im_start|>user\\nHello"]
    negative_prompts:
      - "def main():"
  - source_model: ./code@home/qwen+sql
    positive_prompts: ["SELECT"]
shared_experts:
  - source_model: Qwen/Qwen1.5-1.8B
    positive_prompts: # required by Qwen MoE
      - "blah blah"
    residual_scale: 0.1
    noise_scale: 0
"""

UPCYCLING = "base_model: a/b\ngate_mode: random\nexperts:\n" + "  - source_model: a/b\n" * 8

TWO = {
    "base_model": "base/model",
    "experts": [
        {"source_model": "x/math", "positive_prompts": ["sum"]},
        {"source_model": "x/code", "positive_prompts": ["def"]},
    ],
}


def two(**changes: object) -> dict[str, object]:
    return {**copy.deepcopy(TWO), **changes}


def test_four_expert_mistral_config_of_articles() -> None:
    config = parse_config(FOUR_MISTRALS, name="beyonder.yaml")
    assert [len(expert.positive_prompts) for expert in config.experts] == [5, 5, 5, 5]
    assert config.experts[1].source_model == ModelRef(model=PathRef(path="beowolx/CodeNinja-1.0-OpenChat-7B"))
    assert config.experts[3].positive_prompts[3] == "how many"
    assert (config.gate_mode, config.dtype, config.experts_per_token) == ("hidden", None, 2)
    assert (config.shared_experts, config.architecture, config.prompt_model) == ((), None, None)
    assert config_warnings(config) == []


def test_qwen_config_with_shared_expert() -> None:
    text = QWEN_SHARED.replace("./code@home/qwen+sql", "Qwen/code@v2+me/sql-lora@main")
    config = parse_config(text, name="qwen.yaml")
    assert config.architecture == "qwen"
    assert config.experts[0].positive_prompts == ("<|im_start|>user\nHello",)
    assert config.experts[0].negative_prompts == ("def main():",)
    assert config.experts[1].source_model == ModelRef(
        model=PathRef(path="Qwen/code", revision="v2"), adapter=PathRef(path="me/sql-lora", revision="main")
    )
    (shared,) = config.shared_experts
    assert (shared.residual_scale, shared.noise_scale) == (0.1, 0.0)


def test_sparse_upcycling_needs_no_flag_but_warns() -> None:
    config = parse_config(UPCYCLING, name="up.yaml")
    assert len(config.experts) == 8
    assert config_warnings(config) == ["all 8 experts are the same model: not useful before the merge is trained"]


def test_null_is_the_default() -> None:
    keys = ("shared_experts", "gate_mode", "dtype", "experts_per_token", "architecture", "prompt_model")
    assert MergeConfig.model_validate(two(**dict.fromkeys(keys))) == MergeConfig.model_validate(TWO)
    nulls = "positive_prompts: [x], negative_prompts: ~, noise_scale: null, residual_scale:"
    text = f"base_model: a\nexperts_per_token: 1\nexperts:\n- {{source_model: b, {nulls}}}\n"
    expert = parse_config(text, name="x").experts[0]
    assert (expert.negative_prompts, expert.noise_scale) == ((), None)


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("gate_mode", "hidden_last", "hidden"),
        ("gate_mode", "hidden_avg", "hidden_avg"),
        ("gate_mode", "cheap_embed", "cheap_embed"),
        ("dtype", "torch.bfloat16", "bfloat16"),
        ("dtype", "float16", "float16"),
        ("architecture", "' Mixtral '", "mixtral"),
        ("experts_per_token", "1", 1),
        ("experts_per_token", "2.0", 2),
        ("prompt_model", "grafted", "grafted"),
    ],
)
def test_values_of_top_keys(key: str, typed: str, value: object) -> None:
    config = parse_config(f"{json.dumps(TWO)[:-1]}, {key}: {typed}}}", name="x.yaml")
    assert getattr(config, key) == value


@pytest.mark.parametrize(
    ("typed", "number"), [("0.5", 0.5), ("2", 2.0), ("1e-3", 0.001), ("+5E2", 500.0), ("0x10", 16.0)]
)
def test_scales_take_every_spelling_of_a_number(typed: str, number: float) -> None:
    expert = f"{{source_model: b, positive_prompts: [x], noise_scale: {typed}}}"
    text = f"base_model: a\nexperts_per_token: 1\nexperts:\n- {expert}\n"
    scale = parse_config(text, name="x.yaml").experts[0].noise_scale
    assert scale == number
    assert type(scale) is float


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_modes_take_prompts_or_none(mode: str) -> None:
    assert not MergeConfig.model_validate(two(gate_mode=mode)).needs_prompts
    bare = [{"source_model": "x/math"}, {"source_model": "x/code"}]
    assert check_config(MergeConfig.model_validate(two(gate_mode=mode, experts=bare))) == []


def test_json_with_tabs_escapes_and_exponents_loads(tmp_path: Path) -> None:
    config = two()
    config["experts"][0]["positive_prompts"] = ["a/b \U0001f600 \t tab"]  # type: ignore[index]
    config["experts"][0]["noise_scale"] = 1e-05  # type: ignore[index]
    path = tmp_path / "merge.json"
    path.write_text(json.dumps(config, indent="\t").replace("/", "\\/"), encoding="utf-8-sig")
    loaded = load_config(path).experts[0]
    assert (loaded.positive_prompts, loaded.noise_scale) == (("a/b \U0001f600 \t tab",), 1e-05)


def test_anchors_and_merge_keys() -> None:
    text = """\
base_model: &base a/b
experts_per_token: 1
experts:
  - &first
    source_model: *base
    positive_prompts: &p [one, two]
    noise_scale: 0.5
  - <<: *first
    source_model: c/d
    positive_prompts: [three]
"""
    config = parse_config(text, name="x.yaml")
    assert str(config.experts[1].source_model) == "c/d"
    assert config.experts[1].positive_prompts == ("three",)
    assert config.experts[1].noise_scale == 0.5


def test_lines_of_a_loaded_config(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(FOUR_MISTRALS)
    config, lines = load_config_with_positions(path)
    assert config == load_config(str(path))
    assert lines.describe(("experts", 1, "positive_prompts", 2)) == f"{path}:14: experts[1].positive_prompts[2]"
    assert lines.describe(("experts", 1, "source_model")) == f"{path}:10: experts[1].source_model"
    assert lines.describe(("architecture",)) == f"{path}:1: architecture"
    assert lines.describe(()) == f"{path}:1"


@pytest.mark.parametrize("text", [FOUR_MISTRALS, QWEN_SHARED, UPCYCLING], ids=["mistral", "qwen", "upcycling"])
def test_to_plain_round_trip(text: str) -> None:
    text = text.replace("./code@home/qwen+sql", "{model: {path: ./code@home/qwen+sql}}")
    config = parse_config(text, name="x.yaml")
    plain = json.loads(json.dumps(config.to_plain()))
    assert MergeConfig.from_plain(plain) == config
    assert MergeConfig.from_plain(plain).to_plain() == plain
    assert list(plain) == list(MergeConfig.model_fields)
    assert plain["base_model"] == str(config.base_model)


def test_blank_prompts_beside_negative_ones() -> None:
    """A published config for mergekit-moe has them: the router is computed from what the experts should not get."""
    experts = [{"source_model": name, "positive_prompts": [""], "negative_prompts": [name]} for name in ("a/x", "b/y")]
    config = MergeConfig.model_validate(two(experts=experts))
    assert check_config(config) == []
    assert config_warnings(config) == [
        f"experts[{number}].positive_prompts[0] is blank: only the beginning of a text is read" for number in (0, 1)
    ]


def test_to_plain_is_the_same_for_configs_that_mean_the_same() -> None:
    spelled_out = two(gate_mode="hidden_last", dtype="torch.float16", experts_per_token=2, shared_experts=[])
    short = two(dtype="float16")
    assert MergeConfig.model_validate(spelled_out).to_plain() == MergeConfig.model_validate(short).to_plain()
    other = MergeConfig.model_validate(two(dtype="float16", prompt_model="base"))
    assert other.to_plain() != MergeConfig.model_validate(short).to_plain()


def test_names_with_plus_and_at_survive_to_plain() -> None:
    ref = ModelRef(model=PathRef(path="./a+b@c"), adapter=PathRef(path="o/n", revision="v1"))
    config = MergeConfig.model_validate(two(base_model=ref))
    plain = json.loads(json.dumps(config.to_plain()))
    assert MergeConfig.from_plain(plain).base_model == ref


def test_prompt_files() -> None:
    text = """\
base_model: a
chat_template: true
experts:
  - source_model: x/a
    positive_prompts: {file: " prompts/a.TXT "}
    negative_prompts: ["no"]
  - source_model: x/b
    chat_template: false
    positive_prompts: {file: S3A://bucket/b.jsonl.gz, field: q, limit: null, seed: 3}
"""
    config = parse_config(text, name="x.yaml")
    first, second = config.experts
    assert first.positive_prompts == PromptFile(file="prompts/a.TXT", field="text", limit=256, seed=0)
    assert second.positive_prompts == PromptFile(file="s3://bucket/b.jsonl.gz", field="q", limit=None, seed=3)
    assert [config.uses_chat_template(expert) for expert in config.experts] == [True, False]
    assert list(config.prompt_files) == [("experts", 0, "positive_prompts"), ("experts", 1, "positive_prompts")]
    nulls = {"file": "prompts/a.TXT", "field": None, "limit": 256, "seed": None}
    assert PromptFile.model_validate(nulls) == first.positive_prompts
    plain = json.loads(json.dumps(config.to_plain()))
    assert MergeConfig.from_plain(plain) == config
    assert hash(MergeConfig.from_plain(plain)) == hash(config)
    assert (config_warnings(config), check_config(config)) == ([], [])
    replaced = config.with_prompts(dict.fromkeys(config.prompt_files, ("x", "y")))
    assert [expert.positive_prompts for expert in replaced.experts] == [("x", "y")] * 2
    assert (replaced.experts[0].negative_prompts, replaced.chat_template) == (("no",), True)


def test_modes_without_prompts_read_no_files() -> None:
    experts = [{"source_model": name, "positive_prompts": {"file": "none.txt"}} for name in ("x/a", "x/b")]
    config = MergeConfig.model_validate(two(experts=experts, gate_mode="random"))
    assert config.prompt_files == {}
    assert check_config(config) == []


def test_configs_are_frozen_and_hashable() -> None:
    config = MergeConfig.model_validate(TWO)
    assert hash(config) == hash(MergeConfig.model_validate(copy.deepcopy(TWO)))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.dtype = "float16"


def test_adapters_make_different_models() -> None:
    experts = [{"source_model": f"a/b+x/{name}", "positive_prompts": [name]} for name in ("one", "two")]
    assert check_config(MergeConfig.model_validate(two(experts=experts))) == []


def test_one_expert_is_not_all_the_same() -> None:
    experts = [{"source_model": "a/b", "positive_prompts": ["x"]}]
    assert check_config(MergeConfig.model_validate(two(experts=experts, experts_per_token=1))) == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            {"experts": [*TWO["experts"], TWO["experts"][0]]},
            r"^experts\[0\], experts\[2\] have the same source_model and prompts: one expert 2 times$",
        ),
        (
            {"experts": [TWO["experts"][0], {"source_model": "y", "positive_prompts": ["z", " \n"]}]},
            r"^experts\[1\]\.positive_prompts\[1\] is blank: only the beginning of a text is read$",
        ),
        (
            {"gate_mode": "random", "prompt_model": "expert"},
            r"^prompt_model has no effect: gate_mode random reads no",
        ),
        (
            {"gate_mode": "random", "chat_template": True},
            r"^chat_template has no effect: gate_mode random reads no prompts$",
        ),
        (
            {
                "experts": [
                    TWO["experts"][0],
                    {"source_model": "y", "positive_prompts": {"file": "a.txt", "field": "b"}},
                ]
            },
            r"^experts\[1\]\.positive_prompts\.field has no effect: a text file has one prompt per line$",
        ),
    ],
    ids=["twins", "blank", "idle", "idle template", "idle field"],
)
def test_warnings(change: dict[str, object], warning: str) -> None:
    config = MergeConfig.model_validate(two(**change))
    assert check_config(config) == []
    (text,) = config_warnings(config)
    assert re.search(warning, text)


@pytest.mark.processes
def test_import_is_light() -> None:
    code = "import raymoe.config, sys; print(*(m for m in ('torch', 'ray', 'transformers') if m in sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == ""
