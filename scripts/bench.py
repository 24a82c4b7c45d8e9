"""Compares the time of a merge with mergekit-moe's and with that of the kernel's copy, each as a whole process.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install -c constraints.txt torch mergekit==0.1.5
    python scripts/bench.py run --work /tmp/bench --shapes mistral-1b --modes cheap_embed --mergekit /tmp/mergekit
    python scripts/bench.py page --work /tmp/bench        # tables and plot into docs/benchmarks.md

The models are random (scripts/random_model.py) and made once. One run of each program is measured for its memory; then
they take turns, the page cache being in the same state before each run, and medians are compared. `raw` (see
raw_copy.py) copies the output's shards from the same ranges of the same files, on as many threads as there are
processors: `copy_file_range` into files whose room was set aside, and fsync. With `--backbones`, raymoe merges with
these backbones as well, in turn with the others:

    python scripts/bench.py run --work /tmp/bench --shapes mistral-1b --modes hidden --backbones linear
    python scripts/bench.py page --work /tmp/bench --tables backbones

Results are added to WORK/results.json, one entry per shape, mode and number of actors; a new one replaces an old one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
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
    """One shape, mode and number of actors: the programs, and what their runs took."""

    def __init__(self, arguments: argparse.Namespace, shape: str, mode: str, actors: int | None) -> None:
        self._cache, self._output = arguments.cache, arguments.work / "output"
        experts = models(arguments.work, shape, arguments.tokenizer)
        self._sources = [file for model in experts for file in model.glob("*.safetensors")]
        given = (experts, mode, arguments.prompts, arguments.words)
        config = write_config(arguments.work / "config.yaml", *given)
        copies = write_copies(arguments.work / "copies.json", config)
        options = [str(self._output), "-v", *(["--actors", str(actors)] if actors else [])]
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
        """The memory run of each program, then `runs` rounds of timed ones."""
        taken: dict[str, list[Run]] = {name: [] for name in self.commands}
        memory = {name: self._run(name, memory=True) for name in self.commands}
        output_bytes = sum(file.stat().st_size for file in self._output.iterdir())
        for _ in range(runs):
            for name in self.commands:
                taken[name].append(self._run(name))
                print(f"{self.shape} {self.mode} {name}: {taken[name][-1].seconds:.2f} s", flush=True)
        self._clear()
        return {
            "shape": self.shape,
            "mode": self.mode,
            "actors": self.actors,
            "cache": self._cache,
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "experts": EXPERTS,
            "output_bytes": output_bytes,
            "programs": {name: summary(taken[name], memory[name]) for name in self.commands},
        }

    def _run(self, name: str, *, memory: bool = False) -> Run:
        self._clear()
        os.sync()
        drop_from_cache(self._sources)
        if self._cache == "warm":
            read_into_cache(self._sources)
        return run_program(self.commands[name], steps=() if name in ("raw", "mergekit") else list(STEPS), memory=memory)

    def _clear(self) -> None:
        shutil.rmtree(self._output, ignore_errors=True)


def summary(runs: Sequence[Run], memory: Run) -> dict[str, Any]:
    """Medians over the runs; all of them are kept beside."""
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "phases": median_phases([phases(run) for run in runs]),
        "peak_pss": memory.peak_pss,
        "peak_anonymous": memory.peak_anonymous,
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
    key = ("shape", "mode", "actors", "cache", "processors")
    results = json.loads(path.read_text()) if path.exists() else []
    kept = [old for old in results if any(old[name] != result[name] for name in key)]
    path.write_text(json.dumps([*kept, result], indent=2) + "\n")


def run(arguments: argparse.Namespace) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shapes:
        for mode in arguments.modes:
            for actors in arguments.actors or [None]:
                contest = Contest(arguments, shape, mode, actors)
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
