"""The rows of engines, the verdicts that they give, and what plans, configs, cards and commands make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.config import make_config
from raymoe.engines import ENGINES, FEATURES, ServedModel, engine_rows, features_of, judge
from raymoe.engines.table import _RANKS
from raymoe.errors import ProblemReport
from raymoe.report.engine_lines import engine_lines
from raymoe.report.engine_table import architecture_lines, print_engine_table
from raymoe.report.model_card import model_card
from raymoe.report.plan_report import plan_summary, print_plan
from tests.architectures.pairs import LLAMA3, WINDOW
from tests.engines.cases import CASES
from tests.pico import merge_config, plan_problems

Zoo = Callable[..., Path]
SCALED = {"rope_scaling": LLAMA3}


LONGROPE = {
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "original_max_position_embeddings": 32,
}


def model_card_of(zoo: Zoo, family: str, options: dict[str, Any]) -> str:
    folders = [zoo(family, seed=seed, **options) for seed in range(3)]
    config = make_config(merge_config(folders[0], folders, mode="random"))
    return model_card(raymoe.plan(config), config)


def plan_of(zoo: Zoo, family: str, options: dict[str, Any] | None = None, **config: Any) -> Any:
    folders = [zoo(family, seed=seed, **(options or {})) for seed in range(3)]
    return raymoe.plan(merge_config(folders[0], folders, mode="random", **config))


# --- rows


def test_rows_name_what_exists_and_each_place_has_one() -> None:
    rows = engine_rows()
    places = [(row.engine, row.architecture, row.feature) for row in rows]
    assert len(places) == len(set(places)) > 300
    assert {row.engine for row in rows} == set(ENGINES)
    assert {row.architecture for row in rows} == set(MOE_ARCHITECTURES)
    assert {row.feature for row in rows} <= {"", *FEATURES}
    assert {row.verdict for row in rows} <= set(_RANKS) - {"unknown"}
    assert {row.found for row in rows} == {"run", "read"}
    assert all(row.version for row in rows)


def test_rows_of_features_have_one_of_their_architecture() -> None:
    plain = {(row.engine, row.architecture) for row in engine_rows() if not row.feature}
    assert {(row.engine, row.architecture) for row in engine_rows()} == plain


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES} == set(MOE_ARCHITECTURES)


def test_what_is_not_the_same_has_a_reason_that_fits_a_sentence() -> None:
    wrong = [row for row in engine_rows() if row.verdict != "same"]
    assert [row for row in wrong if not row.reason or row.reason.endswith(".")] == []
    assert [row for row in wrong if row.verdict == "otherwise" and not row.reason.startswith(("with", "from"))] == []


def test_the_same_is_a_small_difference() -> None:
    """2e-3 in float32. Where an engine computes in 16 bits (Qwen3.5, a table of GELU), its rows say so."""
    measured = [row for row in engine_rows() if row.found == "run" and row.difference]
    assert [r for r in measured if r.verdict == "otherwise" and float(r.difference) < 2e-3] == []
    large = [r for r in measured if r.verdict == "same" and float(r.difference) >= 2e-3]
    assert [r for r in large if "float16" not in r.reason] == []


# --- features and verdicts


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_scaling": LLAMA3}, {"rope_llama3"}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_linear"}),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, {"rope_yarn"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, set()),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional"}}}, set()),
        ({"position_embedding_type": None}, {"no_rope"}),
        ({"position_embedding_type": "nope"}, {"no_rope"}),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary"}),
        ({"head_dim": 64, "num_attention_heads": 4, "hidden_size": 256}, set()),
        ({"head_dim": 32, "num_attention_heads": 4, "hidden_size": 256}, {"head_dim"}),
        ({"sliding_window": 4096, "max_position_embeddings": 32768}, {"window_all"}),
        ({"sliding_window": 4096, "max_position_embeddings": 4096}, set()),
        ({"sliding_window": 4096, "use_sliding_window": False}, set()),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, {"window_some"}),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, {"window_all"}),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, set()),
        ({"layer_types": ["mamba", "attention"]}, {"state_layers"}),
        ({"hidden_act": "gelu"}, {"activation"}),
    ],
)
def test_features_are_read_from_the_config(config: dict[str, Any], expected: set[str]) -> None:
    assert features_of(ServedModel(config=config, experts=2, experts_per_token=2)) == expected | {"untied"}


def test_features_of_experts_heads_and_biases() -> None:
    def features(**facts: Any) -> set[str]:
        return set(features_of(ServedModel(**{"config": {}, "experts": 4, "experts_per_token": 2, **facts})))

    assert features() == {"untied", "renormalize"}
    assert features(experts_per_token=1) == {"untied", "top1"}
    assert features(experts=1, experts_per_token=1) == {"untied"}
    assert features(experts=2) == {"untied"}
    assert features(shared=True, experts=2) == {"untied", "shared"}
    assert features(has_qkv_bias=True, has_o_bias=True, experts=2) == {"untied", "qkv_bias", "o_bias"}
    tied = {"tie_word_embeddings": True}
    assert features(config=tied, has_head=False, experts=2) == {"tied"}
    assert features(config=tied, has_head=True, experts=2) == {"tied_stored"}


def test_the_worst_row_decides() -> None:
    assert judge("vllm", "glm4_moe", {"untied", "head_dim"}).status == "same"
    wrong = judge("mlx", "mixtral", {"rope_llama3", "window_all", "untied"})
    assert wrong.status == "otherwise" and wrong.was_run
    assert wrong.reason == "without its RoPE scaling and without its sliding window"
    assert judge("mlx", "mixtral", {"rope_llama3", "head_dim"}).status == "fails"
    assert judge("sglang", "mixtral", {"rope_llama3"}).was_run is False
    assert judge("vllm", "", set()).status == judge("none", "mixtral", set()).status == "unknown"


# --- plans


def test_a_plan_warns_of_engines_that_compute_it_otherwise(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(zoo, "llama", SCALED)
    assert plan.architecture == "mixtral" and "rope_llama3" in plan.features
    mlx, sglang = plan.engine_warnings
    assert mlx.startswith("mlx-lm ") and "computes this Mixtral without its RoPE scaling: " in mlx
    assert sglang.startswith("SGLang ") and "its source was read, not run" in sglang
    assert "use architecture: " in sglang and "qwen2_moe" in sglang
    print_plan(plan, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(mlx.split()) in shown and "No problems found" not in shown
    summary = plan_summary(plan)
    assert set(plan.engine_warnings) <= set(summary["warnings"])
    by_engine = {each["engine"]: each for each in summary["engines"]}
    assert by_engine["vllm"]["verdict"] == "same" and by_engine["mlx"]["verdict"] == "otherwise"


def test_a_plan_names_the_option_that_an_engine_needs(zoo: Zoo) -> None:
    (warning,) = plan_of(zoo, "lfm2", {"tie_word_embeddings": True}, engines=["vllm"]).engine_warnings
    assert warning.startswith("vLLM ") and "needs an option for this LFM2 MoE, --compilation-config '{" in warning
    (longrope,) = plan_of(zoo, "phi3", LONGROPE, engines=["vllm"]).engine_warnings
    assert "--max-model-len 32: " in longrope
    assert "--max-model-len 32`" in model_card_of(zoo, "phi3", LONGROPE)


def test_each_silent_difference_is_warned_of_and_nothing_else() -> None:
    """No row of an engine that warns is `otherwise` without reaching a plan that has its feature."""
    warned = [row for row in engine_rows() if row.verdict == "otherwise" and ENGINES[row.engine].warns]
    assert warned
    for row in warned:
        verdict = judge(row.engine, row.architecture, {row.feature})
        assert verdict.status == "otherwise" or judge(row.engine, row.architecture, ()).status == "fails"


def test_a_plain_merge_has_no_warnings(zoo: Zoo) -> None:
    assert plan_of(zoo, "llama").engine_warnings == ()


def test_an_image_text_merge_is_not_judged() -> None:
    assert judge("vllm", "", ("untied",)).status == "unknown"


# --- the config key


def test_engines_choose_the_architecture(zoo: Zoo) -> None:
    assert plan_of(zoo, "qwen2").architecture == "qwen2_moe"
    chosen = plan_of(zoo, "qwen2", engines=["vllm", "mlx"])
    assert chosen.architecture == "glm4_moe" and chosen.engine_warnings == ()
    assert plan_of(zoo, "llama", SCALED, engines="sglang").architecture == "qwen2_moe"


def test_engines_that_no_architecture_is_right_in(zoo: Zoo) -> None:
    window = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
    folders = [zoo("qwen2", seed=seed, **window) for seed in range(3)]
    text = plan_problems(merge_config(folders[0], folders, mode="random", engines=["vllm", "mlx"]))
    assert text.startswith("engines: no MoE architecture can hold a qwen2 base") and "for vLLM and mlx-lm:" in text
    assert "mlx-lm" in text and "sliding window" in text and "name fewer engines" in text


def test_engines_are_checked_for_an_architecture_that_is_named(zoo: Zoo) -> None:
    folders = [zoo("qwen2", seed=seed) for seed in range(3)]
    text = plan_problems(
        merge_config(folders[0], folders, mode="random", architecture="qwen2_moe", engines=["mlx", "tensorrt-llm"])
    )
    assert text.startswith("architecture: architecture 'qwen2_moe' can't hold")
    assert "mlx-lm 0.32.2 computes it without making the weights of the chosen experts sum to one" in text
    assert "TensorRT-LLM was not looked at" in text


def test_engines_do_not_change_the_bytes(zoo: Zoo) -> None:
    assert plan_of(zoo, "llama", engines=["vllm"]).digest == plan_of(zoo, "llama").digest


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["vlm"], "did you mean vllm?"),
        ("mlx-lm", "did you mean mlx?"),
        (3, "expected a list of engines"),
        ([1], "text"),
    ],
)
def test_engines_are_known_names(value: Any, message: str) -> None:
    with pytest.raises(ProblemReport, match=message.replace("?", r"\?")):
        make_config({"base_model": "org/a", "experts": [{"source_model": "org/b"}], "engines": value})


def test_a_config_with_engines_goes_through_json() -> None:
    experts = [{"source_model": "org/b"}, {"source_model": "org/c"}]
    config = make_config({"base_model": "org/a", "gate_mode": "random", "experts": experts, "engines": ["mlx", "mlx"]})
    plain = json.loads(json.dumps(config.to_plain()))
    assert plain["engines"] == ["mlx"] and raymoe.MergeConfig.from_plain(plain) == config


# --- cards and tables


def test_the_card_lists_engines_that_are_right_and_those_that_are_not(zoo: Zoo) -> None:
    folders = [zoo("llama", seed=seed, **SCALED) for seed in range(3)]
    config = make_config(merge_config(folders[0], folders, mode="random"))
    card = model_card(raymoe.plan(config), config)
    assert '`vllm serve "<this folder>"`' in card and "mlx_lm.generate" not in card
    assert "compute something else: mlx-lm 0.32.2 (without its RoPE scaling)" in card
    plain = [zoo("llama", seed=seed) for seed in range(3)]
    config = make_config(merge_config(plain[0], plain, mode="random"))
    card = model_card(raymoe.plan(config), config)
    assert 'mlx_lm.generate --model "<this folder>"' in card and "something else" not in card


def test_lines_of_a_plan_are_of_all_engines(zoo: Zoo) -> None:
    assert [line.engine for line in engine_lines(plan_of(zoo, "llama"))] == list(ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_archs_of_an_engine(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(architecture_lines(engine))
    assert [line.architecture for line in lines] == list(MOE_ARCHITECTURES)
    print_engine_table(engine, as_json=False)
    text = capsys.readouterr().out
    assert all(line.title in text and line.how in text for line in lines)
    print_engine_table(engine, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(raymoe.archs(engine=engine)))


def test_archs_of_an_unknown_engine() -> None:
    with pytest.raises(ProblemReport, match="there is no engine 'vlm' in the table"):
        raymoe.archs(engine="vlm")


def test_no_remark_in_the_table_of_an_engine_speaks_of_an_option_that_is_not_there() -> None:
    remarks = [line.how for engine in ENGINES for line in architecture_lines(engine)]
    assert not [how for how in remarks if "this option" in how]
    assert "-rotary_embedding" in {line.architecture: line.how for line in architecture_lines("vllm")}["lfm2_moe"]
