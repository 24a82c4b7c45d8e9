"""The expert actor's code, as a plain class: it can be run and tested without Ray.

An actor serves one expert at a time. Its three kinds of call run side by side (Ray's concurrency groups): `gates` reads
the expert's prompts on the device, `write` writes shards, `control` answers questions while the other two work. Calls
may be repeated after a death: a shard that is already whole is found in the journal and not written again.

Torch is imported by `capture` and `layer_rows` alone, for modes that run a model.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from raymoe.errors import Problem, ProblemReport
from raymoe.gates.capture import MemberLayer
from raymoe.gates.layer_rows import LayerRows
from raymoe.objects.store import process_counters
from raymoe.planning.types import GatePlan, GatePrompts
from raymoe.runtime.memory import peak_rss_bytes
from raymoe.runtime.process import let_gates_go_first, limit_threads, set_up_process
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.stream import pieces_of
from raymoe.sources.local import stat_file
from raymoe.sources.types import SourceFile, TensorEntry
from raymoe.storage.output import ShardJob, open_output
from raymoe.storage.reader import SourceReader
from raymoe.storage.spool import GATES, SHARDS, Spool
from raymoe.storage.stream import different_tensors, shard_chunks

__all__ = ["GATES_OF", "ExpertWorker", "Status", "Whereabouts", "Working", "node_words"]

GATES_OF = "gates of "  # how `Status.busy_with` names the reading of prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What an actor has done so far."""

    bytes_written: int
    bytes_copied_by_store: int
    bytes_kept: int
    gate_tokens: int
    store_retries: int
    peak_rss_bytes: int
    peak_gpu_bytes: int
    busy_with: tuple[str, ...]


class Whereabouts(TypedDict):
    """What an actor says of itself when it comes up: its process, its node (in words, and by Ray's id), whether it sees
    the output, what it computes on, and which of the files that it was asked about it can't read."""

    pid: int
    node: str
    node_id: str
    output_visible: bool
    device: str
    missing: frozenset[str]


