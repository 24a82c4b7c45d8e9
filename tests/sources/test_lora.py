"""PEFT LoRA adapters: the delta that raymoe would apply against what peft itself merges, and every refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError
from raymoe.sources.facts import AdapterFacts, CheckpointIndex, ModelFacts, SourceFile, TensorEntry
from raymoe.sources.lora import _modules_by_ending, _same_module
from raymoe.sources.lora_patterns import Patterns, _compiled, pattern_problem, slow_patterns
from raymoe.sources.resolve import resolve_model
from tests.sources.checkpoints import write_json


def read(entry: TensorEntry) -> np.ndarray[Any, Any]:
    assert entry.dtype == "F32"
    data = Path(entry.file.location).read_bytes()[entry.start : entry.end]
    return np.frombuffer(data, "<f4").reshape(entry.shape)


def resolve(model: Path, adapter: Path) -> ModelFacts:
    return resolve_model(parse_model_ref(f"{model}+{adapter}"))


# Against peft: a pico Llama, an adapter with random factors, merged by peft and by the facts.


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pico")
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "attention and lm_head": {"target_modules": ["q_proj", "o_proj", "lm_head"]},
    "one layer": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "rank pattern": {"target_modules": ALL, "rank_pattern": {"down_proj": 2, "layers.1.mlp.up_proj": 6}},
    "alpha pattern": {"target_modules": ALL, "alpha_pattern": {"up_proj": 3, r"layers\.0\..*proj": 32}},
    "anchored": {"target_modules": ALL, "rank_pattern": {r"^model.layers.0.mlp.up_proj": 3}},
    "first match counts": {"target_modules": ALL, "alpha_pattern": {"up_proj": 3, "mlp.up_proj": 5}},
    "both and rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"self_attn.q_proj": 1, ".*down_proj": 5},
        "alpha_pattern": {"mlp.(up|gate)_proj": 2},
    },
    "fractional alpha": {"target_modules": ALL, "lora_alpha": 5},
    "gaussian": {"target_modules": ALL, "init_lora_weights": "gaussian"},
    "dora": {"target_modules": ALL, "use_dora": True},
    "dora and patterns": {
        "target_modules": ALL,
        "use_dora": True,
        "rank_pattern": {"down_proj": 2},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_same_delta_as_peft(case: str, pico: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 10, **PEFT_CASES[case]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    # Read back: what counts is the file, in which peft sorts the patterns.
    fresh = transformers.AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload().state_dict()

    facts = resolve(pico, tmp_path)
    assert isinstance(facts.adapter, AdapterFacts)
    changed = {
        name for name, entry in facts.index.tensors.items() if not np.array_equal(read(entry), merged[name].numpy())
    }
    assert set(facts.adapter.pairs) == changed
    assert any(pair.magnitude is not None for pair in facts.adapter.pairs.values()) is case.startswith("dora")
    for name, pair in facts.adapter.pairs.items():
        ours = read(facts.index.tensors[name]) + np.float32(pair.scaling) * (read(pair.b) @ read(pair.a))
        if pair.magnitude is not None:
            ours *= (read(pair.magnitude) / np.linalg.norm(ours, axis=1))[:, None]
        np.testing.assert_allclose(ours, merged[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


# Hand-made adapters: what is refused.

UP = "base_model.model.model.layers.0.mlp.up_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "bias": "none"}


def factors(rank: int = 2, module: str = UP, inputs: int = 4, outputs: int = 6) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{module}.lora_A.weight": np.ones((rank, inputs), "float32"),
        f"{module}.lora_B.weight": np.ones((outputs, rank), "float32"),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    write_json(folder / "config.json", {"model_type": "llama"})
    weights = {"model.layers.0.mlp.up_proj.weight": np.zeros((6, 4), "float32")}
    save_file(weights | {"model.norm.weight": np.zeros(4, "float32")}, folder / "model.safetensors")
    return folder


def adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


MERGE, SAVE_AGAIN, UNCHANGED = "merge_and_unload", "save the adapter again", "would return the model unchanged"


def refusal(model: Path, config: dict[str, Any], tensors: dict[str, Any], remedy: str = "") -> str:
    folder = adapter(model.parent / "lora", config, tensors)
    with pytest.raises(CheckpointError) as caught:
        resolve(model, folder)
    for problem in caught.value.problems:
        assert problem.where == str(folder)
        assert remedy in problem.remedy
        assert (MERGE in problem.remedy) is (remedy == MERGE)
    return str(caught.value)


def test_the_hand_made_adapter_itself_is_fine(model: Path) -> None:
    folder = adapter(model.parent / "lora", CONFIG | {"base_model_name_or_path": "some/other"}, factors())
    facts = resolve(model, folder)
    assert facts.label == f"{model}+{folder}"
    assert facts.adapter is not None
    assert facts.adapter.label == str(folder)
    (pair,) = facts.adapter.pairs.values()
    assert (pair.scaling, pair.a.shape, pair.b.shape) == (2.0, (2, 4), (6, 2))


def test_bin_adapter(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "lora"
    write_json(folder / "adapter_config.json", CONFIG)
    torch.save({n: torch.from_numpy(t) for n, t in factors().items()}, folder / "adapter_model.bin")
    facts = resolve(model, folder)
    assert facts.adapter is not None
    np.testing.assert_array_equal(read(facts.adapter.pairs["model.layers.0.mlp.up_proj.weight"].b), np.ones((6, 2)))


NEVER = "peft can't merge it into a model either"


@pytest.mark.parametrize(
    ("setting", "message", "remedy"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3' .* only LORA is supported", MERGE),
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of type 'PREFIX_TUNING'", "it changes no weights"),
        ({"peft_type": None}, "an adapter of type None", MERGE),
        ({"use_qalora": True}, "the adapter uses QALoRA, which pools the inputs (use_qalora)", MERGE),
        ({"lora_bias": True}, "biases on the factors (lora_bias)", NEVER),
        ({"bias": "lora_only"}, "the adapter trains biases (bias: 'lora_only')", MERGE),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* names 'lm_head', and .* holds no tensors", SAVE_AGAIN),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices, and .* holds no trained rows", SAVE_AGAIN),
        ({"layer_replication": [[0, 1]]}, "replicated layers (layer_replication)", NEVER),
        ({"target_parameters": ["x"]}, "LoRA on bare parameters (target_parameters)", MERGE),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changed its model's own weights", MERGE),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'", MERGE),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'", MERGE),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "LoftQ, which changed the model's", MERGE),
        ({"alora_invocation_tokens": [1]}, "activated LoRA", NEVER),
        ({"use_warp_drive": True}, "unknown setting 'use_warp_drive' = True in adapter_config.json", MERGE),
        ({"r": 0}, "'r' in adapter_config.json is 0, not a number over 0", SAVE_AGAIN),
        ({"r": "8"}, "'r' in adapter_config.json is '8'", SAVE_AGAIN),
        ({"lora_alpha": None}, "'lora_alpha' in adapter_config.json is None", SAVE_AGAIN),
        ({"rank_pattern": {"up_proj": -1}}, "'rank_pattern' gives 'up_proj' the value -1", SAVE_AGAIN),
        ({"rank_pattern": [1]}, "'rank_pattern' in adapter_config.json is not an object", SAVE_AGAIN),
        ({"alpha_pattern": {r"(.*\.)?([a-z]+)+!": 1}}, "alpha_pattern' has .* may take too long to match", SAVE_AGAIN),
        ({"rank_pattern": {"(a|a)" * 40 + "!": 1}}, "'rank_pattern' has .* may take too long to match", SAVE_AGAIN),
        ({"rank_pattern": {".*.*.*.*.*!": 1}}, "'rank_pattern' has .* may take too long to match", SAVE_AGAIN),
        ({"rank_pattern": {"(?x:(a+)#\n+)!": 1}}, "'rank_pattern' has .* may take too long to match", SAVE_AGAIN),
        ({"rank_pattern": {"}?" * 40 + "!": 1}}, "'rank_pattern' has .* may take too long to match", SAVE_AGAIN),
        ({"rank_pattern": {"(?i)up_proj": 1}}, "'rank_pattern' has '(?i)up_proj', which has flags", SAVE_AGAIN),
        ({"rank_pattern": {"a{99999999999}": 4}}, "'rank_pattern' has 'a{99999999999}', which is no", SAVE_AGAIN),
        ({"rank_pattern": {"(" * 5000 + "a" + ")" * 5000: 4}}, "may take too long to match", SAVE_AGAIN),
        ({"alpha_pattern": {f"up{n}": 4 for n in range(10_001)}}, "'alpha_pattern' has 10001 patterns", SAVE_AGAIN),
        ({"peft_type": ["LORA"]}, "an adapter of type ['LORA'] (adapter_config.json: peft_type)", MERGE),
        ({"peft_type": {"a": 1}}, "an adapter of type {'a': 1} (", MERGE),
        ({"modules_to_save": ["score"]}, "modules_to_save .* names 'score', and .* holds no tensors", SAVE_AGAIN),
        (
            {"modules_to_save": ["classifier", "score"]},
            "modules_to_save .* names 'classifier', 'score', and .* holds no tensors",
            SAVE_AGAIN,
        ),
        ({"alpha_pattern": {"(": 1}}, "'alpha_pattern' has '(', which is no regular expression", SAVE_AGAIN),
    ],
)
def test_refused_settings(model: Path, setting: dict[str, Any], message: str, remedy: str) -> None:
    text = refusal(model, CONFIG | setting, factors(), remedy)
    assert all(part in text for part in message.split(" .* "))


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ({f"k{number:05}": 1 for number in range(40_000)}, "unknown setting 'k00000' = 1"),
        (
            {"rank_pattern": {f"up_proj{number}": 0 for number in range(1000)}},
            "'rank_pattern' gives 'up_proj0' the value",
        ),
        ({"bias": "a" * 10_000}, f"the adapter trains biases (bias: '{'a' * 79})"),
        ({"init_lora_weights": "a" * 10_000}, f"init_lora_weights '{'a' * 79}, which"),
        ({"a" * 10_000: 1}, f"unknown setting '{'a' * 79} = 1"),
    ],
)
def test_thousands_of_refused_settings(model: Path, setting: dict[str, Any], first: str) -> None:
    """40,000 unknown keys, half a megabyte, took 42 s and gave a message of 7 MB."""
    folder = adapter(model.parent / "lora", CONFIG | setting, factors())
    with pytest.raises(CheckpointError) as caught:
        resolve(model, folder)
    problems = caught.value.problems
    assert first in problems[0].what and all(len(problem.what) < 250 for problem in problems)
    assert len(problems) <= 6
    if len(problems) > 1:
        assert re.fullmatch(r"and (39)?995 more problems of adapter_config\.json", problems[-1].what)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\..*?_proj",
        r"(model\.)?layers\.(0|1|2|3|10|11)\.mlp\.(up|gate)_proj",
        r"^model.layers.\d{1,2}.mlp.*",
    ],
)
def test_ordinary_patterns_are_matched_as_by_peft(model: Path, pattern: str) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    assert get_pattern_key([pattern], "model.layers.0.mlp.up_proj") == pattern
    facts = resolve(model, adapter(model.parent / "lora", CONFIG | {"alpha_pattern": {pattern: 6}}, factors())).adapter
    assert facts is not None and [pair.scaling for pair in facts.pairs.values()] == [3.0]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("[\u0100-\uffff\u0101-\uffff]", "which has characters that names of modules don't have"),
        (r"[\u0100-\uffff]", "which has characters that names of modules don't have"),
        (r"[\x00-\xff]", "which has characters that names of modules don't have"),
        (r"\N{LATIN SMALL LETTER A}", "which has characters that names of modules don't have"),
        ("(?i:up_proj)", "which has flags, (?i) or the like"),
        ("(?-i:up_proj)", "which has flags, (?i) or the like"),
        ("(?x:up_proj)", "which has flags, (?i) or the like"),
    ],
)
def test_patterns_that_take_long_to_compile(pattern: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve classes of 329 ranges up to the last of 65,536 characters took 22 s. They are not compiled at all."""
    monkeypatch.delattr("raymoe.sources.lora_patterns._compiled")
    assert str(pattern_problem(pattern)).endswith(said)


