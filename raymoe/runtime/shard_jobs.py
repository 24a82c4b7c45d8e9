"""The queue of shards, as jobs for actors. What is done with a shard, `ShardWork`, a merge or a verification says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import Copy, MergePlan, Part, Shard
from raymoe.runtime.actor_pool import Helper
from raymoe.runtime.actor_status import ActorInfo
from raymoe.runtime.jobs import Job
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.outputs.protocol import ShardJob


class ShardMethod(ABC):
    """A way in which actors do the jobs of shards."""

    helper: Helper | None = None  # another actor that each job needs

    def can_use(self, actor: ActorInfo) -> bool:
        """Whether an actor that has a job's source files can do it in this way."""
        return True

    @abstractmethod
    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        """Start a job on an actor; the reference of its result.

        With a helper (`helper` is its handle), the helper is called. The call raises PeerLost if the actor is lost.
        """


class ShardWork(Protocol):
    """What is done with shards. A shard is one or several jobs, which several actors may do at the same time."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """Begin with a shard; nothing, if there is nothing left for actors to do."""

    @property
    def methods(self) -> Sequence[ShardMethod]:
        """The ways in which actors do the jobs, the preferred first. An actor does a shard in a later way only if no
        actor can do that shard in an earlier one."""

    def reads(self, file: SourceFile) -> bool:
        """Whether actors read that object for shards: not so where a store copies it."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        """All jobs of a shard came back: what is to be kept of it, or one more job, as in `Output.complete`."""


def task_name(verb: str, job: ShardJob, names: Mapping[Owner, str]) -> str:
    """What Ray's dashboard calls a job; `names` as in `owner_names`."""
    return f"{verb} {job.shard.file_name} of {names.get(job.shard.owner, job.shard.owner)}"


def tensors_read_for_shards(plan: MergePlan, reads: Callable[[SourceFile], bool]) -> frozenset[TensorEntry]:
    """The tensors of objects that actors read for shards; `reads` as in `ShardWork`."""
    return frozenset(entry for shard in plan.shards for part in shard.parts for entry in _fetched_entries(part, reads))


def _fetched_entries(part: Part, reads: Callable[[SourceFile], bool]) -> Iterator[TensorEntry]:
    """What actors fetch for a part. A store copies nothing that is to be changed."""
    for read in part.sources_read:
        copies = isinstance(part.what, Copy)
        if read.source.file.kind.is_object and (not copies or reads(read.source.file)):
            yield read.source


class SharedReads:
    """Tensors of objects that several shards are made of, as experts are that are one model with different adapters."""

    def __init__(self, plan: MergePlan, reads: Callable[[SourceFile], bool]) -> None:
        self._reads = reads
        self._shards: dict[TensorEntry, set[str]] = {}  # the names of the shards of each shared tensor
        first: dict[TensorEntry, str] = {}
        for shard in plan.shards:
            for part in shard.parts:
                for entry in _fetched_entries(part, reads):
                    if (other := first.setdefault(entry, shard.file_name)) != shard.file_name:
                        self._shards.setdefault(entry, {other}).add(shard.file_name)

    def with_sharing_hints(self, job: ShardJob, waiting: Set[str], actors: int) -> ShardJob:
        """The job, with what it reads that other shards do too. An actor will be asked for it again if of the shards
        that are `waiting` (by name) as many need it as there are actors."""
        fetched = (e for part in job.shard.parts if job.includes(part) for e in _fetched_entries(part, self._reads))
        shared = tuple(dict.fromkeys(entry for entry in fetched if entry in self._shards))
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
    """The queue of shards: `waiting` have not been begun, by owner and in the plan's order; `ready` are jobs of begun
    ones that no actor does yet."""

    def __init__(self, waiting: Sequence[Shard], work: ShardWork) -> None:
        self.waiting: dict[Owner, list[Shard]] = {}
        for shard in waiting:
            self.waiting.setdefault(shard.owner, []).append(shard)
        self.work = work
        self.results: list[Any] = []
        self.bytes_kept = 0
        self.ready: list[WriteShardJob] = []

    def next_for(self, owners: Collection[Owner], can_write: Callable[[Shard], bool]) -> WriteShardJob | None:
        """A job for an actor, of those that it may do: of its own expert's shards, else of the base's, else of any;
        begun shards first."""
        while True:
            ready = (job for job in self.ready if can_write(job.opened.shard))
            job = min(ready, key=lambda job: _preference(owners, job.owner), default=None)
            shard = next((shard for shard in self._preferred(owners) if can_write(shard)), None)
            if job is not None and (
                shard is None or _preference(owners, job.owner) <= _preference(owners, shard.owner)
            ):
                self.ready.remove(job)
                return job
            if shard is None:
                return None
            self._begin(shard)

    def _preferred(self, owners: Collection[Owner]) -> Iterator[Shard]:
        """The shards that wait, in the order of `_preference`: the first that an actor can write ends the search."""
        first = dict.fromkeys((*owners, BASE))
        for owner in first:
            yield from self.waiting.get(owner, ())
        for owner, shards in self.waiting.items():
            if owner not in first:
                yield from shards

    @property
    def names(self) -> set[str]:
        """The shards that wait, or have jobs that do."""
        return {shard.file_name for shard in self.unfinished}

    @property
    def unfinished(self) -> list[Shard]:
        """The shards of jobs that wait, and those that have not been begun."""
        return [*(job.opened.shard for job in self.ready), *(s for shards in self.waiting.values() for s in shards)]

    def _begin(self, shard: Shard) -> None:
        self.waiting[shard.owner].remove(shard)
        if not self.waiting[shard.owner]:
            del self.waiting[shard.owner]
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