class ExpertWorker:
    """Works for one expert at a time: gate rows on its device, shards to the output."""

    def __init__(self, output: str, settings: RuntimeSettings, run: str = "") -> None:
        set_up_process()
        self._settings = settings
        self._output = open_output(output, settings.storage, run)
        self._spool = Spool()
        self._lock = threading.Lock()
        self._bytes_written = self._bytes_copied = self._bytes_kept = self._gate_tokens = 0
        self._busy: list[str] = []

    def where(self, files: Sequence[SourceFile] = ()) -> Whereabouts:
        """Where this actor is, and which of some local files it can't read (those of another size included)."""
        return Whereabouts(
            pid=os.getpid(),
            node=node_words(),
            node_id=_node_id(),
            output_visible=self._output.is_reachable(),
            device="cuda:0" if self._has_gpu() else "cpu",
            missing=frozenset(f.location for f in files if (found := stat_file(f.location)) is None or found != f),
        )

    def embedding_rows(self, gates: GatePlan, members: Sequence[GatePrompts]) -> tuple[npt.NDArray[np.float32], ...]:
        """Router row (hidden,) of each of some experts, in the mode that looks at token embeddings alone."""
        from raymoe.gates.embeddings import embedding_gate_rows

        with self._working(_gates_of(members)), self._reader() as reader:
            remote_code = self._settings.trust_remote_code
            return tuple(embedding_gate_rows(gates, each, reader, trust_remote_code=remote_code) for each in members)

    def capture(
        self,
        gates: GatePlan,
        members: Sequence[GatePrompts],
        experts: int,
        also_written: Sequence[TensorEntry] = (),
        later: Sequence[TensorEntry] = (),
    ) -> Iterator[MemberLayer | None]:
        """What the prompts of some of `experts` experts leave at a layer, by expert, one layer after the other; then
        None, for the caller to see the end by. Ray stores each as it comes: one layer's are held here.

        `also_written`: tensors of objects that shards take too; what this actor reads of them for both is read once.
        `later`: the same of experts whose prompts are still waiting.
        """
        # Before torch is imported, which shards do not wait for.
        self._spool.expect((*also_written, *later), GATES, SHARDS)
        try:
            yield from self._captured_layers(gates, members, experts)
        finally:
            self._spool.forget(also_written, GATES)
        yield None

    def _captured_layers(self, gates: GatePlan, members: Sequence[GatePrompts], experts: int) -> Iterator[MemberLayer]:
        from raymoe.gates.capture import capture_layers

        device = self._device()
        if gates.quantise:
            from raymoe.gates.quantise import check_quantise

            check_quantise(gates.quantise, device)
        limit_threads()
        with self._working(_gates_of(members)), self._reader(GATES) as reader:
            layers = capture_layers(
                gates,
                members,
                reader,
                members=experts,
                device=device,
                trust_remote_code=self._settings.trust_remote_code,
                layer_done=self._count_tokens,
            )
            for layer in layers:
                yield from layer

    def layer_rows(self, mode: str, experts: int, *members: MemberLayer) -> LayerRows:
        """The rows of one layer out of what all members' prompts left there: first the experts, then shared ones."""
        from raymoe.gates.layer_rows import layer_rows

        limit_threads(1)
        with self._working("routers"):
            return layer_rows(mode, members[:experts], members[experts:], self._device())

    def write_shard(self, job: ShardJob) -> Any:
        """Write a shard, or its part of one; the result is for the output's `complete`."""
        self._check_output()
        let_gates_go_first()
        with self._working(job.shard.file_name), self._reading(job) as reader:
            result = self._output.do(job, reader, self._add_bytes)
        if result is None:  # an earlier run left it whole
            with self._lock:
                self._bytes_kept += job.shard.nbytes
        return result

    def send_shard(self, job: ShardJob) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of a shard in order, for a writer on the output's node. A piece is valid until the next."""
        let_gates_go_first()
        with self._working(job.shard.file_name), self._reading(job) as reader:
            for piece in pieces_of(shard_chunks(job.shard, reader), job.shard.nbytes):
                yield piece
                self._add_bytes(len(piece))

    def compare_shard(self, job: ShardJob, written: Mapping[str, TensorEntry]) -> list[str]:
        """Names of the shard's tensors whose bytes in the output differ from what the sources give."""
        with self._working(job.shard.file_name), self._reading(job) as reader:
            return different_tensors(job.shard.parts, written, reader, progress=self._add_bytes)

    def status(self) -> Status:
        gpu = 0
        if sys.modules.get("torch") is not None:
            import torch

            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        with self._lock:
            return Status(
                bytes_written=self._bytes_written,
                bytes_copied_by_store=self._bytes_copied,
                bytes_kept=self._bytes_kept,
                gate_tokens=self._gate_tokens,
                store_retries=process_counters().retries,
                peak_rss_bytes=peak_rss_bytes(),
                peak_gpu_bytes=gpu,
                busy_with=tuple(self._busy),
            )

    def _has_gpu(self) -> bool:
        """Whether Ray gave this actor one. Asked without torch, which takes seconds to import."""
        return self._settings.device != "cpu" and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _device(self) -> str:
        if not self._has_gpu():
            return "cpu"
        import torch

        if self._settings.device == "cuda" and not torch.cuda.is_available():
            what = f"Ray gives a GPU to an actor on {node_words()}, and torch sees none there"
            remedy = "install a torch for that GPU and its driver, or leave it out to compute on CPUs"
            raise ProblemReport([Problem(where="--device cuda", what=what, remedy=remedy)])
        return "cuda:0" if torch.cuda.is_available() else "cpu"

    def _check_output(self) -> None:
        if not self._output.is_reachable():
            what = f"the output {self._output.location} is no longer that of this run on {node_words()}"
            remedy = "see whether another merge has taken it over, and whether its filesystem is still there"
            raise ProblemReport([Problem(where="output", what=what, remedy=remedy)])

    def _reader(self, name: str = SHARDS) -> SourceReader:
        return SourceReader(self._settings.hub, self._settings.storage, spool=self._spool, name=name)

    @contextmanager
    def _reading(self, job: ShardJob) -> Iterator[SourceReader]:
        """A reader for a shard; what other shards are made of too is kept for those that this actor will do."""
        self._spool.expect(job.shared, job.name)
        self._spool.expect(job.later, SHARDS)
        self._spool.forget(set(job.shared).difference(job.later), SHARDS)
        try:
            with self._reader(job.name if job.shared else SHARDS) as reader:
                yield reader
        finally:
            self._spool.forget(job.shared, job.name)

    def _add_bytes(self, written: int, copied: int = 0) -> None:
        with self._lock:
            self._bytes_written += written
            self._bytes_copied += copied

    def _count_tokens(self, count: int) -> None:
        with self._lock:
            self._gate_tokens += count

    def _working(self, on: str) -> Working:
        return Working(self._busy, self._lock, on)


def _gates_of(members: Sequence[GatePrompts]) -> str:
    return f"{GATES_OF}{', '.join(member.owner for member in members)}"


class Working:
    """Names what a call works on, for the time that it does."""

    def __init__(self, busy: list[str], lock: threading.Lock, on: str) -> None:
        self._busy, self._lock, self._on = busy, lock, on

    def __enter__(self) -> None:
        with self._lock:
            self._busy.append(self._on)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._busy.remove(self._on)


def node_words() -> str:
    """This node as messages call it: its host's name, and the address that Ray knows it by."""
    host = socket.gethostname()
    if "ray" not in sys.modules:
        return f"node {host}"
    import ray

    return f"node {ray.util.get_node_ip_address()} ({host})" if ray.is_initialized() else f"node {host}"


def _node_id() -> str:
    """Ray's id of this node; empty where this class is run without Ray."""
    if "ray" not in sys.modules:
        return ""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
