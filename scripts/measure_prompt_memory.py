"""What `raymoe plan` says that an actor needs, beside what it took, for few and many prompts.

    python scripts/measure_prompt_memory.py           # prints the table, and puts it into docs/memory.md

Two small experts, all prompts of 251 tokens, read by one actor. The peak is what the kernel counts as resident at most
(`ru_maxrss`), shared memory of Ray's store included, as a merge reports it. Sources are read into memory, not mapped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from pages import put_between
from random_model import Shape, write_model

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARK = ROOT / "docs/memory.md", "<!-- table: scripts/measure_prompt_memory.py -->"
TOKENIZER = ROOT / "models/SmolLM2-135M-Instruct"
SHAPE = Shape(hidden=1024, intermediate=2048, layers=2, heads=8, kv_heads=4, vocab=49152)
MODES = ("hidden", "hidden_avg", "ridge", "cheap_embed")
COUNTS = (16, 100, 800, 3200)
TOKENS = 251
PLACES = {"cpu": "on a CPU", "gpu": "of the GPU", "beside_gpu": "beside the GPU"}

# The merge in a process of its own: a driver that plans keeps what it read.
RUN = """
import json, sys, raymoe
from raymoe.report.memory_estimate import actor_memory
from raymoe.runtime.settings import RuntimeSettings
planned = actor_memory(raymoe.plan(sys.argv[1]))
result = raymoe.merge(sys.argv[1], sys.argv[2], settings=RuntimeSettings(verbosity=-1, actors=1))
used = {"cpu": max(result.peak_actor_bytes), "gpu": max(result.peak_gpu_bytes)}
print(json.dumps({"planned": planned, "used": used}))
"""


def prompts(count: int, seed: int) -> list[str]:
    """Texts of TOKENS tokens: single letters, each of which the tokenizer has with the space before it."""
    numbers = random.Random(seed)
    return [" ".join(numbers.choices("abcdefghijklmnopqrstuvwxyz", k=TOKENS)) for _ in range(count)]


def measure(work: Path, mode: str, count: int, shape: Shape = SHAPE) -> dict[str, Any]:
    """`actor_memory` of a plan with `count` prompts in all, and what the merge used; both in bytes."""
    models = [work / str(number) for number in range(3)]
    for seed, model in enumerate(models):
        if not model.exists():
            write_model(model, shape, seed=seed, tokenizer=TOKENIZER)
    experts = [
        {"source_model": str(model), "positive_prompts": prompts(count // 2, seed)}
        for seed, model in enumerate(models[1:])
    ]
    content = {"base_model": str(models[0]), "gate_mode": mode, "prompt_model": "base", "experts": experts}
    config, output = work / "config.yaml", work / "merged"
    if mode == "cheap_embed":
        del content["prompt_model"]
    config.write_text(yaml.safe_dump(content))
    shutil.rmtree(output, ignore_errors=True)
    run = [sys.executable, "-c", RUN, str(config), str(output)]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(output)
    return dict(json.loads(printed.splitlines()[-1]))


def rows(mode: str, count: int, result: dict[str, Any]) -> list[str]:
    """Lines of the table: one, or two where the actor computes on a GPU."""
    planned, used = result["planned"], result["used"]
    places = ["gpu", "beside_gpu"] if used["gpu"] else ["cpu"]
    found = []
    for place in places:
        taken = used["gpu" if place == "gpu" else "cpu"]
        said = planned[place]
        words = [mode, str(count), PLACES[place], f"{said / 1e6:.0f} MB", f"{taken / 1e6:.0f} MB"]
        found.append(f"| {' | '.join([*words, f'{round(100 * (said / taken - 1)):+d}%'])} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out/prompt-memory")
    parser.add_argument("--modes", nargs="*", default=MODES)
    parser.add_argument("--counts", nargs="*", type=int, default=COUNTS)
    parser.add_argument("--no-page", action="store_true", help="print only; leave docs/memory.md alone")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    lines = ["| gate mode | prompts | memory | plan | peak | plan against peak |", "|---|---|---|---|---|---|"]
    for mode in arguments.modes:
        for count in arguments.counts:
            found = rows(mode, count, measure(arguments.work, mode, count))
            print("\n".join(found), flush=True)
            lines += found
    if not arguments.no_page:
        put_between(PAGE, MARK, "\n".join(lines))


if __name__ == "__main__":
    main()
