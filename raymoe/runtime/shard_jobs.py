"""The queue of shards, as jobs for actors. What is done with a shard, `ShardWork`, a merge or a verification says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from raymoe.planning.owner import BASE, Owner
from raymoe.planning.plan import Copy, MergePlan, Part, Shard
from raymoe.runtime.actor_pool import Helper
from raymoe.runtime.actor_status import ActorInfo
from raymoe.runtime.jobs import Job
from raymoe.runtime.transport import Transport
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
        """Begin with a shard; nothing, if there is nothing left for actors to do. Called from several threads."""

    @property
    def methods(self) -> Sequence[ShardMethod]:
        """The ways in which actors do the jobs, the preferred first. An actor does a shard in a later way only if no
        actor can do that shard in an earlier one."""

    def reads(self, file: SourceFile) -> bool:
        """Whether actors read that object for shards: not so where a store copies it."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        """All jobs of a shard came back: what is to be kept of it, or one more job, as in `Output.complete`. Called
        from several threads."""


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

    def with_sharing_hints(self, job: ShardJob, waiting: Callable[[], Set[str]], actors: int) -> ShardJob:
        """The job, with what it reads that other shards do too. An actor will be asked for it again if of the shards
        that are `waiting` (their names) as many need it as there are actors."""
        fetched = (e for part in job.shard.parts if job.includes(part) for e in _fetched_entries(part, self._reads))
        shared = tuple(dict.fromkeys(entry for entry in fetched if entry in self._shards))
        if not shared:
            return job
        others = waiting() - {job.shard.file_name}
        keep_cached = tuple(entry for entry in shared if len(self._shards[entry] & others) >= actors)
        return replace(job, shared_with_shards=shared, keep_cached=keep_cached)


@dataclass
class _OpenShard:
    """A shard whose jobs have been asked for: how many are still to come back, and what came back."""

    shard: Shard
    jobs_left: int = 0
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
    """The queue of shards.

        waiting --`work.jobs`--> opening --> ready: jobs for actors --> `work.complete` --> results

    `waiting` are by owner, and in the plan's order. `jobs` and `complete` may ask a store, and so are called beside the
    scheduling thread, for several shards at once; `calls` are the references of these calls. Shards are opened before
    an actor asks for them.
    """

    def __init__(self, waiting: Sequence[Shard], work: ShardWork, transport: Transport) -> None:
        self.waiting: dict[Owner, deque[Shard]] = {}
        for shard in waiting:
            self.waiting.setdefault(shard.owner, deque()).append(shard)
        self.work, self._transport = work, transport
        self.opening: list[Shard] = []
        self.ready: list[WriteShardJob] = []
        self.calls: dict[Any, Callable[[Any], None]] = {}  # with what takes the result
        self.results: list[Any] = []
        self.bytes_kept = 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything but jobs that actors are doing."""
        return bool(self.waiting or self.ready or self.calls)

    def open_ahead(self, preferred: Iterable[Collection[Owner]], count: int) -> None:
        """Open shards until `count` of them are being opened or have jobs that wait, and one of each actor's own.

        `preferred` are the members whose shards an actor does first, for each actor.
        """
        for owners in preferred:
            there = (*(job.owner for job in self.ready), *(shard.owner for shard in self.opening))
            if not any(owner in owners for owner in there):
                self._open_next(owners)
        while len(self.ready) + len(self.opening) < count and self.waiting:
            self._open_next((BASE, *self.waiting))

    def _open_next(self, owners: Iterable[Owner]) -> None:
        """Open the next shard of the first of these owners that has one."""
        owner = next((each for each in owners if each in self.waiting), None)
        if owner is None:
            return
        shard = self.waiting[owner].popleft()
        if not self.waiting[owner]:
            del self.waiting[owner]
        self.opening.append(shard)
        self._call(lambda jobs: self._opened(shard, jobs), self.work.jobs, shard)

    def _opened(self, shard: Shard, jobs: Sequence[ShardJob]) -> None:
        self.opening.remove(shard)
        opened = _OpenShard(shard, len(jobs))
        self.ready += [WriteShardJob(self, opened, detail=job) for job in jobs]
        if not jobs:
            self.bytes_kept += shard.nbytes
            self._complete(opened)

    def next_for(self, owners: Collection[Owner], can_do: Callable[[ShardJob], bool]) -> WriteShardJob | None:
        """A job for an actor, of those that it may do: of its own expert's shards, else of the base's, else of any.

        None also while one of its own is being opened.
        """
        jobs = (job for job in self.ready if can_do(job.detail))
        job = min(jobs, key=lambda job: _preference(owners, job.owner), default=None)
        if job is None or (job.owner not in owners and any(shard.owner in owners for shard in self.opening)):
            return None
        self.ready.remove(job)
        return job

    def complete(self, opened: _OpenShard, result: Any) -> None:
        opened.results.append(result)
        opened.jobs_left -= 1
        if not opened.jobs_left:
            self._complete(opened)

    def _complete(self, opened: _OpenShard) -> None:
        self._call(lambda done: self._completed(opened, done), self.work.complete, opened.shard, opened.results)

    def _completed(self, opened: _OpenShard, done: Any) -> None:
        """Take what is to be kept of a shard, or give out the job that is still to be done for it."""
        if isinstance(done, ShardJob):
            opened.results, opened.jobs_left = [], 1
            self.ready.insert(0, WriteShardJob(self, opened, detail=done))
        else:
            self.results.append(done)

    def _call(self, take: Callable[[Any], None], function: Callable[..., Any], *arguments: Any) -> None:
        self.calls[self._transport.run(function, *arguments)] = take

    def take(self, ref: Any) -> None:
        """Take the result of a call that is done. Raises what it raised."""
        self.calls.pop(ref)(self._transport.fetch(ref))

    def names(self) -> set[str]:
        """The shards that wait, or have jobs that do."""
        return {shard.file_name for shard in self.unfinished()}

    def unfinished(self) -> Iterator[Shard]:
        """The shards of jobs that wait, and those that have no jobs yet."""
        yield from (job.opened.shard for job in self.ready)
        yield from self.opening
        for shards in self.waiting.values():
            yield from shards


def _preference(owners: Collection[Owner], owner: Owner) -> tuple[bool, bool]:
    """Smallest first: this actor's own expert, then the base, then the rest."""
    return (owner not in owners, owner != BASE)
