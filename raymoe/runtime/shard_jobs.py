"""The queue of shards, as jobs for actors. What is done with a shard, `ShardWork`, a merge or a verification says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from raymoe.object_store.urls import is_url
from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import Copy, MergePlan, Part, Shard
from raymoe.runtime.jobs import Job
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.outputs.protocol import ShardJob


class Sending(Protocol):
    """Jobs that two actors do: one sends what the other, on the output's node, writes."""

    def start_writer(self) -> Any:
        """The actor that writes; it may not be up yet."""

    def start(self, writer: Any, actor: Any, job: ShardJob) -> Any:
        """Start a job; the reference of its result."""


class ShardWork(Protocol):
    """What is done with shards. A shard is one or several jobs, which several actors may do at the same time."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """Begin with a shard; nothing, if there is nothing left for actors to do."""

    def start(self, actor: Any, job: ShardJob) -> Any:
        """Start a job on an actor; the reference of its result."""

    def reads(self, file: SourceFile) -> bool:
        """Whether actors read that object for shards: not so where a store copies it."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        """All jobs of a shard came back: what is to be kept of it, or one more job, as in `Output.complete`."""

    @property
    def sending(self) -> Sending | None:
        """How actors that do not see the output do their jobs; None: they all do them as they are."""


def tensors_read_for_shards(plan: MergePlan, reads: Callable[[SourceFile], bool]) -> frozenset[TensorEntry]:
    """The tensors of objects that actors read for shards; `reads` as in `ShardWork`."""
    return frozenset(entry for shard in plan.shards for part in shard.parts for entry in _fetched_entries(part, reads))


def _fetched_entries(part: Part, reads: Callable[[SourceFile], bool]) -> Iterator[TensorEntry]:
    """What actors fetch for a part. A store copies nothing that is to be changed."""
    for read in part.sources_read:
        copies = isinstance(part.what, Copy)
        if is_url(read.source.file.location) and (not copies or reads(read.source.file)):
            yield read.source


class SharedReads:
    """Tensors of objects that several shards are made of, as experts are that are one model with different adapters."""

    def __init__(self, plan: MergePlan, reads: Callable[[SourceFile], bool]) -> None:
        self._reads = reads
        self._shards: dict[TensorEntry, set[str]] = {}
        for shard in plan.shards:
            for part in shard.parts:
                for entry in _fetched_entries(part, reads):
                    self._shards.setdefault(entry, set()).add(shard.file_name)

    def with_sharing_hints(self, job: ShardJob, waiting: Set[str], actors: int) -> ShardJob:
        """The job, with what it reads that other shards do too. An actor will be asked for it again if of the shards
        that are `waiting` (by name) as many need it as there are actors."""
        fetched = (e for part in job.shard.parts if job.includes(part) for e in _fetched_entries(part, self._reads))
        shared = tuple(dict.fromkeys(entry for entry in fetched if len(self._shards[entry]) > 1))
        if not shared:
            return job
        others = waiting - {job.shard.file_name}
        keep_cached = tuple(entry for entry in shared if len(self._shards[entry] & others) >= actors)
        return replace(job, shared_with_shards=shared, keep_cached=keep_cached)


@dataclass
class _OpenShard:
    """A shard whose jobs have been asked for: how many are still to come back, and what came back."""

    shard: Shard
    jobs_left: int
    results: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class WriteShardJob(Job):
    """A job of a shard: `detail` is what the actor is given."""

    queue: ShardQueue
    opened: _OpenShard
    detail: ShardJob

    @property
    def owner(self) -> Owner:
        return self.opened.shard.owner

    @property
    def label(self) -> str:
        return f"{self.opened.shard.file_name} ({self.owner})"

    @property
    def heartbeat_name(self) -> str:
        return self.detail.name

    def complete(self, result: Any) -> None:
        self.queue.complete(self.opened, result)

    def requeue(self) -> None:
        if self.detail.parts:
            self.detail = replace(self.detail, resumes=True)
        self.queue.ready.insert(0, self)


class ShardQueue:
    """The queue of shards: `waiting` have not been begun, `ready` are jobs of begun ones that nobody does yet."""

    def __init__(self, waiting: list[Shard], work: ShardWork) -> None:
        self.waiting, self.work = waiting, work
        self.results: list[Any] = []
        self.bytes_kept = 0
        self.ready: list[WriteShardJob] = []

    def next_for(self, owners: Collection[Owner], can_write: Callable[[Shard], bool]) -> WriteShardJob | None:
        """A job for an actor, of those that it may do: of its own expert's shards, else of the base's, else of any;
        begun shards first."""
        while True:
            ready = (job for job in self.ready if can_write(job.opened.shard))
            waiting = (shard for shard in self.waiting if can_write(shard))
            job = min(ready, key=lambda job: _preference(owners, job.owner), default=None)
            shard = min(waiting, key=lambda shard: _preference(owners, shard.owner), default=None)
            if job is not None and (
                shard is None or _preference(owners, job.owner) <= _preference(owners, shard.owner)
            ):
                self.ready.remove(job)
                return job
            if shard is None:
                return None
            self.waiting.remove(shard)
            self._begin(shard)

    @property
    def names(self) -> set[str]:
        """The shards that wait, or have jobs that do."""
        return {shard.file_name for shard in self.unfinished}

    @property
    def unfinished(self) -> list[Shard]:
        """The shards of jobs that wait, and those that have not been begun."""
        return [*(job.opened.shard for job in self.ready), *self.waiting]

    def _begin(self, shard: Shard) -> None:
        jobs = self.work.jobs(shard)
        opened = _OpenShard(shard, len(jobs))
        self.ready += [WriteShardJob(self, opened, detail=job) for job in jobs]
        if not jobs:
            self.bytes_kept += shard.nbytes
            self._complete(opened)

    def complete(self, opened: _OpenShard, result: Any) -> None:
        opened.results.append(result)
        opened.jobs_left -= 1
        if not opened.jobs_left:
            self._complete(opened)

    def _complete(self, opened: _OpenShard) -> None:
        """Take what is to be kept of a shard, or give out the job that is still to be done for it."""
        done = self.work.complete(opened.shard, opened.results)
        if isinstance(done, ShardJob):
            opened.results, opened.jobs_left = [], 1
            self.ready.insert(0, WriteShardJob(self, opened, detail=done))
        else:
            self.results.append(done)


def _preference(owners: Collection[Owner], owner: Owner) -> tuple[bool, bool]:
    """Smallest first: this actor's own expert, then the base, then the rest in the plan's order."""
    return (owner not in owners, owner != BASE)
