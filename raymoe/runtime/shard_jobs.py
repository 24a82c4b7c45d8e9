"""The queue of shards, as jobs for actors. A merge or a verification defines by `ShardWork` what the jobs do."""

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
    """A method by which actors do shard jobs."""

    helper: Helper | None = None  # another actor that each job needs

    def can_use(self, actor: ActorInfo) -> bool:
        """Whether an actor that has a job's source files can use this method."""
        return True

    @abstractmethod
    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        """Start a job on an actor; returns the reference of its result.

        If the method has a helper (`helper` is its handle), the helper is called. The call raises PeerLost if the actor
        is lost.
        """


class ShardWork(Protocol):
    """The work on shards. A shard is one or several jobs, which several actors may do at the same time."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """Open a shard: its jobs; empty if there is nothing for actors to do. Called from several threads."""

    @property
    def methods(self) -> Sequence[ShardMethod]:
        """The methods by which actors do the jobs, the preferred one first. An actor uses a later method for a shard
        only if no actor can do that shard by an earlier one."""

    def reads(self, file: SourceFile) -> bool:
        """Whether actors read that object for shards. False if a store copies it."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> Any:
        """Called when all jobs of a shard are done. Returns the shard's result, or one more job, as in
        `Output.complete`. Called from several threads."""


def task_name(verb: str, job: ShardJob, names: Mapping[Owner, str]) -> str:
    """A job's name in Ray's dashboard; `names` as in `owner_names`."""
    return f"{verb} {job.shard.file_name} of {names.get(job.shard.owner, job.shard.owner)}"


def tensors_read_for_shards(plan: MergePlan, reads: Callable[[SourceFile], bool]) -> frozenset[TensorEntry]:
    """The tensors in object stores that actors read for shards; `reads` as in `ShardWork`."""
    return frozenset(entry for shard in plan.shards for part in shard.parts for entry in _fetched_entries(part, reads))


def _fetched_entries(part: Part, reads: Callable[[SourceFile], bool]) -> Iterator[TensorEntry]:
    """The tensors that actors fetch for a part. A store can't copy a tensor that the merge changes."""
    for read in part.sources_read:
        copies = isinstance(part.what, Copy)
        if read.source.file.kind.is_object and (not copies or reads(read.source.file)):
            yield read.source


class SharedReads:
    """Tensors in object stores that several shards need, for example experts that share one model and differ in
    adapters."""

    def __init__(self, plan: MergePlan, reads: Callable[[SourceFile], bool]) -> None:
        self._reads = reads
        self._shards: dict[TensorEntry, set[str]] = {}  # shard names per shared tensor
        first: dict[TensorEntry, str] = {}
        for shard in plan.shards:
            for part in shard.parts:
                for entry in _fetched_entries(part, reads):
                    if (other := first.setdefault(entry, shard.file_name)) != shard.file_name:
                        self._shards.setdefault(entry, {other}).add(shard.file_name)

    def with_sharing_hints(self, job: ShardJob, waiting: Callable[[], Set[str]], actors: int) -> ShardJob:
        """The job, with the tensors that other shards read too. A tensor is marked `keep_cached` if at least as many of
        the `waiting` shards (names) need it as there are actors: then this actor will probably get one of them."""
        fetched = (e for part in job.shard.parts if job.includes(part) for e in _fetched_entries(part, self._reads))
        shared = tuple(dict.fromkeys(entry for entry in fetched if entry in self._shards))
        if not shared:
            return job
        others = waiting() - {job.shard.file_name}
        keep_cached = tuple(entry for entry in shared if len(self._shards[entry] & others) >= actors)
        return replace(job, shared_with_shards=shared, keep_cached=keep_cached)


@dataclass
class _OpenShard:
    """A shard with jobs given out: the number of missing results, and the results so far."""

    shard: Shard
    jobs_left: int = 0
    results: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class WriteShardJob(Job):
    """A job of a shard: `detail` is the argument for the actor."""

    queue: ShardQueue
    opened: _OpenShard
    detail: ShardJob

    @property
    def matrices(self) -> Mapping[int, Any]:
        """References to the merged matrices of the backbone that it needs, by layer."""
        return self.detail.matrices

    @property
    def takes_states(self) -> bool:
        return bool(self.matrices)

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

    `waiting` are by owner, and in the plan's order. `jobs` and `complete` may send requests to a store, so they run
    outside the scheduling thread, for several shards at once; `calls` are the references of these calls. Shards are
    opened before an actor needs them.
    """

    def __init__(self, waiting: Sequence[Shard], work: ShardWork, transport: Transport) -> None:
        self.waiting: dict[Owner, deque[Shard]] = {}
        for shard in waiting:
            self.waiting.setdefault(shard.owner, deque()).append(shard)
        self.work, self._transport = work, transport
        self.opening: list[Shard] = []
        self.ready: list[WriteShardJob] = []
        self.calls: dict[Any, Callable[[Any], None]] = {}  # with the function that takes the result
        self.results: list[Any] = []
        self.bytes_kept = 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything besides jobs that are running."""
        return bool(self.waiting or self.ready or self.calls)

    def open_ahead(
        self, preferred: Iterable[Collection[Owner]], count: int, can_start: Callable[[ShardJob], bool] = bool
    ) -> None:
        """Open shards until `count` of them are being opened or have waiting jobs, and one of each actor's own.

        `preferred` has for each actor the members of the shards that it does first. Jobs that can't start yet do not
        count.
        """
        for owners in preferred:
            there = (*(job.owner for job in self.ready), *(shard.owner for shard in self.opening))
            if not any(owner in owners for owner in there):
                self._open_next(owners)
        can_be_done = sum(can_start(job.detail) for job in self.ready)
        while can_be_done + len(self.opening) < count and self.waiting:
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
        """A job that an actor may do: of its own expert's shards, else of the base's, else of any.

        None also while one of its own shards is being opened.
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
        """Take a shard's result, or add the job that is still needed for it."""
        if isinstance(done, ShardJob):
            opened.results, opened.jobs_left = [], 1
            self.ready.insert(0, WriteShardJob(self, opened, detail=done))
        else:
            self.results.append(done)

    def _call(self, take: Callable[[Any], None], function: Callable[..., Any], *arguments: Any) -> None:
        self.calls[self._transport.run(function, *arguments)] = take

    def take(self, ref: Any) -> None:
        """Take the result of a finished call. Raises the error that the call raised."""
        self.calls.pop(ref)(self._transport.fetch(ref))

    def names(self) -> set[str]:
        """The shards that wait, or have waiting jobs."""
        return {shard.file_name for shard in self.unfinished()}

    def unfinished(self) -> Iterator[Shard]:
        """The shards with waiting jobs, and those that have no jobs yet."""
        yield from (job.opened.shard for job in self.ready)
        yield from self.opening
        for shards in self.waiting.values():
            yield from shards


def _preference(owners: Collection[Owner], owner: Owner) -> tuple[bool, bool]:
    """Sort key, smallest first: this actor's own expert, then the base, then the rest."""
    return (owner not in owners, owner != BASE)
