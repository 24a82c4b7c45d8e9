"""What llama.cpp computes with a file is what transformers computes with the checkpoint: every token's probability."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.errors import ProblemReport
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.export.gguf.llama_cpp_archs import DENSE, NOT_CONVERTED
from tests.architectures.pairs import MAMBA, MIXED_LAYERS, load_merged
from tests.architectures.test_wrapped_models import MINISTRAL_3
from tests.export.gguf.conftest import TOKENIZER_FILES
from tests.export.gguf.llama import LlamaCpp
from tests.pico import VOCAB, load_dense, logits_of, merge_config, merge_without_ray, token_ids
from tests.wrapped import load_wrapped, save_wrapped

pytestmark = pytest.mark.engines

# Both compute in float32, in other orders; log-probabilities of these models lie some 6 apart.
CLOSE = 5e-5
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
        "long_factor": [2.0 + 0.5 * pair for pair in range(8)],
    },
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
    "rope_theta": 500.0,
}
ALPHA = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.5,
}
SOME_WINDOWS = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 12}
LATENT = {"rms_norm_eps": 1e-6}
OWN_VALUES = {"attention_k_eq_v": False, "tie_word_embeddings": True, "final_logit_softcapping": None}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}
LINEAR_HEADS = {"linear_value_head_dim": 64}
BIASES = {"attention_bias": True, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Case:
    """A merge of `family` models in `host` that llama.cpp runs as `architecture`."""

    family: str
    host: str
    architecture: str
    shared: int = 0
    top: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    tokens: int = 40

    def __str__(self) -> str:
        named = [str(value.get("rope_type")) if isinstance(value, dict) else key for key, value in self.model.items()]
        return "-".join([self.family, self.host, *(["shared"] * self.shared), str(self.top), *named])


MERGES = (
    Case("llama", "mixtral", "llama", top=1),
    Case("llama", "mixtral", "llama"),
    Case("llama", "mixtral", "llama", model={"rope_scaling": LLAMA3}),
    Case("llama", "mixtral", "llama", model={"rope_scaling": LINEAR}),
    Case("llama", "mixtral", "llama", model={"rope_scaling": YARN}),
    Case("llama", "mixtral", "llama", model={"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    Case("llama", "mixtral", "llama", model={"rope_scaling": DYNAMIC}),
    Case("llama", "mixtral", "llama", model={"head_dim": 24, "tie_word_embeddings": True}),
    Case("mistral", "mixtral", "llama", model={"sliding_window": 12}, tokens=11),
    Case("llama", "deepseek", "llama", model=BIASES),
    Case("llama", "deepseek", "bailingmoe", shared=1, top=3, model={"tie_word_embeddings": True}),
    Case("llama", "deepseek", "bailingmoe", shared=2),
    Case("llama", "qwen2_moe", "llama"),
    Case("qwen2", "qwen2_moe", "llama", model={"tie_word_embeddings": True}),
    Case("qwen2", "qwen2_moe", "qwen2moe", shared=1, top=3),
    Case("llama", "qwen2_moe", "qwen2moe", shared=1, top=3, model={"tie_word_embeddings": True}),
    Case("llama", "qwen2_moe", "qwen2moe", shared=2, top=3),
    Case("qwen3", "qwen3_moe", "qwen3moe", model={"tie_word_embeddings": True}),
    Case("qwen3", "qwen3_moe", "qwen3moe", model={"head_dim": 24, "rope_scaling": YARN}),
    Case("granite", "granitemoe", "granitemoe", model={**MULTIPLIERS, "attention_bias": True}),
    Case("granite", "granitemoeshared", "granitemoe", shared=1, model={**MULTIPLIERS, "rope_scaling": LLAMA3}),
    Case("granite", "granitemoehybrid", "granitemoe", shared=1, model={**MULTIPLIERS, "rope_scaling": YARN}),
    Case("granite", "granitemoehybrid", "granitemoe", top=1, model={"tie_word_embeddings": True}),
    Case("llama", "granitemoe", "granitemoe", model={"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    Case("qwen2", "granitemoe", "granitemoe", top=1),
    Case("ernie4_5", "ernie4_5_moe", "llama"),
    Case("llama", "glm4_moe", "glm4moe", shared=2),
    Case("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan-moe", model={"rope_scaling": ALPHA}),
    Case("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan-moe", shared=1, top=1),
    Case("qwen3", "glm4_moe", "glm4moe"),
    Case("qwen3", "glm4_moe", "glm4moe", shared=1, model={"tie_word_embeddings": True}),
    Case("phi3", "glm4_moe", "glm4moe", model={"partial_rotary_factor": 0.5}),
    Case("glm", "glm4_moe", "glm4moe", shared=2, top=1, model={"attention_bias": False}),
    Case("llama", "glm4_moe", "glm4moe", shared=1, model={"head_dim": 24}),
    # As wide as the shared expert of zeros that other hosts have, which is left out.
    Case("llama", "glm4_moe", "glm4moe", model={"intermediate_size": 256}),
    Case("seed_oss", "glm4_moe", "glm4moe"),
    Case("cwm", "qwen2_moe", "llama", model={"sliding_window": 12}, tokens=11),
    Case("ministral", "qwen2_moe", "llama", model={"sliding_window": 12, "layer_types": MIXED_LAYERS}, tokens=11),
    Case("cohere", "cohere2_moe", "cohere2moe"),
    Case("lfm2", "lfm2_moe", "lfm2moe"),
    Case("cohere2", "cohere2_moe", "cohere2moe", model={"sliding_window": 12, "sliding_window_pattern": 3}),
    Case("youtu", "deepseek_v3", "deepseek2", model=LATENT),
    Case("youtu", "deepseek_v3", "deepseek2", shared=2, top=1, model={**LATENT, "q_lora_rank": None}),
    Case("youtu", "deepseek_v3", "deepseek2", shared=1, model={**LATENT, "rope_interleave": False}),
    Case("gemma4_text", "gemma4_moe", "gemma4"),
    Case("gemma4_text", "gemma4_moe", "gemma4", top=1, model=OWN_VALUES),
    Case("gemma4_text", "gemma4_moe", "gemma4", model=SHARED_KEYS),
    Case("smollm3", "granitemoe_swa", "granite_swa", shared=2, model={**SOME_WINDOWS, "attention_bias": True}),
    Case("smollm3", "granitemoe_swa", "granite_swa", shared=1, top=1, model={"rope_scaling": LLAMA3}),
    Case("granite_swa", "granitemoe_swa", "granite_swa"),
    Case("granite_swa", "granitemoe_swa", "granite_swa", shared=1, model={"head_dim": 32, "layer_rope_theta": None}),
    Case("cwm", "granitemoe_swa", "granite_swa", model={"sliding_window": 12}),
    Case(
        "ministral", "granitemoe_swa", "granite_swa", top=1, model={"sliding_window": 12, "layer_types": MIXED_LAYERS}
    ),
    Case("granitemoehybrid", "granitemoehybrid", "granitehybrid", model=MAMBA),
    Case("granitemoehybrid", "granitemoehybrid", "granitehybrid", shared=1, model={**MAMBA, "attention_bias": True}),
    Case("granitemoehybrid", "granitemoehybrid", "granitehybrid", model={**MAMBA, "position_embedding_type": None}),
    Case("qwen3_5_text", "qwen3_5_moe", "qwen35moe", model=LINEAR_HEADS),
    Case("qwen3_5_text", "qwen3_5_moe", "qwen35moe", shared=2, top=1, model={**LINEAR_HEADS, "rope_scaling": YARN}),
)
# The architecture and each feature of these are in cases above, and in merges and models of their family elsewhere.
MORE_MERGES = (
    Case("llama", "deepseek", "bailingmoe", shared=1, model={"rope_scaling": LINEAR}),
    Case("ernie4_5", "ernie4_5_moe", "bailingmoe", shared=1),
    Case("granite", "granitemoeshared", "granitemoe", shared=3, model=MULTIPLIERS),
    Case("helium", "ernie4_5_moe", "llama"),
    Case("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan-moe"),
    Case("qwen2", "glm4_moe", "glm4moe"),
    Case("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan-moe", model={"intermediate_size": 256}),
    Case("youtu", "deepseek_v3", "deepseek2", model={**LATENT, "intermediate_size": 256}),
    Case("iquestcoder", "mixtral", "llama"),
    Case("internlm3", "mixtral", "llama"),
    Case("glm", "glm4_moe", "glm4moe"),
    Case("smollm3", "granitemoe_swa", "granite_swa"),
    Case("qwen3_5_text", "qwen3_5_moe", "qwen35moe", shared=1, model={**LINEAR_HEADS, "tie_word_embeddings": True}),
)


def difference(model: Any, file: Path, tokens: int = 40, context: int = 256) -> float:
    """The largest difference between log-probabilities of a next token, over the vocabulary."""
    ids = token_ids(tokens)
    expected = torch.log_softmax(logits_of(model, ids)[0, -1].double(), -1).numpy()
    found = LlamaCpp(file, context).log_probs(ids[0].tolist(), VOCAB)
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize(
    "case", [*MERGES, *(pytest.param(case, marks=pytest.mark.soak) for case in MORE_MERGES)], ids=str
)
def test_merges(case: Case, merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged(case.family, case.host, shared=case.shared, top=case.top, model=case.model)
    written = write_gguf(folder, tmp_path / "model.gguf")
    assert (written.architecture, written.type) == (case.architecture, "f32")
    model = load_merged(folder)
    if case.architecture == "gemma4":
        for layer in model.model.layers:
            layer.experts.act_fn = GeluOfLlamaCpp()
            layer.act_fn = layer.experts.act_fn  # of its input, in E2B and E4B
    assert difference(model, written.path, case.tokens) < CLOSE


def test_longrope_has_factors_for_short_and_for_long_contexts(merged: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp chooses by its context (a multiple of 256 tokens), transformers by the text."""
    folder = merged("phi3", "mixtral", model=LONGROPE)
    written = write_gguf(folder, tmp_path / "model.gguf")
    (warning,) = written.warnings
    option = "--override-kv llama.context_length=int:1024"
    assert written.architecture == "llama" and "names 256 tokens" in warning and warning.endswith(option)
    model = load_merged(folder)
    assert difference(model, written.path, tokens=40, context=256) < CLOSE
    length = GGUFReader(written.path, "r+").fields["llama.context_length"]  # what the option does
    length.parts[length.data[0]][0] = 1024
    assert difference(model, written.path, tokens=300, context=1024) < CLOSE
    assert difference(model, written.path, tokens=40, context=1024) > 100 * CLOSE


