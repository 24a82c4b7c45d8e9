"""Times merges on a GPU host: gate phase against reading the weights, the whole against the kernel's copy.

    python scripts/bench_gpu.py --models /dev/shm/bench --output /data/bench --tokenizer models/SmolLM2-135M-Instruct \\
        --out gpu.json
    python scripts/bench_gpu.py --page gpu.json            # its tables, into docs/benchmarks.md

Makes four random experts of Mistral-7B's shape. Then the kernel's copy of the output's bytes (raw_copy.py), merges in
modes `hidden` and `ridge` with all GPUs and with one, and mergekit-moe, if it is installed, take turns, each a whole
process; after one merge that does not count, which finds nothing in the page cache. 16 prompts of 64 tokens per expert.
After each run the system's `sync` is waited for: times are kept until the process ended, and until its bytes were on
the disk. Give `--output` on a RAM disk, and another OUT, for a second table. Rounds are added to the results that OUT
has, and TIMELINE tells when which actor's GPU read prompts, from Ray's own record of a merge.

Of the gate phase, two parts are measured by themselves: `import torch` with the start of CUDA, in a process of its own,
and reading the weights from memory. The rest of it is computing, and what could not overlap.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import ROOT, write_config, write_copies
from pages import put_between
from random_model import SHAPES, write_model

EXPERTS, PROMPTS, WORDS, READERS = 4, 16, 30, 6
MODES = ("hidden", "ridge")
PAGE, MARK = ROOT / "docs/benchmarks.md", "<!-- table: scripts/bench_gpu.py -->"
TIMELINE = """
import json, sys, time, ray, raymoe
from raymoe.runtime.settings import RuntimeSettings
ray.init(address="local", include_dashboard=False, log_to_driver=False)
raymoe.merge(sys.argv[1], sys.argv[2], settings=RuntimeSettings(verbosity=-1, overwrite=True))
time.sleep(3)  # actors send what they did from time to time
print(json.dumps(ray.timeline()))
"""
GATES = "task::gates of"
IMPORT_TORCH = """
import time
began = time.perf_counter()
import torch
imported = time.perf_counter()
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
print(imported - began, time.perf_counter() - imported)
"""
START_RAY = """
import time, ray
began = time.perf_counter()
ray.init(address="local", include_dashboard=False, log_to_driver=False)
print(time.perf_counter() - began)
"""


def made(folder: Path, shape: str, tokenizer: Path) -> list[Path]:
    paths = [folder / f"{shape}-{number}" for number in range(EXPERTS)]
    with ProcessPoolExecutor(EXPERTS) as pool:
        jobs = [
            pool.submit(write_model, path, SHAPES[shape], seed=number, tokenizer=tokenizer)
            for number, path in enumerate(paths)
            if not (path / "model.safetensors.index.json").exists()
        ]
        for job in jobs:
            job.result()
    return paths


def read_rate(model: Path) -> float:
    """Bytes per second at which a model's files are read into memory by as many threads as a gate pass has."""
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


def torch_seconds() -> tuple[float, float]:
    """Seconds of `import torch`, and of the start of CUDA, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", IMPORT_TORCH], capture_output=True, text=True, check=True)
    imported, started = map(float, done.stdout.split()[-2:])
    return imported, started


def kind_of_disk(folder: Path) -> str:
    """ "RAM disk" if the folder is in memory, else "disk"."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    within = [(at, kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return "RAM disk" if max(within, key=lambda mount: len(mount[0]))[1] in ("tmpfs", "ramfs") else "disk"


def gate_bytes(config: Path, actors: int) -> int:
    """Bytes of weights that the gate pass reads: each model once by each actor that reads prompts with it."""
    from raymoe import api
    from raymoe.routers.prompt_passes import plan_readings

    gates = api.plan(config).gates
    parts = plan_readings([*gates.experts], actors, gates.hidden)
    return sum(ref.entry.nbytes for members in parts for n, ref in members[0].weights.items() if ".layers." in n)


