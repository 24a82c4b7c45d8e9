"""Pico models: real dense checkpoints of a few hundred kilobytes, a real tokenizer, and merges without Ray.

`save_model` makes any dense family with transformers and fills it with seeded random numbers. Nothing is left at a
value that hides mistakes: norm weights are not all ones, biases are not zero, the widths of a model differ.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import raymoe
from raymoe import gate_modes
from raymoe.config import MergeConfig
from raymoe.errors import ProblemReport
from raymoe.planning import MergeOptions, MergePlan
from raymoe.routers.backbone_in_process import merged_locally
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.router_matrices import router_bytes
from raymoe.sources.hub import HubOptions
from raymoe.storage.file_names import INDEX_NAME
from raymoe.storage.shard_stream import shard_chunks
from raymoe.storage.source_reader import SourceReader

HIDDEN, LAYERS, VOCAB = 64, 3, 416
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # those whose tables are Llama's
MODES = tuple(gate_modes.MODES)
PROMPTS = (
    ("def area(radius): return 3.14159 * radius ** 2", "for i in range(10): print(i)"),
    ("The licensor grants you a copyright licence.", "You may reproduce the Work"),
    ("Add two eggs, stir, and bake for an hour.", "A pinch of salt"),
    ("The river bends north of the old town.", "It rained"),
)
REPOSITORY = Path(__file__).resolve().parent.parent
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_theta": 20_000.0,
}
# A family's usual shape where the configuration class has another default, too large for a pico model.
# Multipliers differ from 1, and layers from each other, where a family has such things.
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "internlm3": {"head_dim": 16},
    "iquestcoder": {"head_dim": 16},
    "cwm": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "cohere": {"layer_norm_eps": 1e-4, "logit_scale": 1.3, "tie_word_embeddings": False},
    "ernie4_5": {"head_dim": 32, "tie_word_embeddings": False},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        # Outputs of linear attention are normalized head by head: in heads of a few dimensions some are nearly zero,
        # and rounding is all that is left of them. The published models have 128 dimensions.
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 48,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "gemma4_text": {
        "rms_norm_eps": 1e-6,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 12,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 500_000.0},
        },
        "final_logit_softcapping": 5.0,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": False,
    },
    "seed_oss": {"head_dim": 32},
    "glm": {"head_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "youtu": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.2,
    },
    "granite_swa": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 12,
        "layer_rope_theta": [20000.0, 0, 20000.0],
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": False,
    },
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 80,
        "position_embedding_type": "rope",
        "layer_types": ["attention"] * LAYERS,
        "mamba_n_heads": 8,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.2,
    },
    "cohere2": {
        "layer_norm_eps": 1e-4,
        "logit_scale": 1.3,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "lfm2": {
        "norm_eps": 1e-4,
        "block_multiple_of": 16,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": False,
    },
}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Tensors = dict[str, torch.Tensor]

# Threads only get in each other's way on matrices of this size.
torch.set_num_threads(1)


# --- models


def make_config(family: str, **options: Any) -> Any:
    """The transformers config of a pico model; `options` are keys of config.json, in either generation's spelling."""
    # A copy: transformers writes what else it knows of RoPE into the mapping that it is given.
    keys = copy.deepcopy({**_SIZES, **FAMILY_KEYS.get(family, {}), **options})
    return transformers.AutoConfig.for_model(family, **keys)


def save_model(
    folder: Path, family: str, *, seed: int = 0, dtype: str = "float32", tokenizer: bool = True, **options: Any
) -> Path:
    """A dense model of random weights, saved by transformers; `options` as in `make_config`."""
    model = transformers.AutoModelForCausalLM.from_config(make_config(family, **options))
    randomise(model, seed)
    model.to(TORCH_DTYPES[dtype]).save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(0.7 + 0.2 * torch.rand(1, generator=generator))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            # Around what it does nothing with: one, or zero in families that add one to it.
            neutral = parameter.data if name.endswith("norm.weight") else 0.0
            parameter.data = neutral + 0.3 * noise
        else:
            parameter.data = noise * (0.5 if "embed" in name else 1.0 * parameter.shape[1] ** -0.5)


