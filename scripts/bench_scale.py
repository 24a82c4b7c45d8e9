"""Merges of up to terabytes between buckets of a simulated S3 server: phases, copies in flight, requests, memory.

    python scripts/bench_scale.py --shape l70x8 --nodes 1 3                      # 930 GB, on one and on three nodes
    python scripts/bench_scale.py --shape l70x8 --kill-at 0.5                    # and once killed, and resumed
    python scripts/bench_scale.py --shape l8x8 --pace 0.1 --set max_requests=64  # a tenth of all delays
    python scripts/bench_scale.py --table                                        # writes the tables of docs/scale.md

The server (simulated_s3.py) and the nodes of a Ray cluster run on this machine. A merge has `gate_mode: random`, so
that nothing is computed, and weights are copied by the server. Each merge is audited: every tensor has to lie over the
source range that it is a copy of. With `--kill-at` the driver of a second merge is killed (SIGKILL) when that share of
the copies is done, and the same command is run again.

Results are added to the --json file, one entry per shape, nodes, pace and settings; a new one replaces an old one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from scale_page import PAGE, entry_lines, update_page
from simulated_s3 import MODELS, OUTPUTS, Pace
from sparse_models import MIXTURES, Mixture

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from tests.chaos.watch import actor_processes  # noqa: E402
from tests.processes import kill  # noqa: E402
from tests.soak.cluster import Cluster, ray_cluster  # noqa: E402

# What the goals of docs/scale.md are stated for.
LATENCY_S, COPY_S, COMPLETE_S = 0.02, 1.0, 0.3
IDEAL_IN_FLIGHT = 64
_LOOK_EVERY_S, _POLL_S = 0.25, 0.05
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "simulated",
    "AWS_SECRET_ACCESS_KEY": "simulated",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "PYTHONPATH": str(ROOT),
}
Entry = dict[str, Any]


class Store:
    """The simulated server, as a process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def ask(self, what: str, *, post: bool = False) -> Any:
        request = urllib.request.Request(f"{self.url}/-/{what}", method="POST" if post else "GET")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as answer:
            return json.load(answer)


