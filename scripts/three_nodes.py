"""A merge over three nodes that share no filesystem: the base on one, an expert on each of the others.

    python scripts/three_nodes.py                 # prints the table: peak memory by node, and whether bytes are equal
    python scripts/three_nodes.py --page          # and puts it into docs/reliability.md
    python scripts/three_nodes.py --depths 4 16   # other sizes

Three nodes of one cluster run on this machine, each in a mount namespace in which the other nodes' folders do not
exist. The merge is started beside the base, once with a folder of that node as its output, once with a bucket; each
result is compared file by file with a merge on one node that sees everything. Two depths show what grows with a model.
Memory is what the kernel counted as resident at most (VmHWM), pages of Ray's store included, for the driver and for the
processes of Ray's actors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from pages import put_between
from random_model import Shape, write_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from tests.cli.commands import command, hashes  # noqa: E402
from tests.object_store.servers import start_server  # noqa: E402
from tests.processes import arguments  # noqa: E402
from tests.runtime.nodes import Nodes, can_hide_folders  # noqa: E402

PAGE, MARK = ROOT / "docs/reliability.md", "<!-- table: scripts/three_nodes.py -->"
SHAPE = Shape(hidden=768, intermediate=3072, layers=8, heads=12, kv_heads=4, vocab=16384)
NODES = ("head", "a", "b")
FLAGS = ("--no-write-model-card", "--out-shard-size", "60M")
BUCKET = "merges"
_LOOK_EVERY_S = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
    """A merge: what it wrote where, whether all files are equal to the other merge's, peaks by (node, process)."""

    output: str
    nbytes: int
    equal: bool
    seconds: float
    peaks: dict[tuple[str, str], int]


class Watch:
    """Looks at the processes of nodes, and keeps the peaks of their resident memory."""

    def __init__(self, nodes: Nodes, driver: int) -> None:
        self.peaks: dict[tuple[str, str], int] = {}
        self._nodes, self._driver = nodes, driver
        self._over = threading.Event()
        self._known = {each.pid for node in NODES for each in nodes.workers(node)}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            self._keep("head", "driver", self._driver)
            for node in NODES:
                for process in self._nodes.workers(node):
                    name = "".join(arguments(process)[:1])
                    kind = "writer" if "ShardWriter" in name or "receive" in name else "actor"
                    if name and process.pid not in self._known and "IDLE" not in name:
                        self._keep(node, kind, process.pid)

    def _keep(self, node: str, kind: str, pid: int) -> None:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("VmHWM:"):
                self.peaks[node, kind] = max(self.peaks.get((node, kind), 0), int(line.split()[1]) * 1024)


@contextmanager
def world(work: Path, depth: int, variables: dict[str, str]) -> Iterator[tuple[Nodes, Path, dict[str, str]]]:
    """Nodes with their models, the config, and the files of the merge on one node."""
    nodes = Nodes(work / f"depth-{depth}", variables)
    shape = dataclasses.replace(SHAPE, layers=depth)
    models = [nodes.path(node) / "model" for node in NODES]
    for seed, model in enumerate(models):
        write_model(model, shape, seed=seed, tokenizer=ROOT / "models/SmolLM2-135M-Instruct")
    experts = [{"source_model": str(model), "positive_prompts": ["a"]} for model in models[1:]]
    config = nodes.path("head") / "config.yaml"
    config.write_text(yaml.safe_dump({"base_model": str(models[0]), "gate_mode": "random", "experts": experts}))
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    merged = work / "one-node"
    subprocess.run(command("merge", config, merged, *FLAGS, "--quiet"), env=env, check=True)
    expected = hashes(merged)
    shutil.rmtree(merged)
    with nodes:
        for node in NODES:
            nodes.add(node, cpus=1)
        yield nodes, config, expected
    shutil.rmtree(nodes.folder)


def merge(nodes: Nodes, config: Path, output: str) -> tuple[float, dict[tuple[str, str], int]]:
    """Seconds and peaks of a merge that is started beside the head."""
    began = time.monotonic()
    process = nodes.run("head", command("merge", config, output, *FLAGS, "--quiet"), stderr=subprocess.PIPE, text=True)
    watch = Watch(nodes, process.pid)
    said = process.communicate()[1]
    watch.end()
    if process.returncode:
        raise SystemExit(f"the merge to {output} failed:\n{said}")
    return time.monotonic() - began, watch.peaks


def rows(work: Path, depth: int) -> Iterator[Row]:
    with start_server("moto", work / f"moto-{depth}") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        with world(work, depth, server.environment) as (nodes, config, expected):
            out = nodes.path("head") / "out"
            seconds, peaks = merge(nodes, config, str(out))
            size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
            yield Row("a folder of the head", size, hashes(out) == expected, seconds, peaks)
            shutil.rmtree(out)
            seconds, peaks = merge(nodes, config, f"s3://{BUCKET}/out")
            got = work / "downloaded"
            for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
                (got / item["Key"]).parent.mkdir(parents=True, exist_ok=True)
                with open(got / item["Key"], "wb") as file:
                    shutil.copyfileobj(client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"], file)
            found = hashes(got / "out")
            # The record holds the checksums of its own kind of output.
            equal = found.keys() == expected.keys() and all(
                found[name] == expected[name] for name in found if name != "raymoe.json"
            )
            shutil.rmtree(got)
            yield Row("a bucket", size, equal, seconds, peaks)


def table(found: list[tuple[int, Row]]) -> str:
    kinds = [("head", "driver"), ("head", "writer"), *((node, "actor") for node in NODES)]
    head = ["output", "written", "equal", "s", *(f"{node}: {kind}" for node, kind in kinds)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for depth, row in found:
        peaks = [f"{row.peaks[kind] / 1e6:.0f} MB" if kind in row.peaks else "-" for kind in kinds]
        size = f"{row.nbytes / 1e6:,.0f} MB ({depth} layers)"
        lines.append(
            f"| {row.output} | {size} | {'yes' if row.equal else 'NO'} | {row.seconds:.0f} | {' | '.join(peaks)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16], help="layers of the models, a run for each")
    parser.add_argument("--work", type=Path, help="folder for models and outputs (some GB)")
    parser.add_argument("--page", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if not can_hide_folders():
        raise SystemExit("this user may not mount: the nodes could not be kept from seeing each other's folders")
    with tempfile.TemporaryDirectory(prefix="three-nodes-", dir=options.work) as folder:
        found = [(depth, row) for depth in options.depths for row in rows(Path(folder), depth)]
    text = table(found)
    print(text)
    if options.page:
        put_between(PAGE, MARK, text)
    if not all(row.equal for _, row in found):
        raise SystemExit("bytes differ")


if __name__ == "__main__":
    main()
