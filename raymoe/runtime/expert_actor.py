"""The expert actor's code, as a plain class: it can be run and tested without Ray.

An actor serves one expert at a time. Its three kinds of calls run concurrently (Ray's concurrency groups): `gates`
reads the expert's prompts on the device, `write` writes shards, `control` answers status requests while the other two
work. Calls may be repeated after an actor died: a shard that is already complete is found in the journal and not
written again.

Torch is imported by the methods that read prompts with a model or compute what prompts give: `capture` and `fit_layer`
for routers, `capture_inputs` and `merge_layer` for the backbone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from raymoe.compute import limit_threads, peak_rss_bytes
from raymoe.errors import Problem, ProblemReport
from raymoe.gate_modes import MODES
from raymoe.gate_modes.layer_values import LayerActivations, LayerRows, join_parts
from raymoe.object_store.location import Location
from raymoe.object_store.registry import process_counters
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Combination, GatePlan, GatePrompts, MomentPlan
from raymoe.runtime.actor_process import prioritize_gate_threads, set_up_process
from raymoe.runtime.actor_status import ActorInfo, Status, Working, WorkKind, node_name, reading_label
from raymoe.runtime.job_activity import ActiveJobs, TrackedJob
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_transfer import split_pieces
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.local_folder import stat_file
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.protocol import Progress, ShardJob
from raymoe.storage.read_cache import GATES, SHARDS, ReadCache
from raymoe.storage.shard_stream import different_tensors, shard_chunks, shard_range
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.value_checks import WeightFindings

if TYPE_CHECKING:
    from raymoe.routers.attention_inputs import LayerInputs
    from raymoe.routers.regmean import MatrixBytes

_T = TypeVar("_T")


class ExpertWorker:
    """Works for one expert at a time: gate rows on its device, shards to the output."""

    def __init__(self, output: Location, settings: RuntimeSettings, run: str = "") -> None:
        set_up_process()
        self._settings = settings
        self._output = open_output(output, settings.storage, run)
        self._read_cache = ReadCache()
        self._found = WeightFindings(strict=settings.strict)
        self._lock = threading.Lock()
        self._bytes_written = self._bytes_copied = self._bytes_kept = 0
        self._gate_tokens = self._gate_tokens_planned = self._readings_counted = 0
        self._active_jobs = ActiveJobs()

    def describe(self, files: Sequence[SourceFile] = ()) -> ActorInfo:
        """Where this actor runs, and which of some local files it can't read (or sees with another size)."""
        return ActorInfo(
            pid=os.getpid(),
            node=node_name(),
            node_id=_node_id(),
            output_visible=self._output.is_reachable(),
            device="cuda:0" if self._has_gpu() else "cpu",
            missing=frozenset(
                f.location for f in files if (found := stat_file(f.location)) is None or found.size != f.size
            ),
        )

    def embedding_rows(self, gates: GatePlan, members: Sequence[GatePrompts]) -> tuple[npt.NDArray[np.float32], ...]:
        """One router row (hidden,) per given expert, for the gate mode that uses token embeddings only."""
        from raymoe.routers.token_embeddings import embedding_router_row

        with self._reading(members) as work, self._reader(work) as reader:
            remote_code = self._settings.trust_remote_code
            return tuple(embedding_router_row(gates, each, reader, trust_remote_code=remote_code) for each in members)

    def capture(
        self,
        gates: GatePlan,
        members: Sequence[GatePrompts],
        experts: int,
        matrices: Mapping[int, Any] = MappingProxyType({}),
        shared_with_shards: Sequence[TensorEntry] = (),
        *keep_cached: Sequence[TensorEntry],
    ) -> Iterator[LayerActivations | None]:
        """Yield one item per layer: the activations of the prompts of some of `experts` experts, by expert; then None,
        which marks the end. Ray stores each item as it is yielded: this process holds one layer's activations.

        `matrices`: references to the merged matrices of the backbone, by layer.
        `shared_with_shards`: tensors in object stores that shards use too; this actor reads them once for both.
        `keep_cached`: the same for prompts that still wait, unless this actor has already been told of them.
        """
        # Start before torch is imported: shards do not wait for it.
        for entries in (shared_with_shards, *keep_cached):
            self._read_cache.expect(entries, GATES, SHARDS)
        try:
            yield from self._captured_layers(gates, members, experts, matrices)
        finally:
            self._read_cache.forget(shared_with_shards, GATES)
        yield None

    def _captured_layers(
        self, gates: GatePlan, members: Sequence[GatePrompts], experts: int, matrices: Mapping[int, Any]
    ) -> Iterator[LayerActivations]:
        from raymoe.routers.activations import capture_layers

        device = self._device()

        def layer_done(tokens: int) -> None:
            work.heartbeat()
            with self._lock:
                self._gate_tokens += tokens

        def counted(tokens: int) -> None:
            work.heartbeat()
            with self._lock:
                self._gate_tokens_planned += tokens
                self._readings_counted += len(members)

        if gates.quantize:
            from raymoe.routers.quantize import check_quantize

            check_quantize(gates.quantize, device)
        limit_threads()
        with self._reading(members) as work, self._reader(work, GATES, matrices) as reader:
            layers = capture_layers(
                gates,
                members,
                reader,
                members=experts,
                device=device,
                trust_remote_code=self._settings.trust_remote_code,
                layer_done=layer_done,
                on_counted=counted,
            )
            for layer in layers:
                work.heartbeat()
                yield from layer

    def fit_layer(self, mode: str, experts: int, parts: Sequence[int], *activations: LayerActivations) -> LayerRows:
        """Compute the router rows of one layer from all members' activations: first the experts, then shared experts.

        `parts` says how many of `activations` each member has, in order.
        """
        limit_threads(1)
        members = list(map(join_parts, _grouped(activations, parts)))
        with self._active_jobs.track(Working(WorkKind.ROUTERS)) as work:
            return MODES[mode].fit_layer(members[:experts], members[experts:], self._device(), work.heartbeat)

    def capture_inputs(
        self, plan: MomentPlan, members: Sequence[GatePrompts], experts: int
    ) -> Iterator[LayerInputs | None]:
        """Yield one item per layer: the inputs of the layer's matrices for the prompts of some of `experts` experts, by
        expert; then None, which marks the end."""
        from raymoe.routers.attention_inputs import capture_inputs

        device = self._device()
        limit_threads()
        with self._reading(members, WorkKind.INPUTS) as work, self._reader(work) as reader:
            layers = capture_inputs(
                plan,
                members,
                reader,
                members=experts,
                device=device,
                trust_remote_code=self._settings.trust_remote_code,
                layer_done=lambda tokens: work.heartbeat(),
            )
            for layer in layers:
                work.heartbeat()
                yield from layer
        yield None

    def merge_layer(
        self, matrices: Sequence[Combination], owners: Sequence[Owner], parts: Sequence[int], *inputs: LayerInputs
    ) -> Iterator[MatrixBytes | None]:
        """Yield the merged matrices of a layer's backbone, which Ray stores; then None, which marks the end.

        `parts` says how many of `inputs` each of `owners` has, in order.
        """
        from raymoe.routers.attention_inputs import join_inputs
        from raymoe.routers.regmean import merge_layer

        limit_threads(1)
        joined = dict(zip(owners, map(join_inputs, _grouped(inputs, parts)), strict=True))
        with (
            self._active_jobs.track(Working(WorkKind.BACKBONE)) as work,
            self._reader(work) as reader,
        ):
            yield merge_layer(matrices, joined, reader, self._device(), work.heartbeat)
        yield None

    def write_shard(self, job: ShardJob) -> Any:
        """Write a shard, or a part of one; the result goes to the output's `complete`."""
        self._check_output()
        prioritize_gate_threads()
        with self._writing(job) as (reader, progress):
            if self._settings.strict:
                _scan_copies(job, reader)
            result = self._output.do(job, reader, progress)
        if result is None:  # an earlier run completed it
            with self._lock:
                self._bytes_kept += job.shard.nbytes
        return result

    def send_shard(self, job: ShardJob) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of a shard in order, for a writer on the output's node. A piece is valid until the next
        one."""
        prioritize_gate_threads()
        with self._writing(job) as (reader, progress):
            for piece in split_pieces(shard_chunks(job.shard, reader), job.shard.nbytes):
                yield piece
                progress(len(piece), 0)

    def compare_shard(self, job: ShardJob, written: Mapping[str, TensorEntry]) -> list[str]:
        """Names of the shard's tensors that have other bytes in the output than the sources give."""
        with self._writing(job) as (reader, progress):
            return different_tensors(job.shard.parts, written, reader, progress=lambda count: progress(count, 0))

    def status(self) -> Status:
        gpu = 0
        if sys.modules.get("torch") is not None:
            import torch

            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        counters = process_counters()
        with self._lock:
            return Status(
                bytes_written=self._bytes_written,
                bytes_copied_by_store=self._bytes_copied,
                bytes_kept=self._bytes_kept,
                gate_tokens=self._gate_tokens,
                gate_tokens_planned=self._gate_tokens_planned,
                readings_counted=self._readings_counted,
                store_retries=counters.retries,
                store_requests=counters.requests,
                heartbeats=self._active_jobs.heartbeats,
                peak_rss_bytes=peak_rss_bytes(),
                peak_gpu_bytes=gpu,
                busy_with=self._active_jobs.busy_with,
                warnings=self._found.lines,
                warnings_left_out=self._found.omitted,
            )

    def _has_gpu(self) -> bool:
        """Whether Ray gave this actor a GPU. It is checked without torch, which takes seconds to import."""
        return self._settings.device != "cpu" and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _device(self) -> str:
        if not self._has_gpu():
            return "cpu"
        import torch

        if self._settings.device == "cuda" and not torch.cuda.is_available():
            what = f"Ray gives a GPU to an actor on {node_name()}, and torch sees none there"
            remedy = "install a torch for that GPU and its driver, or leave it out to compute on CPUs"
            raise ProblemReport([Problem(where="--device cuda", what=what, remedy=remedy)])
        return "cuda:0" if torch.cuda.is_available() else "cpu"

    def _check_output(self) -> None:
        if not self._output.is_reachable():
            what = f"the output {self._output.location} is no longer that of this run on {node_name()}"
            remedy = "see whether another merge has taken it over, and whether its filesystem is still there"
            raise ProblemReport([Problem(where="output", what=what, remedy=remedy)])

    def _reader(
        self, work: TrackedJob, name: str = SHARDS, matrices: Mapping[int, Any] = MappingProxyType({})
    ) -> SourceReader:
        return SourceReader(
            self._settings.hub,
            self._settings.storage,
            read_cache=self._read_cache,
            name=name,
            findings=self._found,
            heartbeat=work.heartbeat,
            matrices=StoredMatrices(matrices) if matrices else None,
        )

    def _reading(
        self, members: Sequence[GatePrompts], kind: WorkKind = WorkKind.PROMPTS
    ) -> AbstractContextManager[TrackedJob]:
        owners = tuple(dict.fromkeys(str(member.owner) for member in members))
        return self._active_jobs.track(Working(kind, owners), reading_label(members, kind))

    @contextmanager
    def _writing(self, job: ShardJob) -> Iterator[tuple[SourceReader, Progress]]:
        """A reader for a shard, and the callback that counts moved bytes. Bytes that other shards of this actor need
        too stay in the read cache."""
        self._read_cache.expect(job.shared_with_shards, job.name)
        self._read_cache.expect(job.keep_cached, SHARDS)
        self._read_cache.forget(set(job.shared_with_shards).difference(job.keep_cached), SHARDS)

        def progress(written: int, copied: int) -> None:
            work.heartbeat()
            with self._lock:
                self._bytes_written += written
                self._bytes_copied += copied

        try:
            with (
                self._active_jobs.track(Working(WorkKind.SHARD, (job.shard.file_name,)), job.name) as work,
                self._reader(work, job.name if job.shared_with_shards else SHARDS, job.matrices) as reader,
            ):
                yield reader, progress
        finally:
            self._read_cache.forget(job.shared_with_shards, job.name)