@pytest.mark.parametrize(
    ("family", "host", "shared", "model"),
    [
        ("glm", "glm4_moe", 0, {}),
        ("qwen3", "glm4_moe", 1, {}),
        ("lfm2", "lfm2_moe", 0, {}),
        ("cohere2", "cohere2_moe", 0, {}),
        ("youtu", "deepseek_v3", 0, LATENT),
    ],
)
def test_merges_whose_first_layer_has_no_experts(
    family: str, host: str, shared: int, model: dict[str, Any], merged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = merged(family, host, shared=shared, model=model, moe_layers="1-2")
    written = write_gguf(folder, tmp_path / "model.gguf")
    assert difference(load_merged(folder), written.path) < CLOSE


@pytest.mark.parametrize(
    ("family", "host", "layers", "reason"),
    [
        ("qwen3", "qwen3_moe", "1-2", r"qwen3moe.*: layers without experts \(0\): all of its layers have experts"),
        ("llama", "deepseek", [2], r"llama.*: layers without experts \(0-1\): all of its layers"),
        ("cohere2", "cohere2_moe", "even", r"layers without experts \(1\): only its first layers may have none"),
    ],
)
def test_merges_whose_layers_without_experts_are_elsewhere_are_refused(
    family: str, host: str, layers: Any, reason: str, merged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = merged(family, host, moe_layers=layers)
    with pytest.raises(ProblemReport, match=reason):
        write_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("wrapper", "family", "text", "architecture"),
    [
        ("qwen3_5", "qwen3_5_text", LINEAR_HEADS, "qwen35moe"),
        ("mistral3", "ministral3", MINISTRAL_3, "llama"),
    ],
)
def test_merges_of_wrapped_models(
    wrapper: str, family: str, text: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    """The file has the text part, also of a mixture that reads images."""
    models = [save_wrapped(tmp_path / str(seed), wrapper, family, seed=seed, **text) for seed in range(3)]
    merge_without_ray(merge_config(models[0], models[1:], mode="random"), tmp_path / "merged")
    for name in TOKENIZER_FILES:
        shutil.copy(models[0] / name, tmp_path / "merged" / name)
    written = write_gguf(tmp_path / "merged", tmp_path / "model.gguf")
    assert written.architecture == architecture
    assert difference(load_wrapped(tmp_path / "merged"), written.path) < CLOSE


class GeluOfLlamaCpp(torch.nn.Module):
    """From a table of all float16 numbers, whatever the file's type is: 4e-4 from float32 in these tests."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))


@pytest.mark.parametrize(("family", "host"), [("qwen3", "qwen3_moe"), ("glm", "glm4_moe")])
def test_a_merge_that_transformers_saved_again(
    family: str, host: str, merged: Callable[..., Path], tmp_path: Path
) -> None:
    """Its config.json has `num_local_experts` where raymoe writes `num_experts`, and how much of each head is turned
    among the parameters of RoPE."""
    first, again = merged(family, host), tmp_path / "again"
    load_merged(first).save_pretrained(again)
    for name in TOKENIZER_FILES:
        shutil.copy(first / name, again / name)
    written = [write_gguf(folder, tmp_path / f"{folder.name}.gguf", GgufOptions(name="m")) for folder in (first, again)]
    assert written[0].path.read_bytes() == written[1].path.read_bytes()


DENSE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3},
    "mistral": {"head_dim": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "granite": {**MULTIPLIERS, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {},
}


@pytest.mark.parametrize(("family", "options"), DENSE_MODELS.items(), ids=DENSE_MODELS)
def test_dense_models(family: str, options: dict[str, Any], zoo: Callable[..., Path], tmp_path: Path) -> None:
    folder = zoo(family, **options)
    written = write_gguf(folder, tmp_path / "model.gguf")
    assert difference(load_dense(folder), written.path) < CLOSE


@pytest.mark.parametrize(("kind", "close"), [("f16", 0.01), ("bf16", 0.08), ("q8_0", 0.15), ("q4_0", 2.0)])
def test_types(kind: str, close: float, merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = merged("llama", "mixtral")
    written = write_gguf(folder, tmp_path / "model.gguf", GgufOptions(type=kind))
    off = difference(load_merged(folder), written.path)
    assert close / 100 < off < close


@pytest.mark.parametrize(
    ("family", "host", "model"),
    [
        ("youtu", "deepseek_v3", LATENT),
        ("smollm3", "granitemoe_swa", {}),
        ("granitemoehybrid", "granitemoehybrid", MAMBA),
        ("qwen3_5_text", "qwen3_5_moe", LINEAR_HEADS),
    ],
)
@pytest.mark.parametrize(("kind", "close"), [("bf16", 0.3), ("q8_0", 0.5)])
def test_types_of_other_tensors_than_attentions(
    kind: str, close: float, family: str, host: str, model: dict[str, Any], merged: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp takes each of them in the type that it has there, or it would not load the file."""
    folder = merged(family, host, model=model)
    written = write_gguf(folder, tmp_path / "model.gguf", GgufOptions(type=kind))
    off = difference(load_merged(folder), written.path)
    assert CLOSE < off < close


def test_kernels_stay_f32(merged: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp convolves in f32 only."""
    folder = merged("lfm2", "lfm2_moe")
    written = write_gguf(folder, tmp_path / "model.gguf", GgufOptions(type="f16"))
    assert CLOSE < difference(load_merged(folder), written.path) < 0.01


def test_a_window_ends_the_context(merged: Callable[..., Path], tmp_path: Path) -> None:
    """Beyond its window the model sees less than llama.cpp would: its server takes no longer texts."""
    folder = merged("mistral", "mixtral", model={"sliding_window": 12})
    written = write_gguf(folder, tmp_path / "model.gguf")
    assert any("to the last 12" in warning for warning in written.warnings)
    assert LlamaCpp(written.path).props()["default_generation_settings"]["n_ctx"] == 12


@pytest.mark.parametrize(
    ("family", "host", "wanted"),
    [
        ("qwen2", "qwen2_moe", r"a shared expert with a gate, and .* sum to one.*\n.*experts_per_token: 3"),
        ("cohere2", "cohere2_moe", r"cohere2moe takes the mean of both\n.*without shared_experts"),
    ],
)
def test_refused_since_no_architecture_computes_it(
    family: str, host: str, wanted: str, merged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = merged(family, host, shared=1)
    with pytest.raises(ProblemReport, match=wanted):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "host", "model", "wanted"),
    [
        (
            "youtu",
            "deepseek_v3",
            {},
            "rms_norm_eps 1e-05: norms of latent numbers have it there, and 1e-06 in the model",
        ),
        ("youtu", "deepseek_v3", {**LATENT, "rope_scaling": YARN}, "RoPE scaling 'yarn': it knows dynamic\n"),
        ("youtu", "deepseek_v3", {**LATENT, "num_hidden_layers": 26}, "26 layers: .* for one without latent queries"),
        ("granite_swa", "granitemoe_swa", {"layer_rope_theta": [1e4, 0, 2e4]}, "rotary embeddings of 2 kinds"),
        ("smollm3", "granitemoe_swa", {"no_rope_layers": [0, 0, 0]}, "no layer with a rotary embedding"),
        (
            "cohere2",
            "cohere2_moe",
            {"layer_types": ["full_attention"] * 3},
            "no layer with a sliding window: it has RoPE",
        ),
        ("lfm2", "lfm2_moe", {"layer_types": ["full_attention"] * 3}, "all layers of one kind, full_attention"),
        (
            "granitemoehybrid",
            "granitemoehybrid",
            {"position_embedding_type": None},
            "all layers of one kind, full_attention: it has two",
        ),
        ("granitemoehybrid", "granitemoehybrid", {**MAMBA, "mamba_n_groups": 2}, "mamba_n_groups 2: it takes the norm"),
        ("granitemoehybrid", "granitemoehybrid", {**MAMBA, "mamba_expand": 4}, "256 channels of Mamba: .*, 128"),
        ("granitemoehybrid", "granitemoehybrid", {**MAMBA, "mamba_conv_bias": False}, "no bias on Mamba's convolution"),
        ("granitemoehybrid", "granitemoehybrid", {**MAMBA, "mamba_proj_bias": True}, "a bias on Mamba's projections"),
        (
            "granitemoehybrid",
            "granitemoehybrid",
            {**MAMBA, "time_step_limit": [0.0, 0.5]},
            "time_step_limit .*: it has none",
        ),
        ("qwen3_5_text", "qwen3_5_moe", {}, "linear attention with keys of 64 and values of 48"),
        (
            "gemma4_text",
            "gemma4_moe",
            {**SHARED_KEYS, "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]},
            "num_kv_shared_layers 2: it takes their keys and values from the two layers before them",
        ),
    ],
)
def test_refused_since_its_architecture_takes_it_for_granted(
    family: str, host: str, model: dict[str, Any], wanted: str, merged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = merged(family, host, model=model)
    with pytest.raises(ProblemReport, match=wanted):
        write_gguf(folder, tmp_path / "model.gguf")


def test_experts_whose_weights_do_not_sum_to_one(merged: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(merged("lfm2", "lfm2_moe"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"norm_topk_prob": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProblemReport, match="2 experts do not sum to one, as a merge's do"):
        write_gguf(folder, tmp_path / "model.gguf")


def test_a_host_for_which_there_is_no_architecture(merged: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ProblemReport, match=r"model_type is 'flex_olmo', for which llama\.cpp has no architecture"):
        write_gguf(merged("olmo2", "flex_olmo"), tmp_path / "model.gguf")


def test_nothing_is_left_out() -> None:
    """Every architecture and every family, in a merge or alone, that raymoe converts."""
    converted = [host for host in MOE_ARCHITECTURES.values() if host.model_type not in NOT_CONVERTED]
    assert {case.host for case in MERGES} == {host.name for host in converted}
    assert {case.family for case in (*MERGES, *MORE_MERGES)} == {
        family for host in converted for family in host.accepts
    }
    assert DENSE_MODELS.keys() == DENSE.keys()