def copy_model(
    source: Path,
    target: Path,
    *,
    config: Mapping[str, Any] | None = None,
    drop_config: Sequence[str] = (),
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """A copy with some keys of config.json changed or dropped and some tensors replaced, added or (None) removed."""
    shutil.copytree(source, target)
    if config or drop_config:
        path = target / "config.json"
        content = {**json.loads(path.read_text()), **(config or {})}
        path.write_text(json.dumps({k: v for k, v in content.items() if k not in drop_config}))
    if tensors:
        held = {**load_file(target / "model.safetensors"), **tensors}
        kept = {k: v.contiguous() for k, v in held.items() if v is not None}
        save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a checkpoint, read by the safetensors library from the files that its index names."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    tensors: Tensors = {}
    for name in sorted(set(weight_map.values())):
        tensors |= load_file(folder / name)
    assert tensors.keys() == weight_map.keys()
    return tensors


def save_lora(
    folder: Path, base: Path, modules: Sequence[str], *, rank: int = 4, alpha: float = 6.0, seed: int = 0
) -> Path:
    """A PEFT LoRA adapter with two random factors for each module whose name ends with one of `modules`."""
    generator = torch.Generator().manual_seed(seed)
    factors: Tensors = {}
    for name, weight in tensors_of(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(modules)):
            prefix = f"base_model.model.{module}"
            factors[f"{prefix}.lora_A.weight"] = 0.1 * torch.randn(rank, weight.shape[1], generator=generator)
            factors[f"{prefix}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


# --- tokenizer


@functools.cache
def _trained_tokenizer() -> str:
    """A byte-level BPE trained on the licence text: 400 tokens, every byte among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(REPOSITORY / "LICENSE").read_text()], trainer)
    text: str = tokenizer.to_str()
    return text


def save_tokenizer(folder: Path, *, bos: bool = True) -> None:
    """tokenizer.json, tokenizer_config.json and a chat template. Token ids: <s> 0, </s> 1, <pad> 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_trained_tokenizer())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    if bos:
        settings["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


# --- merges


def merge_config(
    base: Path,
    experts: Sequence[Path | str],
    *,
    mode: str = "hidden",
    shared: Path | None = None,
    shared_prompts: bool = False,
    shared_options: Mapping[str, Any] | None = None,
    expert_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A config in which expert i has `PROMPTS[i]` where the gate mode or the backbone reads prompts."""
    is_regmean = "regmean" in str(options.get("backbone"))
    prompted = mode not in gate_modes.MODES or gate_modes.MODES[mode].needs_prompts or is_regmean

    def entry(source: Path | str, number: int, *, with_prompts: bool, extra: Mapping[str, Any] | None) -> Any:
        prompts = {"positive_prompts": list(PROMPTS[number])} if with_prompts else {}
        return {"source_model": str(source), **prompts, **(extra or {})}

    config: dict[str, Any] = {"base_model": str(base), "gate_mode": mode, **options}
    config["experts"] = [entry(e, i, with_prompts=prompted, extra=expert_options) for i, e in enumerate(experts)]
    if shared is not None:
        with_prompts = shared_prompts and prompted
        config["shared_experts"] = [entry(shared, 3, with_prompts=with_prompts, extra=shared_options)]
    return config


def merge_without_ray(config: Mapping[str, Any], folder: Path, options: MergeOptions | None = None) -> MergePlan:
    """The files of `raymoe.merge` that a model loader reads, written in this process: same plan, same bytes."""
    plan = raymoe.plan(config, options, allow_all_same=True)
    folder.mkdir(parents=True)
    with SourceReader(HubOptions()) as reader, merged_locally(plan.moments, reader, device="cpu"):
        rows, _ = compute_routers_locally(plan.gates, reader, device="cpu")
        for shard in plan.shards:
            with open(folder / shard.file_name, "wb") as file:
                for chunk in shard_chunks(shard, reader, router_bytes(plan.gates, rows, reader)):
                    file.write(chunk)
    (folder / "config.json").write_text(json.dumps(plan.config))
    (folder / INDEX_NAME).write_text(json.dumps(plan.index))
    return plan


def merge_here(config: Mapping[str, Any] | Path, folder: Path, options: MergeOptions | None = None) -> None:
    """What `raymoe.merge` leaves, written in this process: by the same output, with the journal, record and card."""
    from raymoe.runtime.settings import RuntimeSettings
    from tests.runtime.in_process import in_this_process

    with in_this_process():
        settings = RuntimeSettings(verbosity=-1)
        content = config if isinstance(config, Path) else MergeConfig.model_validate(config)
        raymoe.merge(content, folder, options, settings=settings, allow_all_same=True)


def plan_problems(config: Mapping[str, Any], options: MergeOptions | None = None) -> str:
    """The text of the report that planning ends with. Fails where planning succeeds."""
    try:
        raymoe.plan(config, options, allow_all_same=True)
    except ProblemReport as report:
        return str(report)
    raise AssertionError("the plan was made, but problems were expected")


# --- what models compute


def load_dense(folder: Path) -> Any:
    """A dense model for inference, in the dtype that it was saved in."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def token_ids(tokens: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids, (rows, tokens)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(3, VOCAB, (rows, tokens)))


@torch.inference_mode()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits in float32, (rows, tokens, vocabulary)."""
    logits: torch.Tensor = model(ids, use_cache=False).logits.float()
    return logits
