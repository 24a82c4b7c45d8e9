"""Gate passes that leave several times more in Ray's object store than it holds.

Where Ray may spill objects to the disk it does, and the merge goes through. Where it may not, because the disk is full
too, the merge ends with one message, and goes on when the same command is run on a cluster that has the room.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.cases import FULL_STORE, ChaosCase
from tests.chaos.leftovers import left_in_cluster
from tests.chaos.runs import Outcome, Runner, keep_log, verdict_of
from tests.soak.cases import MergeCase
from tests.soak.cluster import ray_cluster
from tests.soak.compare import JOURNAL
from tests.soak.world import World

__all__ = ["run_full_store"]

_STORE_BYTES = 80_000_000  # about the least that Ray starts with
_CPUS = 3
# Ray spills nothing to a disk that is fuller than this: to none, then.
_NO_ROOM = {"RAY_local_fs_capacity_threshold": "0.0001"}


def run_full_store(world: World, logs: Path, timeout_s: float) -> Iterator[Outcome]:
    """With room to spill, and without."""
    for number, variables in enumerate(({}, _NO_ROOM)):
        merge = MergeCase(number=number, seed=0, variant=FULL_STORE, direction="local to local", server=None, actors=2)
        case = ChaosCase(kind="store", merge=merge, moments=(), way="command")
        reference, began, outcome = world.reference(merge), time.monotonic(), Outcome(case=case)
        place = world.place(merge)
        config = world.write_config(merge, None, world.folder / f"configs/{Path(place.name).name}.yaml")
        with ray_cluster(variables, world.folder / "store.log", _CPUS, store_bytes=_STORE_BYTES) as small:
            runner = Runner(world.on(small), case, config, place, outcome, timeout_s)
            last = runner.run()
        with_room = Runner(world, case, config, place, outcome, timeout_s)
        outcome.verdict = verdict_of(with_room, last, place, reference, outcome)
        outcome.left += left_in_cluster(world.cluster, place.name)
        outcome.left += [f"journal left: {name}" for name in place.files() if name.startswith(JOURNAL)]
        outcome.seconds = time.monotonic() - began
        if outcome.failed:
            runner.story += with_room.story
            outcome.log = keep_log(logs, outcome, runner.story)
        place.remove()
        yield outcome
