"""Peak memory of a merge's processes when its output is in an object store, for an output of 3 GB in few large shards.

    python scripts/measure_storage.py --page    # prints the table, and puts it into docs/object-storage.md

The store is the S3 gateway of JuiceFS, started here (tests/object_store/servers.py). Peak memory is what the kernel
counts as resident at most (`ru_maxrss`), as a merge reports it for the driver and for each actor. An idle actor, which
has imported what it needs and looked at its output, is measured beside them; an actor may use 400 MB more than that.
All experts are one model: what is measured does not depend on the values of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pages import put_between
from random_model import Shape, write_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE, MARK = ROOT / "docs/object-storage.md", "<!-- table: scripts/measure_storage.py -->"
SHAPE = Shape(hidden=2048, intermediate=8192, layers=7, heads=16, kv_heads=4, vocab=4096)
EXPERTS = 4
LIMIT_BYTES = 400_000_000
PART_BYTES = 16 << 20

# The merge in a process of its own, since a peak is a process's for good.
RUN = """
import json, sys
import ray, raymoe
from raymoe.planning import MergeOptions
from raymoe.runtime.actor_plan import ActorPlan
from raymoe.runtime.actors import expert_actors
from raymoe.runtime.placement import ActorPlacement
from raymoe.runtime.settings import RuntimeSettings

config, output = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
settings = RuntimeSettings(verbosity=-1)
one = {"gpus": 0.0, "readers": 1, "layers_at_once": 1, "shards_at_once": 1, "runs_model": False}
slots = ActorPlan(placements=(ActorPlacement(),), **one)
with expert_actors(slots, output, settings) as (actor,):
    ray.get(actor.describe.remote())
    idle = ray.get(actor.status.remote()).peak_rss_bytes
options = MergeOptions(max_shard_bytes=5_000_000_000)
result = raymoe.merge(config, output, options, settings=settings, allow_all_same=True)
print(json.dumps({"idle": idle, "driver": result.peak_driver_bytes, "actors": result.peak_actor_bytes,
                  "output": sum(f.size for f in result.files), "copied": result.bytes_copied_by_store,
                  "seconds": result.seconds}))
"""


def upload(folder: Path, url: str) -> None:
    """All files of a folder as objects below `url`, in parts."""
    from raymoe.object_store.options import StorageOptions
    from raymoe.object_store.s3_store import S3Store

    store = S3Store(StorageOptions())
    for path in folder.iterdir():
        target, parts = f"{url}/{path.name}", []
        upload_id = store.create_upload(target)
        with open(path, "rb") as file:
            while data := file.read(PART_BYTES):
                parts.append(store.upload_part(target, upload_id, len(parts) + 1, data))
        store.complete_upload(target, upload_id, parts)


def measure(work: Path, model: str, output: str, options: dict[str, Any]) -> dict[str, Any]:
    """Merge EXPERTS times the same model; bytes at the peak and bytes moved."""
    config = work / "config.yaml"
    experts = [{"source_model": model, **options} for _ in range(EXPERTS)]
    config.write_text(yaml.safe_dump({"base_model": model, "gate_mode": "random", "experts": experts}))
    run = [sys.executable, "-c", RUN, str(config), output]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the merge to {output} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(way: str, result: dict[str, Any]) -> str:
    actors = ", ".join(f"{peak / 1e6:.0f} MB" for peak in result["actors"])
    copied = result["copied"] / result["output"]
    return (
        f"| {way} | {result['output'] / 1e9:.2f} GB | {copied:.1%} | {result['driver'] / 1e6:.0f} MB | {actors} "
        f"| {result['idle'] / 1e6:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out/storage", help="16 GB are needed there for a while")
    parser.add_argument("--page", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    from tests.object_store.servers import start_juicefs

    model = arguments.work / "model"
    write_model(model, SHAPE)
    lines = ["| merge | output | copied by the store | driver | actors | an idle actor |", "|---|---|---|---|---|---|"]
    too_much = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder, start_juicefs(Path(folder)) as server:
        os.environ.update(server.environment)
        server.client().create_bucket(Bucket="measure")
        remote = "s3://measure/model"
        upload(model, remote)
        noise = {"noise_scale": 0.001}
        ways: list[tuple[str, str, dict[str, Any]]] = [
            ("S3 to S3, weights as they are", remote, {}),
            ("local to S3, weights as they are", str(model), {}),
            ("S3 to S3, experts with noise", remote, noise),
        ]
        for number, (way, source, options) in enumerate(ways):
            result = measure(arguments.work, source, f"s3://measure/merged-{number}", options)
            lines.append(row(way, result))
            print(lines[-1], f"  ({result['seconds']:.0f} s)", flush=True)
            too_much += [way for peak in result["actors"] if peak - result["idle"] > LIMIT_BYTES]
    shutil.rmtree(model)
    if arguments.page:
        put_between(PAGE, MARK, "\n".join(lines))
    print("\n".join(lines))
    if too_much:
        raise SystemExit(f"an actor used more than {LIMIT_BYTES / 1e6:.0f} MB beside its imports: {too_much}")


if __name__ == "__main__":
    main()