def timed(command: Sequence[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """Seconds of a process, and when it said what on standard error."""
    began, env = time.perf_counter(), {**os.environ, **variables}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
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
    folder, gpus = arguments.output / "merged", torch.cuda.device_count()
    configs = {
        mode: write_config(arguments.output / f"{mode}.yaml", models, mode, PROMPTS, WORDS) for mode in arguments.modes
    }
    commands = _commands(arguments, configs, folder, gpus)
    result: dict[str, Any] = (
        json.loads(arguments.out.read_text())
        if arguments.out is not None and arguments.out.exists()
        else {
            "gpus": gpus,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU",
            "processors": os.cpu_count(),
            "shape": arguments.shape,
            "read_rates": [read_rate(models[0]) for _ in range(3)],
            "gate_bytes": {mode: gate_bytes(config, max(1, gpus)) for mode, config in configs.items()},
            "ray_seconds": [],
            "torch_seconds": [],
            "disk": kind_of_disk(arguments.output),
            "runs": {name: [] for name in commands},
        }
    )
    shutil.rmtree(folder, ignore_errors=True)
    if not result["ray_seconds"]:
        timed(*commands[arguments.modes[0]])
    for _ in range(arguments.rounds):
        done = subprocess.run([sys.executable, "-c", START_RAY], capture_output=True, text=True, check=True)
        result["ray_seconds"].append(float(done.stdout.split()[-1]))
        result["torch_seconds"].append(torch_seconds())
        for name, command in commands.items():
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            run = timed(*command)
            result["output_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
            began = time.perf_counter()
            os.sync()
            facts = {"seconds": run["seconds"], "synced_seconds": run["seconds"] + time.perf_counter() - began}
            if name not in ("raw", "mergekit"):
                up = at(run, "actors are up")
                facts |= {
                    "gates": at(run, "gates are computed") - up,
                    "write": at(run, "shards are written") - up,
                    "until_actors": up,
                    "ray_began": at(run, "starting Ray"),
                    "gpu_bytes": peak_gpu_bytes(run),
                }
            result["runs"][name].append(facts)
            print(name, {k: round(v, 2) for k, v in facts.items()}, file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(result, indent=1))
    shutil.rmtree(folder)
    if arguments.timeline:
        result["timeline"] = timeline(configs[arguments.modes[-1]], folder)
        arguments.out.write_text(json.dumps(result, indent=1))
        shutil.rmtree(folder)
    return result


def _commands(
    arguments: argparse.Namespace, configs: dict[str, Path], folder: Path, gpus: int
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """What takes turns: each a command, and variables of its environment."""
    first = next(iter(configs.values()))
    copies = write_copies(arguments.output / "copies.json", first)
    commands = {"raw": ([sys.executable, str(ROOT / "scripts/raw_copy.py"), str(copies), str(folder)], {})}
    for mode, config in configs.items():
        merge = [sys.executable, "-m", "raymoe", "merge", str(config), str(folder), "-v"]
        commands[mode] = (merge, {})
        if gpus > 1:
            commands[f"{mode}, one GPU"] = (merge, {"CUDA_VISIBLE_DEVICES": "0"})
    if arguments.mergekit:
        peer = [
            sys.executable,
            "-m",
            "mergekit.scripts.moe",
            str(configs.get("hidden", first)),
            str(folder),
            "--cuda",
            "--quiet",
        ]
        commands["mergekit"] = (peer, {})
    return commands


def timeline(config: Path, folder: Path) -> list[dict[str, Any]]:
    """When each actor read prompts, as Ray recorded it: seconds since the first began."""
    done = subprocess.run(
        [sys.executable, "-c", TIMELINE, str(config), str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    events = [e for e in json.loads(done.stdout.splitlines()[-1]) if e.get("cat", "").startswith(GATES)]
    first = min(event["ts"] for event in events)
    return [
        {
            "what": event["cat"].removeprefix("task::"),
            "actor": event["tid"],
            "from_s": (event["ts"] - first) / 1e6,
            "to_s": (event["ts"] + event["dur"] - first) / 1e6,
        }
        for event in events
    ]


def table(result: dict[str, Any]) -> str:
    def median(name: str, what: str) -> float:
        return statistics.median(run[what] for run in result["runs"][name])

    rate, ray = statistics.median(result["read_rates"]), statistics.median(result["ray_seconds"])
    imports, cuda = (statistics.median(part) for part in zip(*result["torch_seconds"], strict=True))
    rounds, whole = len(result["runs"]["raw"]), {name: median(name, "seconds") for name in result["runs"]}
    count = f"medians of {rounds} rounds" if rounds > 1 else "one run each"
    lines = [
        f"{result['gpus']} × {result['gpu']}, {result['processors']} cores; four experts of shape {result['shape']}, "
        f"{result['output_bytes'] / 1e9:.1f} GB to a {result['disk']}; {count}. Weights are read from memory at "
        f"{rate / 1e9:.1f} GB/s by {READERS} threads; `ray.init` takes {ray:.1f} s, `import torch` {imports:.1f} s, "
        f"the start of CUDA {cuda:.1f} s.",
        "",
        "| | whole | : mergekit-moe | until synced | of (raw copy + `ray.init`), synced | plan | until actors are up "
        "| gate phase | of it imports | reading | computing | gate phase : (reading + `import torch`) | writing "
        "| writing : raw copy | GPU memory |",
        "|---" * 15 + "|",
    ]
    for name in (name for name, runs in result["runs"].items() if runs):
        synced = median(name, "synced_seconds")
        ratio = f"{whole[name] / whole['mergekit']:.2f}" if "mergekit" in whole else "-"
        share = f"{synced / (median('raw', 'synced_seconds') + ray):.2f}"
        if name in ("mergekit", "raw"):
            label = "raw copy" if name == "raw" else "mergekit-moe, `hidden --cuda`"
            lines.append(f"| {label} | {whole[name]:.1f} s | {ratio} | {synced:.1f} s |" + " |" * 11)
            continue
        mode, _, gpus = name.partition(",")
        label = f"`{mode}`,{gpus}" if gpus else f"`{mode}`"
        gates, read, write = median(name, "gates"), result["gate_bytes"][mode] / rate, median(name, "write")
        cells = [label, f"{whole[name]:.1f} s", ratio, f"{synced:.1f} s", share]
        cells += [f"{median(name, what):.1f} s" for what in ("ray_began", "until_actors")]
        cells += [f"{s:.1f} s" for s in (gates, imports + cuda, read, max(0.0, gates - imports - cuda - read))]
        cells += [f"{gates / (read + imports):.2f}", f"{write:.1f} s", f"{write / whole['raw']:.2f}"]
        cells.append(f"{median(name, 'gpu_bytes') / 1e9:.1f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    if result.get("timeline"):
        lines += ["", "Prompts in `ridge`, by Ray's timeline:", "", "| task | actor | from | to |", "|---|---|---|---|"]
        actors = sorted({event["actor"] for event in result["timeline"]})
        for event in sorted(result["timeline"], key=lambda event: float(event["from_s"])):
            number = actors.index(event["actor"])
            lines.append(f"| {event['what']} | {number} | {event['from_s']:.1f} s | {event['to_s']:.1f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder for the experts (58 GB), a RAM disk for instance")
    parser.add_argument("--output", type=Path, help="folder for outputs (48 GB)")
    parser.add_argument("--shape", default="mistral-7b", choices=sorted(SHAPES))
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--mergekit", action="store_true", help="mergekit-moe, installed here, takes part")
    parser.add_argument("--timeline", action="store_true", help="at the end, when which actor read prompts")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--page", type=Path, nargs="+", help="put the tables of these results into docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.page:
        tables = [table(json.loads(path.read_text())) for path in arguments.page]
        put_between(PAGE, MARK, "\n\n".join(tables))
    else:
        print(table(measure(arguments)))


if __name__ == "__main__":
    main()