@contextmanager
def started_store(shape: str, pace: Pace) -> Iterator[Store]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(pace).items()]
    command = [sys.executable, str(ROOT / "scripts/simulated_s3.py"), "--mixture", shape, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the simulated server did not start")
            yield Store(process, url)
        finally:
            process.kill()


@contextmanager
def started_cluster(work: Path, nodes: int, cpus: int) -> Iterator[Cluster]:
    with ray_cluster(_ENVIRONMENT, work / "ray.log", cpus) as cluster:
        for _ in range(nodes - 1):
            cluster.add_worker(cpus)
        yield cluster


@dataclass
class Sample:
    """Seconds of processor time used so far, by the driver, the actors together, and the server."""

    at: float
    driver: float
    actors: float
    store: float


@dataclass
class Watch:
    """Looks at the processes of a merge: the peaks of their resident memory in bytes, and their processor time."""

    driver: int
    cluster: Cluster
    store: int
    driver_peak: int = 0
    actor_peaks: dict[int, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    cpu_of_actors: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def shares(self, start: float, end: float) -> dict[str, float]:
        """Processors that were used between two times, on average."""
        inside = [sample for sample in self.samples if start <= sample.at <= end]
        if len(inside) < 2 or (seconds := inside[-1].at - inside[0].at) <= 0:
            return {}
        first, last = inside[0], inside[-1]
        return {
            name: round((getattr(last, name) - getattr(first, name)) / seconds, 3)
            for name in ("driver", "actors", "store")
        }

    def _run(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            actors = [actor.pid for actor in actor_processes(self.cluster.pids)]
            self.driver_peak = max(self.driver_peak, peak_rss(self.driver))
            for pid in actors:
                self.actor_peaks[pid] = max(self.actor_peaks.get(pid, 0), peak_rss(pid))
                self.cpu_of_actors[pid] = max(self.cpu_of_actors.get(pid, 0.0), cpu_seconds(pid))
            used = cpu_seconds(self.driver), sum(self.cpu_of_actors.values()), cpu_seconds(self.store)
            self.samples.append(Sample(time.monotonic(), *used))


def peak_rss(pid: int) -> int:
    """What the kernel counts as resident at most, in bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


class Bench:
    """Merges of one shape on one cluster."""

    def __init__(self, options: argparse.Namespace, shape: str, store: Store, cluster: Cluster, work: Path) -> None:
        self._options, self._shape, self._mixture = options, shape, MIXTURES[shape]
        self._store, self._cluster, self._work = store, cluster, work
        self._names = itertools.count()
        self._env = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))}
        self._env |= {**_ENVIRONMENT, **cluster.environment}

    def merge(self) -> Entry:
        """An undisturbed merge."""
        command, output, result = self._command()
        self._store.ask("reset", post=True)
        process, watch = self._start(command)
        self._wait(process, watch)
        ended = time.monotonic()
        entry = self._entry(json.loads(result.read_text()), self._store.ask("stats"), watch, ended)
        timeline = self._store.ask("timeline")
        in_flight = {each["second"]: round(each["copy seconds"], 2) for each in timeline if "copy seconds" in each}
        return entry | {"copies_in_flight_by_second": in_flight, "audit": self._audit(output)}

    def killed_merge(self, share: float, undisturbed: Entry) -> Entry:
        """A merge whose driver is killed when that share of the copies is done, then the same command again."""
        command, output, result = self._command()
        self._store.ask("reset", post=True)
        process, watch = self._start(command)
        while self._store.ask("stats")["copies"] < share * undisturbed["copies"]:
            if process.poll() is not None:
                raise RuntimeError("the merge ended before it was killed")
            time.sleep(_POLL_S)
        kill(process)
        process.wait()
        watch.end()
        while actor_processes(self._cluster.pids):  # until Ray has ended them
            time.sleep(_POLL_S)
        before = self._store.ask("stats")
        self._store.ask("reset", post=True)
        began = time.monotonic()
        process, watch = self._start(command)
        self._wait(process, watch)
        ended = time.monotonic()
        after = self._store.ask("stats")
        requests = before["requests"] + after["requests"]
        return {
            "killed_at": share,
            "copies_before": before["copies"],
            "seconds": round(ended - began, 2),
            "phases": json.loads(result.read_text())["phases"],
            "first_copy_s": after["first_copy_s"],
            "copies_repeated": after["copies_repeated"],
            "requests": requests,
            "requests_repeated": round(requests / undisturbed["requests"] - 1, 4),
            "by_object_before": before["by_object"],
            "by_object_after": after["by_object"],
            "driver_bytes": watch.driver_peak,
            "audit": self._audit(output),
        }

    def _command(self) -> tuple[list[str], str, Path]:
        """The command, its output (bucket/prefix), and where the result is written."""
        number = next(self._names)
        output, config = f"{OUTPUTS}/merge-{number}", self._work / f"config-{number}.yaml"
        result = self._work / f"result-{number}.json"
        experts = [{"source_model": f"s3://{MODELS}/{model}"} for model in range(self._mixture.experts)]
        storage = {"endpoint": self._store.url, **self._options.set}
        content = {"base_model": f"s3://{MODELS}/0", "gate_mode": "random", "storage": storage, "experts": experts}
        config.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "raymoe", "merge", str(config), f"s3://{output}", "--quiet"]
        command += ["--out-shard-size", self._options.shard_size, "--result", str(result)]
        return command, output, result

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Watch]:
        with open(self._work / "driver.log", "ab") as log:
            process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log)
        return process, Watch(process.pid, self._cluster, self._store.process.pid)

    def _wait(self, process: subprocess.Popen[bytes], watch: Watch) -> None:
        status = process.wait()
        watch.end()
        if status:
            said = (self._work / "driver.log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the merge ended with {status}:\n{said}")

    def _audit(self, output: str) -> dict[str, Any]:
        found: dict[str, Any] = self._store.ask(f"audit?output={output}")
        if found["problems"]:
            raise RuntimeError("\n".join(["the merge is wrong:", *found["problems"][:20]]))
        return found

    def _entry(self, result: dict[str, Any], stats: dict[str, Any], watch: Watch, ended: float) -> Entry:
        """What is kept of an undisturbed merge, which ended at `ended`."""
        phases, operations, pace = result["phases"], stats["by_operation"], stats["pace"]
        shards_s = phases["shards"]["end_s"] - phases["shards"]["start_s"]
        copies, completes = operations["UploadPartCopy"], operations["CompleteUpload"]
        copy_s, complete_s = pace["latency"] + pace["copy_seconds"], pace["latency"] + pace["complete_seconds"]
        ideal = (copies * copy_s + completes * complete_s) / IDEAL_IN_FLIGHT
        began = ended - result["seconds"]
        return {
            **self._conditions(),
            "seconds": result["seconds"],
            "phases": {name: round(phase["end_s"] - phase["start_s"], 3) for name, phase in phases.items()},
            "ideal_shards_s": round(ideal, 2),
            "times_ideal": round(shards_s / ideal, 2) if ideal else None,
            "copies": stats["copies"],
            "copied_bytes": stats["bytes"].get("copied", 0),
            "mean_copies_in_flight": round(stats["copy_seconds"] / shards_s, 2),
            "most_copies_in_flight": stats["most_copies_in_flight"],
            "first_copy_s": stats["first_copy_s"],
            "requests": stats["requests"],
            "requests_per_gb": round(stats["requests"] / self._mixture.output_bytes * 1e9, 3),
            "most_requests_a_second": stats["most_requests_a_second"],
            "by_operation": operations,
            "by_object": stats["by_object"],
            "errors": stats["errors"],
            "bytes": stats["bytes"],
            "driver_bytes": watch.driver_peak,
            "actor_bytes": sorted(watch.actor_peaks.values()),
            "processors": watch.shares(began + phases["shards"]["start_s"], began + phases["shards"]["end_s"]),
        }

    def _conditions(self) -> Entry:
        mixture: Mixture = self._mixture
        return {
            "shape": self._shape,
            "nodes": self._options.on_nodes,
            "cpus_per_node": self._options.cpus,
            "pace": self._options.pace,
            "set": self._options.set,
            "shard_size": self._options.shard_size,
            "machine_processors": os.cpu_count(),
            "experts": mixture.experts,
            "source_tensors": mixture.source_tensors,
            "source_bytes": mixture.source_bytes,
            "output_tensors": len(mixture.output_shapes),
            "output_bytes": mixture.output_bytes,
            "source_file_sizes": mixture.source_file_sizes,
        }


def add_entry(path: Path, entry: Entry) -> None:
    """Add an entry to a file, in the place of an older one of the same conditions."""
    conditions = ("shape", "nodes", "cpus_per_node", "pace", "set", "shard_size")
    entries = json.loads(path.read_text()) if path.exists() else []
    others = [old for old in entries if any(old[name] != entry[name] for name in conditions)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*others, entry], indent=1) + "\n")


def run(options: argparse.Namespace, shape: str) -> Iterator[Entry]:
    """The entries of a shape, one per number of nodes."""
    pace = Pace(
        latency=LATENCY_S * options.pace,
        copy_seconds=COPY_S * options.pace,
        complete_seconds=COMPLETE_S * options.pace,
        copies_per_second=options.copies_per_second,
        copies_at_once=options.copies_at_once,
    )
    for nodes in options.nodes:
        options.on_nodes = nodes
        with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
            work = Path(folder)
            with started_store(shape, pace) as store, started_cluster(work, nodes, options.cpus) as cluster:
                bench = Bench(options, shape, store, cluster, work)
                entry = bench.merge()
                if options.kill_at is not None:
                    entry["killed"] = bench.killed_merge(options.kill_at, entry)
        yield entry


def setting(text: str) -> tuple[str, Any]:
    name, is_set, value = text.partition("=")
    if not is_set:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return name, yaml.safe_load(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=MIXTURES, default=[], help="the mixtures (sparse_models.py)")
    parser.add_argument("--nodes", nargs="+", type=int, default=[1], help="nodes of the cluster, a run for each")
    parser.add_argument("--cpus", type=int, default=2, help="processors that each node says it has")
    parser.add_argument("--pace", type=float, default=1.0, help="factor of all delays of the server")
    parser.add_argument("--copies-per-second", type=float, default=0.0, help="the server answers 503 above this rate")
    parser.add_argument("--copies-at-once", type=int, default=0, help="the server answers 503 above this number")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="of `storage`")
    parser.add_argument("--shard-size", default="5GB", help="as --out-shard-size")
    parser.add_argument("--kill-at", type=float, help="kill a second merge at this share of its copies; resume it")
    parser.add_argument("--json", type=Path, default=ROOT / "out/scale.json", help="file that results are added to")
    parser.add_argument("--table", action="store_true", help=f"put the file's tables into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    options.set = dict(options.set)
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was started is ended
    for shape in options.shape:
        for entry in run(options, shape):
            add_entry(options.json, entry)
            print("\n".join(entry_lines(entry)), flush=True)
    if options.table:
        update_page(json.loads(options.json.read_text()))


if __name__ == "__main__":
    main()
