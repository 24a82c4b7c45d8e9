"""Checks gate passes on GPUs: right, small, on several at once, in waves, quantised.

    python scripts/gpu_check.py --work /tmp/gpu --tokenizer models/SmolLM2-135M-Instruct

Makes random experts on the spot, merges them in several ways, and compares router rows with a plain pass of
transformers that holds the whole model on the GPU. Prints a markdown table; needs a GPU, and bitsandbytes for the
quantised rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from random_model import SHAPES, write_model
from safetensors import safe_open

EXPERTS = 4
TOPICS = ("how to bake bread", "proofs in number theory", "sorting algorithms in Go", "the history of Spain")

RUN = """
import json, sys, raymoe
from raymoe.planning import MergeOptions
from raymoe.runtime.settings import RuntimeSettings
options = json.loads(sys.argv[3])
settings = RuntimeSettings(verbosity=-1, **options["settings"])
result = raymoe.merge(sys.argv[1], sys.argv[2], MergeOptions(**options["merge"]), settings=settings)
print(json.dumps({"seconds": result.seconds, "gpu": result.peak_gpu_bytes, "actors": result.peak_actor_bytes}))
"""


def prompts(topic: str) -> list[str]:
    return [f"Tell me about {topic}, part {n}: " + "and what came next " * (n % 5) for n in range(16)]


def resident_rows(model: Path, texts: list[str]) -> torch.Tensor:
    """(layers, hidden) unit rows from transformers with the whole model on the GPU, one prompt at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModel.from_pretrained(model, dtype=torch.bfloat16).to("cuda").eval()
    total = 0.0
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt", add_special_tokens=False).to("cuda")
            states = whole(ids["input_ids"], output_hidden_states=True).hidden_states[:-1]
            total = total + torch.stack([state[0, -1].double().cpu() for state in states])
    return torch.nn.functional.normalize(torch.as_tensor(total), dim=-1)


def written_rows(folder: Path) -> torch.Tensor:
    """(layers, experts, hidden) router rows of a merge."""
    rows: dict[int, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name.endswith("block_sparse_moe.gate.weight"):
                    rows[int(name.split(".")[2])] = file.get_tensor(name).double()
    return torch.stack([rows[layer] for layer in sorted(rows)])


def merge(config: Path, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    run = [sys.executable, "-c", RUN, str(config), str(output), json.dumps(options)]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"merge failed: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mistral-1b")
    arguments = parser.parse_args()
    models = [arguments.work / f"expert-{number}" for number in range(EXPERTS)]
    for seed, model in enumerate(models):
        write_model(model, SHAPES[arguments.shape], seed=seed, tokenizer=arguments.tokenizer)
    experts = [{"source_model": str(m), "positive_prompts": prompts(t)} for m, t in zip(models, TOPICS, strict=True)]
    config = arguments.work / "config.yaml"
    config.write_text(yaml.safe_dump({"base_model": str(models[0]), "experts": experts}))
    expected = torch.stack([resident_rows(models[0], prompts(topic)) for topic in TOPICS], dim=1)
    torch.cuda.empty_cache()
    runs: dict[str, dict[str, Any]] = {
        "one GPU per expert, in waves": {"settings": {}, "merge": {}},
        "a quarter of a GPU per expert": {"settings": {"gpus_per_expert": 0.25}, "merge": {}},
        "on CPUs (--device cpu)": {"settings": {"device": "cpu"}, "merge": {}},
        "--load-in-8bit": {"settings": {}, "merge": {"quantize_gates": "8bit"}},
        "--load-in-4bit": {"settings": {}, "merge": {"quantize_gates": "4bit"}},
    }
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {EXPERTS} experts of {arguments.shape}")
    print(
        "| run | actors | seconds | peak GPU memory per actor | lowest and median cosine to a resident bfloat16 pass |"
    )
    print("|---|---|---|---|---|")
    for number, (title, options) in enumerate(runs.items()):
        output = arguments.work / f"merged-{number}"
        result = merge(config, output, options)
        cosines = torch.cosine_similarity(written_rows(output), expected, dim=-1).flatten()
        gpu = ", ".join(f"{peak / 2**20:.0f} MiB" for peak in result["gpu"])
        actors, agreement = len(result["actors"]), f"{cosines.min():.5f}, {cosines.median():.5f}"
        print(f"| {title} | {actors} | {result['seconds']:.1f} | {gpu} | {agreement} |", flush=True)


if __name__ == "__main__":
    main()
