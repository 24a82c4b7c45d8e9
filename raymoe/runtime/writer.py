"""The writer: takes the shards that other nodes send (stream.py) and writes them to a local folder of its own node.

One actor of a merge, started on the coordinator's node when an expert actor turns out not to see the output. It holds
no CPU of Ray's: a head that is to do no work still has to write what only it can.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymoe.compute import peak_rss_bytes
from raymoe.errors import Problem, ProblemReport
from raymoe.runtime.at_work import AtWork
from raymoe.runtime.process import set_up_process, without_secrets
from raymoe.runtime.stream import arrivals
from raymoe.runtime.worker import Status, Whereabouts, node_words
from raymoe.sources.types import SourceFile
from raymoe.storage.local import LocalOutput
from raymoe.storage.output import ShardJob

__all__ = ["ShardWriter", "start_writer"]

_SHARDS_AT_ONCE = 8
_RESTARTS = 2


class ShardWriter:
    """Writes what other nodes send, as a plain class; `start_writer` makes it an actor."""

    def __init__(self, output: str, run: str) -> None:
        set_up_process()
        self._output = LocalOutput(Path(output), run)
        self._lock = threading.Lock()
        self._bytes_kept = 0
        self._at_work = AtWork()

    def where(self, files: Sequence[SourceFile] = ()) -> Whereabouts:
        """As an expert actor's; a writer reads no sources."""
        return Whereabouts(
            pid=os.getpid(),
            node=node_words(),
            node_id="",
            output_visible=self._output.is_reachable(),
            device="cpu",
            missing=frozenset(file.location for file in files),
        )

    def receive(self, sender: Any, job: ShardJob) -> Any:
        """Write the shard that the actor `sender` sends; None if an earlier run left it whole.

        Raises SenderLost, what went wrong at the sender, or what went wrong here.
        """
        if not self._output.is_reachable():
            what = f"the output {self._output.location} is not the folder of this run on {node_words()}"
            remedy = "name a folder of the node that the merge is started on, or a URL"
            raise ProblemReport([Problem(where="output", what=what, remedy=remedy)])
        name, size = job.shard.file_name, job.shard.nbytes
        with self._at_work.on(f"receive {name}", job.name) as work:

            def progress(written: int, copied: int) -> None:
                work.moved()

            if self._output.finished(name, size, progress) is not None:
                with self._lock:
                    self._bytes_kept += size
                return None
            return self._output.write(name, arrivals(sender, job), expected=size, progress=progress)

    def status(self) -> Status:
        """What it has done so far; bytes written are counted by those who send them."""
        with self._lock:
            return Status(
                bytes_written=0,
                bytes_copied_by_store=0,
                bytes_kept=self._bytes_kept,
                gate_tokens=0,
                gate_tokens_planned=0,
                readings_counted=0,
                store_retries=0,
                store_requests=0,
                moves=self._at_work.moves,
                peak_rss_bytes=peak_rss_bytes(),
                peak_gpu_bytes=0,
                busy_with=self._at_work.labels,
            )


def start_writer(output: str, run: str) -> Any:
    """The writer as an actor of this node; it may not be up yet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    groups = {"receive": "write", "where": "control", "status": "control"}
    methods = {
        name: ray.method(concurrency_group=group)(without_secrets(getattr(ShardWriter, name)))
        for name, group in groups.items()
    }
    remote = ray.remote(concurrency_groups={"write": _SHARDS_AT_ONCE, "control": 1})(
        type("ShardWriter", (ShardWriter,), methods)
    )
    here = ray.get_runtime_context().get_node_id()
    return remote.options(
        name=f"raymoe writer of {output} {run[:6]}",
        num_cpus=0,
        max_restarts=_RESTARTS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    ).remote(output, run)