@pytest.mark.parametrize("pattern", [r"a\\uppp", r"\(?i_proj", "(?:a|b)(?=c)(?!d)(?<=c)(?P<e>f)"])
def test_patterns_that_look_like_them(pattern: str) -> None:
    assert pattern_problem(pattern) is None


def test_patterns_are_compiled_once() -> None:
    patterns = {f"compiled_once_{number}": number for number in range(1000)}
    before = _compiled.cache_info().misses
    assert not any(map(pattern_problem, patterns))
    Patterns(patterns, 0)
    assert _compiled.cache_info().misses == before + 1000


def test_patterns_of_many_characters(model: Path) -> None:
    config = CONFIG | {"rank_pattern": {f"{number:03}" + "a" * 900: 2 for number in range(450)}}
    said = refusal(model, config, factors(), SAVE_AGAIN)
    assert "'rank_pattern' has patterns of 406,350 characters in all (at most 400,000)" in said


def test_a_pattern_for_each_module() -> None:
    """EVA gives each module a rank of its own. Patterns of strangers may be as many, and each slow."""
    modules = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in range(60) for kind in ("gate", "up", "down")]
    ranks = {module: number for number, module in enumerate(modules)}
    assert slow_patterns((ranks, ranks), modules) is None
    found = Patterns(ranks, -1)
    assert [found.value(module) for module in modules] == [*range(180)]
    assert found.value("model.layers.60.mlp.up_proj") == -1
    slow = {f".*.*.*.*{number}": number for number in range(100)}
    assert slow_patterns((slow, {}), modules) == "100 patterns for 180 modules may take too long to match"


