"""Peak memory of a merge's processes for outputs of two sizes: it must not grow with the model.

    python scripts/measure_memory.py           # prints the table, and puts it into docs/memory.md

The two merges differ in depth alone, so that a layer has the same size in both. Peak memory is what the kernel counts
as resident at most (`ru_maxrss`), mapped file pages included, for the driver and for each actor, as a merge reports it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from pages import put_between
from random_model import Shape, write_model

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARK = ROOT / "docs/memory.md", "<!-- table: scripts/measure_memory.py -->"
SHAPE = Shape(hidden=1024, intermediate=4096, layers=8, heads=16, kv_heads=4, vocab=49152)
DEPTHS = (8, 34)  # about 1 GB and 4 GB of output
EXPERTS = 4
PROMPTS = [f"A prompt of a few words, the {n}th of its kind, to be read by the base model." for n in range(16)]

# The merge in a process of its own, since a peak is a process's for good.
RUN = """
import json, sys, raymoe
result = raymoe.merge(sys.argv[1], sys.argv[2])
print(json.dumps({"driver": result.peak_driver_bytes, "actors": result.peak_actor_bytes,
                  "output": sum(f.size for f in result.files)}))
"""


def measure(work: Path, depth: int, mode: str) -> dict[str, Any]:
    """Merge EXPERTS random experts of that depth; peak bytes of driver and actors, bytes of the output."""
    shape = dataclasses.replace(SHAPE, layers=depth)
    tokenizer = ROOT / "models/SmolLM2-135M-Instruct"
    models = [work / f"depth-{depth}" / str(number) for number in range(EXPERTS)]
    for seed, model in enumerate(models):
        write_model(model, shape, seed=seed, tokenizer=tokenizer)
    experts = [
        {"source_model": str(m), "positive_prompts": [f"{n} {p}" for p in PROMPTS]} for n, m in enumerate(models)
    ]
    config = work / "config.yaml"
    config.write_text(yaml.safe_dump({"base_model": str(models[0]), "gate_mode": mode, "experts": experts}))
    output = work / "merged"
    shutil.rmtree(output, ignore_errors=True)
    run = [sys.executable, "-c", RUN, str(config), str(output)]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(output)
    return dict(json.loads(printed.splitlines()[-1]))


def row(mode: str, depth: int, result: dict[str, Any]) -> str:
    actors = ", ".join(f"{peak / 1e6:.0f} MB" for peak in result["actors"])
    return f"| {mode} | {result['output'] / 1e9:.2f} GB ({depth} layers) | {result['driver'] / 1e6:.0f} MB | {actors} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out/memory")
    parser.add_argument("--modes", nargs="*", default=["random", "cheap_embed", "hidden"])
    parser.add_argument("--no-page", action="store_true", help="print only; leave docs/memory.md alone")
    arguments = parser.parse_args()
    lines = ["| gate mode | output | driver | actors |", "|---|---|---|---|"]
    for mode in arguments.modes:
        for depth in DEPTHS:
            lines.append(row(mode, depth, measure(arguments.work, depth, mode)))
            print(lines[-1], flush=True)
    if not arguments.no_page:
        put_between(PAGE, MARK, "\n".join(lines))


if __name__ == "__main__":
    main()
