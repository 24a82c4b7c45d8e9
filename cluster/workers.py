"""Asks a cluster's autoscaler for workers and waits until they are up: `ray job submit -- python workers.py 4`.

A merge waits for the autoscaler's first node, but looks for GPUs when it begins: a cluster that has scaled down to its
head is brought up first, and `python workers.py 0` lets the workers go again, after the cluster's idle time.
"""

from __future__ import annotations

import argparse
import time

import ray
from ray.autoscaler.sdk import request_resources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="workers that are wanted; 0 takes an earlier request back")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that each has to have (1)")
    parser.add_argument("--gpus", type=float, default=1, help="GPUs that each has to have (1)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds to wait for them (900)")
    wanted = parser.parse_args()
    ray.init(logging_level="warning")
    request_resources(bundles=[{"CPU": wanted.cpus, "GPU": wanted.gpus}] * wanted.count)
    deadline = time.monotonic() + wanted.timeout
    while (up := _up(wanted.cpus, wanted.gpus)) < wanted.count:
        if time.monotonic() > deadline:
            raise SystemExit(f"after {wanted.timeout:.0f} s {up} of {wanted.count} workers are up; see `ray status`")
        time.sleep(2)
    print(f"{up} workers with {wanted.cpus:g} CPUs and {wanted.gpus:g} GPUs are up")


def _up(cpus: float, gpus: float) -> int:
    """Nodes that have so much."""
    alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return sum(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in alive)


if __name__ == "__main__":
    main()