def test_patterns_that_take_too_long_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.sources.lora_patterns._MAX_TOTAL_WAYS", 10**5)
    config = CONFIG | {"alpha_pattern": {f".*.*{number}": 4 for number in range(100)}}
    said = refusal(model, config, factors(), MERGE)
    assert "rank_pattern and alpha_pattern in adapter_config.json: 100 patterns for 1 modules may take" in said


def test_names_of_many_components() -> None:
    """A megabyte of them had 300 MB of endings."""
    file = SourceFile(location="m", size=1)
    names = [f"{'a.' * 495}{number}.weight" for number in range(100)]
    entries = {name: TensorEntry(name=name, dtype="F32", shape=(1,), file=file, start=0, end=4) for name in names}
    endings = _modules_by_ending(CheckpointIndex(files=(file,), tensors=entries))
    assert sum(map(len, endings)) < 10_000
    module = names[3].removesuffix(".weight")
    assert _same_module(f"wrapped.{module}", endings) == module


def test_a_classifier_has_one_of_the_names_that_peft_writes(model: Path) -> None:
    head = {"base_model.model.score.weight": np.ones((2, 4), "float32")}
    config = CONFIG | {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    facts = resolve(model, adapter(model.parent / "lora", config, factors() | head)).adapter
    assert facts is not None and facts.pairs and set(facts.left_out) == {"score"}


def test_settings_are_refused_together(model: Path) -> None:
    settings = {"use_qalora": True, "bias": "all", "init_lora_weights": "olora"}
    text = refusal(model, CONFIG | settings, factors(), MERGE)
    assert text.startswith("3 problems:")


def test_unset_settings_are_fine(model: Path) -> None:
    unset = {
        "use_dora": False,
        "modules_to_save": None,
        "layer_replication": [],
        "loftq_config": {},
        "new_thing": False,
    }
    assert resolve(model, adapter(model.parent / "lora", CONFIG | unset, factors())).adapter


RIGHT_NAMES = "'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'"


def renamed(old: str, new: str, tensors: dict[str, Any] | None = None) -> dict[str, Any]:
    return {name.replace(old, new): tensor for name, tensor in (tensors or factors()).items()}


@pytest.mark.parametrize(
    ("tensors", "message", "remedy"),
    [
        (
            {f"{UP}.lora_A.weight": factors()[f"{UP}.lora_A.weight"]},
            "'model.layers.0.mlp.up_proj' has lora_A but no lora_B",
            SAVE_AGAIN,
        ),
        ({f"{UP}.lora_B.weight": factors()[f"{UP}.lora_B.weight"]}, "has lora_B but no lora_A", SAVE_AGAIN),
        (
            factors() | {f"{UP}.lora_magnitude_vector.weight": np.ones(6)},
            "has a lora_magnitude_vector, and .* no use_dora",
            "set use_dora: true in adapter_config.json",
        ),
        (factors() | {"other": np.ones(2)}, "tensor 'other' is no LoRA factor", SAVE_AGAIN),
        (
            factors() | {f"{UP}.lora_A.default.weight": np.ones((2, 4))},
            "has two tensors for one factor: .*up_proj.lora_A.default.weight'",
            SAVE_AGAIN,
        ),
        # Names that peft finds nothing for.
        (renamed("base_model.model.", ""), f"would have to be {RIGHT_NAMES}", UNCHANGED),
        (renamed("model.layers", "model.language_model.layers"), f"would have to be {RIGHT_NAMES}", UNCHANGED),
        (renamed("model.layers", "_fsdp_wrapped_module.layers"), f"would have to be {RIGHT_NAMES}", UNCHANGED),
        (renamed(".weight", ".mine.weight"), f"would have to be {RIGHT_NAMES}", "rename these tensors"),
        (
            factors(module=UP.replace("0", "7")),
            "changes 'model.layers.7.mlp.up_proj.weight', which the model does not have",
            UNCHANGED,
        ),
        # Saved under DeepSpeed's ZeRO-3.
        (
            {name: np.zeros(0, "float32") for name in factors()},
            "2 tensor(s) have no elements, as DeepSpeed's ZeRO-3 leaves them: base_model",
            "zero_to_fp32.py",
        ),
        ({}, "the weight files hold no tensors", "zero_to_fp32.py"),
        # Sizes.
        (factors(rank=3), "lora_A [3, 4] and lora_B [6, 3] don't have the rank 2", "correct r or rank_pattern"),
        (
            factors(inputs=5),
            "the adapter's delta is [6, 5], the model's weight [6, 4]",
            "the model that it was made for",
        ),
        (
            factors(outputs=8),
            "the adapter's delta is [8, 4], the model's weight [6, 4]",
            "the model that it was made for",
        ),
        (factors(module="base_model.model.model.norm"), "the adapter's delta is [6, 4], the model's weight [4]", ""),
        ({n: t.astype("int8") for n, t in factors().items()}, "is I8 [2, 4]; a float matrix is expected", SAVE_AGAIN),
        ({n: t[None] for n, t in factors().items()}, "is F32 [1, 2, 4]; a float matrix is expected", SAVE_AGAIN),
    ],
)
def test_refused_tensors(model: Path, tensors: dict[str, Any], message: str, remedy: str) -> None:
    text = refusal(model, CONFIG, tensors, remedy)
    assert all(part in text for part in message.split(".*"))


def test_an_adapter_that_fits_nothing_is_reported_briefly(model: Path) -> None:
    many = {name: t for i in range(20) for name, t in factors(module=UP.replace("0", str(10 + i))).items()}
    text = refusal(model, CONFIG | {"base_model_name_or_path": "org/other"}, many, UNCHANGED)
    assert text.count("up_proj") == 4 and "and 16 more, which the model does not have" in text
    assert "put it on the model that it was made for, org/other" in text


@pytest.mark.parametrize(
    ("tensors", "module", "what"),
    [
        ({"lm_head.weight": np.ones((4, 4))}, "lm_head", "a whole tensor that the model does not have in this form"),
        ({"lm_head.base_layer.weight": np.ones((4, 4))}, "lm_head", "a copy of the model's own weight"),
        (renamed(UP, "lm_head"), "lm_head", "LoRA on the output head, which the model ties to its embedding"),
        ({"model.embed_tokens.lora_embedding_A": np.ones((2, 4))}, "model.embed_tokens", "LoRA on an embedding"),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 4))},
            "model.embed_tokens",
            "trained embedding rows",
        ),
        ({"model.norm.weight": np.ones(5)}, "model.norm", "a whole tensor of another shape, [5] for [4]"),
        ({"model.layers.0.mlp.up_proj.lora_B.bias": np.ones(6)}, "model.layers.0.mlp.up_proj", "a bias on a factor"),
        (
            {"model.layers.0.mlp.up_proj.weight": np.ones((6, 4))},
            "model.layers.0.mlp.up_proj",
            "a whole tensor beside LoRA factors",
        ),
    ],
)
def test_what_is_not_supported_is_listed_by_module(
    model: Path, tensors: dict[str, Any], module: str, what: str
) -> None:
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    facts = resolve(model, adapter(model.parent / "lora", CONFIG, factors() | prefixed)).adapter
    assert facts is not None and facts.left_out == {module: what}
    assert not facts.replaced and bool(facts.pairs) is ("up_proj" not in module)


@pytest.mark.parametrize("infix", ["", "modules_to_save.", "modules_to_save.default."])
def test_whole_tensors_take_the_place_of_the_models(infix: str, model: Path) -> None:
    whole = {f"base_model.model.model.norm.{infix}weight": np.full(4, 3, "float32")}
    folder = adapter(model.parent / "lora", CONFIG | {"modules_to_save": ["norm"]}, factors() | whole)
    facts = resolve(model, folder)
    np.testing.assert_array_equal(read(facts.index.tensors["model.norm.weight"]), np.full(4, 3))
    assert facts.adapter is not None and not facts.adapter.left_out


def test_wrong_roles(model: Path) -> None:
    lora = adapter(model.parent / "lora", CONFIG, factors())
    with pytest.raises(CheckpointError, match=r"this is a model, not a LoRA adapter \(no adapter_config.json\)"):
        resolve(model, model)
    with pytest.raises(CheckpointError, match=r"(?s)this is a LoRA adapter, not a whole model.*base\+adapter"):
        resolve_model(parse_model_ref(str(lora)))
    (lora / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: expected a JSON object, found list"):
        resolve(model, lora)
