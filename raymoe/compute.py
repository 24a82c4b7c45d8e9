"""How this process computes: on which device, with how many threads, and how much memory it has taken."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raymoe.errors import Problem

# A constant: the number of threads that share a sum changes its last bit, and must not depend on the number of actors.
COMPUTE_THREADS = 2
_CONTROL_GROUP = "/sys/fs/cgroup"


def device_problems(device: str | None) -> Iterator[Problem]:
    """Problems of a device: `cpu`, `cuda` or None (chosen automatically)."""
    if device not in (None, "cpu", "cuda"):
        yield Problem(where="--device", what=f"there is no device {device!r}", remedy="give cpu, cuda or auto")
    if device == "cuda" and choose_device(None) == "cpu":
        what = "torch sees no GPU here"
        yield Problem(where="--device cuda", what=what, remedy="leave it out to compute on the CPU")


def actor_device_problems(device: str | None, address: str | None, gpus_per_expert: float | None) -> Iterator[Problem]:
    """Problems of a device for the actors of a merge that are known before Ray runs. Without a cluster, actors run on
    this machine."""
    if device == "cuda" and gpus_per_expert == 0:
        what = "--gpus-per-expert 0 gives no GPU to any actor"
        yield Problem(where="--device cuda", what=what, remedy="leave out one of them")
        return
    ray: Any = sys.modules.get("ray")
    is_cluster = address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())
    yield from device_problems(None if is_cluster and device == "cuda" else device)


def choose_device(device: str | None) -> str:
    """`cpu` or `cuda`."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def limit_threads(count: int = COMPUTE_THREADS) -> None:
    """Let torch compute with a fixed number of threads (see COMPUTE_THREADS)."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def available_bytes(device: str) -> int:
    """Free memory: of the GPU, or of this machine within the limit of its control group."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    free = [_number_in("/proc/meminfo", "MemAvailable:") * 1024]
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        limit = int(Path(_CONTROL_GROUP, "memory.max").read_text())
        used = int(Path(_CONTROL_GROUP, "memory.current").read_text())
        free.append(limit - used + _number_in(f"{_CONTROL_GROUP}/memory.stat", "inactive_file"))
    return max(0, min(free))


def _number_in(file: str, name: str) -> int:
    """The number after a name in a file of the kernel."""
    for line in Path(file).read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    raise ValueError(f"{file} has no {name}")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
