"""What a merge may not leave behind: actors, placement groups, processes. And what Ray keeps on disk and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.chaos.watch import INTERNAL, actor_processes
from tests.cli.commands import files_below
from tests.processes import arguments, mentioning, with_words
from tests.soak.cluster import Cluster

__all__ = ["left_in_cluster", "left_of_own_ray", "machine"]

_PATIENCE_S = 30  # Ray ends the actors of a driver that was killed when it notices


def left_in_cluster(cluster: Cluster, output: str) -> list[str]:
    """What is still there of merges to this output when they had time to go."""
    return _after_a_while(lambda: _left(cluster, output))


def left_of_own_ray(folder: Path) -> list[str]:
    """Processes of a Ray that a command had started with its files in this folder."""
    return _after_a_while(lambda: [f"process left: {_name(process)}" for process in mentioning(str(folder))])


def _after_a_while(look: Callable[[], list[str]]) -> list[str]:
    end = time.monotonic() + _PATIENCE_S
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _left(cluster: Cluster, output: str) -> list[str]:
    import ray

    actors = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    processes = [*actor_processes(cluster.pids), *with_words("merge", output)]
    return [
        *(f"actor left: {name}" for name in actors if not name.startswith(INTERNAL)),
        *(f"placement group left: {group['name']}" for group in groups),
        *(f"process left: {_name(process)}" for process in processes),
    ]


def _name(process: psutil.Process) -> str:
    return f"{process.pid} {' '.join(arguments(process))[:80]}"


def machine(temps: Sequence[Path]) -> dict[str, int]:
    """Files in shared memory, and what Ray's folders hold: bytes in all, and files of spilled objects."""
    shared = Path("/dev/shm")
    files = [path for temp in temps for path in files_below(temp)]
    return {
        "shared memory files": len(list(shared.iterdir())) if shared.is_dir() else 0,
        "Ray folder bytes": sum(_size(path) for path in files),
        "spilled files": sum(1 for path in files if "spilled_objects" in str(path.parent)),
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