class StoredMatrices:
    """Merged matrices of the backbone in Ray's object store. Thread-safe. It holds those of one layer at a time."""

    def __init__(self, references: Mapping[int, Any]) -> None:
        """`references`: those of the matrices of each layer."""
        self._references = references
        self._lock = threading.Lock()
        self._held: tuple[int, MatrixBytes] | None = None

    def rows_of(self, layer: int, name: str) -> npt.NDArray[np.uint8]:
        """As `MergedMatrices.rows_of`. Raises Ray's exceptions for lost objects."""
        with self._lock:
            if self._held is None or self._held[0] != layer:
                self._held = None  # before the next one is fetched
                self._held = layer, fetch_object(self._references[layer])
            return self._held[1][name]


def fetch_object(reference: Any) -> Any:
    """An object in Ray's object store."""
    import ray

    return ray.get(reference)


def _grouped(values: Sequence[_T], counts: Sequence[int]) -> list[Sequence[_T]]:
    """`values` in groups of so many."""
    ends = list(accumulate(counts))
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _scan_copies(job: ShardJob, reader: SourceReader) -> None:
    """Read the bytes that the store will copy server-side, so that their values are checked."""
    for part in job.parts:
        if part.copy is not None:
            for _ in shard_range(job.shard, part.start, part.end, reader):
                pass


def _node_id() -> str:
    """Ray's id of this node; empty if this class runs without Ray."""
    if "ray" not in sys.modules:
        return ""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""
