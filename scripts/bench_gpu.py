"""Times merges on a GPU host: gate phase against reading the weights, the whole against the kernel's copy.

    python scripts/bench_gpu.py --models /dev/shm/bench --output /data/bench --tokenizer models/SmolLM2-135M-Instruct \\
        --out gpu.json
    python scripts/bench_gpu.py --page gpu.json            # its table, into docs/benchmarks.md

Makes four random experts of Mistral-7B's shape, then lets the kernel's copy of the output's bytes (raw_copy.py) and
merges in modes `hidden` and `ridge` take turns, each a whole process. 16 prompts of 64 tokens an expert.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import ROOT, write_config, write_copies
from pages import put_between
from random_model import SHAPES, write_model

EXPERTS, PROMPTS, WORDS, READERS = 4, 16, 30, 6
MODES = ("hidden", "ridge")
PAGE, MARK = ROOT / "docs/benchmarks.md", "<!-- table: scripts/bench_gpu.py -->"
START_RAY = """
import time, ray
began = time.perf_counter()
ray.init(address="local", include_dashboard=False, log_to_driver=False)
print(time.perf_counter() - began)
"""


def made(folder: Path, shape: str, tokenizer: Path) -> list[Path]:
    paths = [folder / f"{shape}-{number}" for number in range(EXPERTS)]
    with ProcessPoolExecutor(EXPERTS) as pool:
        jobs = [pool.submit(write_model, p, SHAPES[shape], seed=n, tokenizer=tokenizer) for n, p in enumerate(paths)]
        for job in jobs:
            job.result()
    return paths


def read_rate(model: Path) -> float:
    """Bytes a second at which a model's files are read into memory by as many threads as a gate pass has."""
    piece = 8 << 20
    files = [os.open(path, os.O_RDONLY) for path in sorted(model.glob("*.safetensors"))]
    spans = [(file, at) for file in files for at in range(0, os.fstat(file).st_size, piece)]
    buffers = [bytearray(piece) for _ in range(READERS)]

    def read(worker: int) -> int:
        return sum(os.preadv(file, [buffers[worker]], at) for file, at in spans[worker::READERS])

    began = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, range(READERS)))
    return total / (time.perf_counter() - began)


def gate_bytes(config: Path, actors: int) -> int:
    """Bytes of weights that the gate pass reads: each model once by each actor that reads prompts with it."""
    from raymoe import api
    from raymoe.gates.capture import readings

    gates = api.plan(config).gates
    parts = readings([*gates.experts], actors)
    return sum(ref.entry.nbytes for members in parts for n, ref in members[0].weights.items() if ".layers." in n)


def timed(command: Sequence[str]) -> dict[str, Any]:
    """Seconds of a process, and when it said what on standard error."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = [(time.perf_counter() - began, line.rstrip()) for line in process.stderr]
    if process.wait():
        raise RuntimeError(f"{command} failed:\n" + "\n".join(line for _, line in said[-30:]))
    return {"seconds": time.perf_counter() - began, "said": said}


def at(run: dict[str, Any], text: str) -> float:
    return next(seconds for seconds, line in run["said"] if text in line)


def peak_gpu_bytes(run: dict[str, Any]) -> float:
    line = next((line for _, line in run["said"] if "peak GPU memory" in line), "")
    sizes = re.findall(r"([\d.]+) (kB|MB|GB)", line)
    return max((float(size) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] for size, unit in sizes), default=0.0)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    models = made(arguments.models, arguments.shape, arguments.tokenizer)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = arguments.output / "merged"
    configs = {mode: write_config(arguments.output / f"{mode}.yaml", models, mode, PROMPTS, WORDS) for mode in MODES}
    copies = write_copies(arguments.output / "copies.json", configs["hidden"])
    commands = {"raw": [sys.executable, str(ROOT / "scripts/raw_copy.py"), str(copies), str(folder)]}
    for mode, config in configs.items():
        commands[mode] = [sys.executable, "-m", "raymoe", "merge", str(config), str(folder), "-v"]
    result: dict[str, Any] = {
        "gpus": torch.cuda.device_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU",
        "processors": os.cpu_count(),
        "shape": arguments.shape,
        "read_rates": [read_rate(models[0]) for _ in range(3)],
        "gate_bytes": {mode: gate_bytes(config, max(1, torch.cuda.device_count())) for mode, config in configs.items()},
        "runs": {name: [] for name in commands},
    }
    done = subprocess.run([sys.executable, "-c", START_RAY], capture_output=True, text=True, check=True)
    result["ray_seconds"] = float(done.stdout.split()[-1])
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            run = timed(command)
            result["output_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
            facts = {"seconds": run["seconds"]}
            if name != "raw":
                up = at(run, "actors are up")
                facts |= {
                    "gates": at(run, "gates are computed") - up,
                    "write": at(run, "shards are written") - up,
                    "until_actors": up,
                    "gpu_bytes": peak_gpu_bytes(run),
                }
            result["runs"][name].append(facts)
            print(name, {k: round(v, 2) for k, v in facts.items()}, file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(result, indent=1))
    shutil.rmtree(folder)
    return result


def table(result: dict[str, Any]) -> str:
    def median(name: str, what: str) -> float:
        return statistics.median(run[what] for run in result["runs"][name])

    rate = statistics.median(result["read_rates"])
    lines = [
        f"{result['gpus']} x {result['gpu']}, {result['processors']} cores, four experts of shape {result['shape']}, "
        f"{result['output_bytes'] / 1e9:.1f} GB out; medians of {len(result['runs']['raw'])} runs in turns.",
        f"Weights are read from memory at {rate / 1e9:.1f} GB/s by {READERS} threads.",
        f"`ray.init` takes {result['ray_seconds']:.1f} s.",
        "",
        "| | whole | gate phase | reading its weights | writing | GPU memory |",
        "|---|---:|---:|---:|---:|---:|",
        f"| raw copy | {median('raw', 'seconds'):.1f} s | | | | |",
    ]
    for mode in MODES:
        read = result["gate_bytes"][mode] / rate
        lines.append(
            f"| `{mode}` | {median(mode, 'seconds'):.1f} s | {median(mode, 'gates'):.1f} s | {read:.1f} s | "
            f"{median(mode, 'write'):.1f} s | {median(mode, 'gpu_bytes') / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder for the experts (58 GB), a RAM disk for instance")
    parser.add_argument("--output", type=Path, help="folder for outputs (47 GB)")
    parser.add_argument("--shape", default="mistral-7b", choices=sorted(SHAPES))
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--page", type=Path, help="put the table of these results into docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.page:
        put_between(PAGE, MARK, table(json.loads(arguments.page.read_text())))
    else:
        print(table(measure(arguments)))


if __name__ == "__main__":
    main()
