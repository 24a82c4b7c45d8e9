"""Compares the time of a merge with mergekit-moe's and with that of the kernel's copy, each as a whole process.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install -c constraints.txt torch mergekit==0.1.5
    python scripts/bench.py run --work /tmp/bench --shapes mistral-1b --modes cheap_embed --mergekit /tmp/mergekit
    python scripts/bench.py page --work /tmp/bench        # tables and plot into docs/benchmarks.md

The models are random (scripts/random_model.py) and made once. One run of each program is measured for its memory; then
they take turns, the page cache being in the same state before each run, and medians are compared. `raw` (see
raw_copy.py) copies the output's shards from the same ranges of the same files, on as many threads as there are
processors: `copy_file_range` into files whose room was set aside, and fsync.

Each output is written to a disk (WORK) and to a RAM disk (`--ram-disk`). After each run the system's `sync` is waited
for, and both times are kept: until the program ended, and until its bytes were on the disk, too.

With `--backbones`, raymoe merges with these backbones as well, in turn with the others:

    python scripts/bench.py run --work /tmp/bench --shapes mistral-1b --modes hidden --backbones linear
    python scripts/bench.py page --work /tmp/bench --tables backbones

Results are added to WORK/results.json, one entry per shape, mode, number of actors and kind of disk; a new one replaces
an old one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from bench_page import PAGE, TABLES, update_page
from random_model import SHAPES, write_model
from run_measures import Run, drop_from_cache, read_into_cache, run_program

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = 4
# What raymoe -v says, and what has come to its end then.
STEPS = {
    "starting Ray on this machine": "plan",
    "Ray is up": "start Ray",
    "actors are up": "start actors",
    "gates are computed": "gates",
    "shards are written": "write",
    "checkpoint is complete": "finish",
}
# The same in result.json: which phase has ended then.
RECORDED = {
    "Ray is up": "start of Ray",
    "actors are up": "start of actors",
    "gates are computed": "gates",
    "shards are written": "shards",
    "checkpoint is complete": "end",
}
DISKS = ("disk", "RAM disk")


def models(work: Path, shape: str, tokenizer: Path) -> list[Path]:
    paths = [work / "models" / f"{shape}-{number}" for number in range(EXPERTS)]
    for seed, path in enumerate(paths):
        write_model(path, SHAPES[shape], seed=seed, tokenizer=tokenizer)
    return paths


def write_config(
    path: Path, experts: Sequence[Path | str], mode: str, prompts: int, words: int, backbone: Any = "base"
) -> Path:
    """The first model is the base too. Every expert has its own prompts, all of one length."""
    text = " ".join(f"word{n}" if n % 3 else "of the" for n in range(words))
    entries: list[dict[str, Any]] = [
        {"source_model": str(model), "positive_prompts": [f"{number} {n} {text}" for n in range(prompts)]}
        for number, model in enumerate(experts)
    ]
    if mode == "random":
        entries = [{"source_model": str(model)} for model in experts]
    config = {"base_model": str(experts[0]), "gate_mode": mode, "backbone": backbone, "experts": entries}
    path.write_text(yaml.safe_dump(config))
    return path


def write_copies(path: Path, config: Path) -> Path:
    """What `raw` is to copy: for each shard its size, and (source, start, end, offset) for each range."""
    from raymoe import api
    from raymoe.planning.multipart import CopyRange, spans

    shards = []
    for shard in api.plan(config).shards:
        found = [s for s in spans(shard.parts) if isinstance(s.what, CopyRange)]
        ranges = [(s.what.file.location, s.what.start, s.what.end, s.start) for s in found]  # type: ignore[union-attr]
        shards.append({"name": shard.file_name, "size": shard.nbytes, "ranges": ranges})
    path.write_text(json.dumps(shards))
    return path


class Contest:
    """One shape, mode, number of actors and kind of disk: the programs, and what their runs took."""

    def __init__(self, arguments: argparse.Namespace, shape: str, mode: str, actors: int | None, disk: str) -> None:
        self._cache, self._disk = arguments.cache, disk
        self._output = (arguments.work if disk == "disk" else arguments.ram_disk) / "output"
        self._output.parent.mkdir(parents=True, exist_ok=True)
        experts = models(arguments.work, shape, arguments.tokenizer)
        self._sources = [file for model in experts for file in model.glob("*.safetensors")]
        given = (experts, mode, arguments.prompts, arguments.words)
        config = write_config(arguments.work / "config.yaml", *given)
        copies = write_copies(arguments.work / "copies.json", config)
        options = [str(self._output), *(["--actors", str(actors)] if actors else [])]
        merge = [sys.executable, "-m", "raymoe", "merge"]
        raw = [sys.executable, str(ROOT / "scripts/raw_copy.py"), str(copies), str(self._output)]
        self.commands = {"raymoe": [*merge, str(config), *options], "raw": raw}
        for number, backbone in enumerate(arguments.backbones):
            own = write_config(arguments.work / f"config-{number}.yaml", *given, yaml.safe_load(backbone))
            self.commands[f"backbone: {backbone}"] = [*merge, str(own), *options]
        if arguments.mergekit is not None:
            program = str(arguments.mergekit / "bin/mergekit-moe")
            self.commands["mergekit"] = [program, str(config), str(self._output), "--quiet"]
        self.shape, self.mode, self.actors = shape, mode, actors

    def hold(self, runs: int) -> dict[str, Any]:
        """The memory run of each program (with outputs on a disk), then `runs` rounds of timed ones."""
        taken: dict[str, list[Run]] = {name: [] for name in self.commands}
        watched = self.commands if self._disk == "disk" else ()
        memory = {name: self._run(name, memory=True) for name in watched}
        for _ in range(runs):
            for name in self.commands:
                taken[name].append(run := self._run(name))
                times = f"{run.seconds:.2f} s, until synced {run.synced_seconds:.2f} s"
                print(f"{self.shape} {self.mode} to a {self._disk}, {name}: {times}", flush=True)
        output_bytes = sum(file.stat().st_size for file in self._output.iterdir())
        self._clear()
        return {
            "shape": self.shape,
            "mode": self.mode,
            "actors": self.actors,
            "cache": self._cache,
            "disk": self._disk,
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "experts": EXPERTS,
            "output_bytes": output_bytes,
            "programs": {name: summary(taken[name], memory.get(name)) for name in self.commands},
        }

    def _run(self, name: str, *, memory: bool = False) -> Run:
        self._clear()
        os.sync()
        drop_from_cache(self._sources)
        if self._cache == "warm":
            read_into_cache(self._sources)
        is_ours = name not in ("raw", "mergekit")
        run = run_program(self.commands[name], steps=list(STEPS)[:1] if is_ours else (), memory=memory)
        began = time.perf_counter()
        os.sync()
        run = replace(run, synced_seconds=run.seconds + time.perf_counter() - began)
        if not is_ours:
            return run
        return replace(run, steps=steps_of(run, json.loads((self._output / "result.json").read_text())["phases"]))

    def _clear(self) -> None:
        shutil.rmtree(self._output, ignore_errors=True)


def steps_of(run: Run, recorded: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds from the start of the process until each step, from the phases of result.json.

    These count from a moment after Python's start: the line that comes with a phase says how long after.
    """
    (first, at), *_ = run.steps.items()
    before = at - recorded["start of Ray"]["start_s"]
    return {first: at} | {step: before + recorded[p]["end_s"] for step, p in RECORDED.items() if p in recorded}


