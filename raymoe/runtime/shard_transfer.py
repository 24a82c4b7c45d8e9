"""Sends a shard from the node that has its sources to the node that has the output, if these are two nodes.

    sender, an expert actor                     receiver, the writer beside the output
    shard_chunks -> split_pieces --Ray's store--> arrivals -> LocalOutput.write: part, checksum, fsync, rename, journal

The receiver pulls. The sender waits while `PIECES_AHEAD` pieces have not been taken, so that neither side holds more
than a few pieces per shard, however large it is. Pieces are numpy arrays: Ray copies each into its store once, and the
receiver reads it there in place. The sender does all computation (casts, LoRA, noise). If either side dies, the
half-written part is removed, and the shard is done again.

For the scheduler, this is a `ShardMethod`, `SendToWriter`, with the writer as its helper. The writer is one actor per
merge. It starts on the coordinator's node when an expert actor turns out not to see the output. It reserves no CPU in
Ray: a head node that takes no work must still write what only it can write.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.compute import peak_rss_bytes
from raymoe.errors import MergeFailed, Problem, ProblemReport, RaymoeError
from raymoe.planning.owner import Owner
from raymoe.runtime.actor_pool import Helper
from raymoe.runtime.actor_process import set_up_process, without_secrets
from raymoe.runtime.actor_status import ActorInfo, Status, Working, WorkKind, node_name
from raymoe.runtime.job_activity import ActiveJobs
from raymoe.runtime.jobs import PeerLost
from raymoe.runtime.ray_errors import CallFailure, cause_of, classify_failure, first_line
from raymoe.runtime.shard_jobs import ShardMethod, task_name
from raymoe.sources.facts import SourceFile
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.protocol import Output, ShardJob
from raymoe.storage.source_reader import CHUNK_BYTES, LOCAL_CHUNK_BYTES

PIECE_BYTES = CHUNK_BYTES
PIECES_AHEAD = 4  # per shard: produced, and not yet taken by the receiver
_PREFETCHED = 2  # taken by the receiver, and in transfer to its node while an earlier one is written
_SHARDS_AT_ONCE = 8
_RESTARTS = 2


class SendToWriter(ShardMethod):
    """An actor sends a shard to the writer of a folder. The actor need not see the folder."""

    def __init__(self, target: Output, names: Mapping[Owner, str]) -> None:
        """`names` are the shard owners' names in Ray's dashboard."""
        self._names = names
        # `target.run` is set only when the run begins.
        self.helper = Helper(
            "the actor that writes to the output", lambda: _start_writer(target.location.text, target.run)
        )

    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        return helper.receive.options(name=task_name("receive", job, self._names)).remote(actor, job)


def split_pieces(chunks: Iterable[memoryview], size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """A stream of `size` bytes in pieces of `PIECE_BYTES`. A piece is valid until the next one is requested."""
    buffer = np.empty(min(PIECE_BYTES, size), np.uint8)
    filled = 0
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            count = min(len(chunk) - at, len(buffer) - filled)
            buffer[filled : filled + count] = np.frombuffer(chunk, np.uint8, count, at)
            at, filled = at + count, filled + count
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def receive_chunks(sender: Any, job: ShardJob) -> Iterator[memoryview]:
    """The bytes of a shard from `sender`, in chunks that stay in the processor's cache while they are written.

    Raises the sender's error, or PeerLost if the sender was lost.
    """
    import ray
    from ray.exceptions import RayError

    try:
        stream = sender.send_shard.options(name=f"send {job.shard.file_name}").remote(job)
        try:
            for reference in _prefetch(stream):
                piece = memoryview(ray.get(reference))
                for start in range(0, len(piece), LOCAL_CHUNK_BYTES):
                    yield piece[start : start + LOCAL_CHUNK_BYTES]
        finally:
            # Ray ends a waiting sender only if it is cancelled. A sender with a dropped stream would run on.
            ray.cancel(stream)
    except RayError as error:
        raise sender_error(error, job.shard.file_name) from error


def sender_error(error: Exception, file_name: str) -> Exception:
    """The error to raise for a failed stream: PeerLost, or the sender's own error."""
    from ray.exceptions import RayError, RayTaskError

    if not isinstance(error, RayTaskError):
        return PeerLost(first_line(error))
    cause = cause_of(error)
    if isinstance(cause, RaymoeError):
        return cause
    if not isinstance(cause, RayError):
        return MergeFailed(f"{file_name}: {type(cause).__name__}: {cause}")
    # LOST: merged matrices of the backbone, which the sender fetches.
    is_final = classify_failure(cause) in (CallFailure.FULL, CallFailure.FINAL, CallFailure.LOST)
    return cause if is_final else PeerLost(first_line(cause))


def _prefetch(stream: Any) -> Iterator[Any]:
    """The references of a stream in order; the next ones are fetched to this node meanwhile."""
    import ray

    taken: deque[Any] = deque()
    for reference in stream:
        ray.wait([reference], timeout=0, fetch_local=True)
        taken.append(reference)
        if len(taken) > _PREFETCHED:
            yield taken.popleft()
    while taken:
        yield taken.popleft()


class ShardWriter:
    """Writes shards that other nodes send. A plain class; `_start_writer` makes it an actor."""

    def __init__(self, output: str, run: str) -> None:
        set_up_process()
        self._output = LocalOutput(Path(output), run)
        self._lock = threading.Lock()
        self._bytes_kept = 0
        self._active_jobs = ActiveJobs()

    def describe(self, files: Sequence[SourceFile] = ()) -> ActorInfo:
        """The same as an expert actor's; a writer reads no sources."""
        return ActorInfo(
            pid=os.getpid(),
            node=node_name(),
            node_id="",
            output_visible=self._output.is_reachable(),
            device="cpu",
            missing=frozenset(file.location for file in files),
        )

    def receive(self, sender: Any, job: ShardJob) -> Any:
        """Write the shard that the actor `sender` sends; None if an earlier run completed it.

        Raises PeerLost, the sender's error, or an error of this writer.
        """
        if not self._output.is_reachable():
            what = f"the output {self._output.location} is not the folder of this run on {node_name()}"
            remedy = "name a folder of the node that the merge is started on, or a URL"
            raise ProblemReport([Problem(where="output", what=what, remedy=remedy)])
        name, size = job.shard.file_name, job.shard.nbytes
        with self._active_jobs.track(Working(WorkKind.RECEIVE, (name,)), job.name) as work:

            def progress(written: int, copied: int) -> None:
                work.heartbeat()

            if self._output.finished(name, size, progress) is not None:
                with self._lock:
                    self._bytes_kept += size
                return None
            return self._output.write(name, receive_chunks(sender, job), expected=size, progress=progress)

    def status(self) -> Status:
        """What it has done so far. Written bytes are counted by the senders."""
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
                heartbeats=self._active_jobs.heartbeats,
                peak_rss_bytes=peak_rss_bytes(),
                peak_gpu_bytes=0,
                busy_with=self._active_jobs.busy_with,
            )


def _start_writer(output: str, run: str) -> Any:
    """The writer as an actor of this node; it may not be up yet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    groups = {"receive": "write", "describe": "control", "status": "control"}
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