def summary(runs: Sequence[Run], memory: Run | None) -> dict[str, Any]:
    """Medians over the runs; all of them are kept beside. `memory`: the run whose memory was measured."""
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "synced_seconds": statistics.median(run.synced_seconds or run.seconds for run in runs),
        "phases": median_phases([phases(run) for run in runs]),
        "peak_pss": memory and memory.peak_pss,
        "peak_anonymous": memory and memory.peak_anonymous,
        "runs": [asdict(run) for run in runs],
    }


def phases(run: Run) -> dict[str, float]:
    """Seconds of each phase. Gates and writing begin together, when the actors are up, and run side by side."""
    if not run.steps:
        return {}
    found, last = {}, 0.0
    begun = next(run.steps[step] for step, name in STEPS.items() if name == "start actors")
    for step, name in STEPS.items():
        if step not in run.steps:
            continue
        at = run.steps[step]
        found[name] = at - (begun if name in ("gates", "write") else last)
        last = max(last, at)
    return {**found, "stop Ray": run.seconds - last}


def median_phases(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    common = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: statistics.median(run[name] for run in runs) for name in common}


def add_result(path: Path, result: dict[str, Any]) -> None:
    key = ("shape", "mode", "actors", "cache", "disk", "processors")
    results = json.loads(path.read_text()) if path.exists() else []
    kept = [old for old in results if any(old.get(name) != result.get(name) for name in key)]
    path.write_text(json.dumps([*kept, result], indent=2) + "\n")


def run(arguments: argparse.Namespace) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shapes:
        for mode in arguments.modes:
            for actors, disk in itertools.product(arguments.actors or [None], arguments.disks):
                contest = Contest(arguments, shape, mode, actors, disk)
                result = contest.hold(arguments.runs)
                result["commit"] = commit()
                add_result(arguments.work / "results.json", result)
        if arguments.remove_models:
            shutil.rmtree(arguments.work / "models")


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="measure")
    runs.add_argument("--work", type=Path, required=True, help="folder for models, outputs and results")
    runs.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["mistral-1b"])
    runs.add_argument("--modes", nargs="+", default=["cheap_embed", "hidden"])
    runs.add_argument(
        "--actors", nargs="*", type=int, default=[], help="numbers of actors; raymoe's own choice if none"
    )
    runs.add_argument("--runs", type=int, default=3)
    runs.add_argument("--cache", choices=["warm", "cold"], default="warm", help="page cache before each run")
    runs.add_argument("--disks", nargs="+", choices=DISKS, default=DISKS, help="where outputs are written")
    runs.add_argument("--ram-disk", type=Path, default=Path("/dev/shm/raymoe-bench"), help="a folder on a RAM disk")
    runs.add_argument("--prompts", type=int, default=8, help="an expert")
    runs.add_argument("--words", type=int, default=24, help="a prompt, about")
    runs.add_argument("--backbones", nargs="+", default=[], metavar="YAML", help="backbones besides the base's")
    runs.add_argument("--mergekit", type=Path, help="environment with mergekit; without it, it takes no part")
    runs.add_argument("--tokenizer", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    runs.add_argument("--remove-models", action="store_true", help="make room before the next shape")
    runs.set_defaults(do=run)
    page = commands.add_parser("page", help="write the tables and the plot")
    page.add_argument("--work", type=Path, required=True)
    page.add_argument("--page", type=Path, default=PAGE)
    page.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which tables are written anew")
    page.set_defaults(do=lambda a: update_page(a.page, json.loads((a.work / "results.json").read_text()), a.tables))
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
