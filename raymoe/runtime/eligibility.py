"""Decides which actors may do which work: by the files they see, their compute device, and the methods they can use.

Prompts are read on GPUs if any actor has one. Actors with a GPU leave shards to others while prompts remain to be read.
An actor does a shard by the first method that it can use, unless another actor can do that shard by an earlier method.

The functions only answer questions: none of them starts an actor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from raymoe.planning.owner import Owner
from raymoe.planning.plan import Shard
from raymoe.runtime.actor_pool import ActorPool, ActorState, Helper, PoolActor
from raymoe.runtime.placement import FileRequirements
from raymoe.runtime.shard_jobs import ShardMethod
from raymoe.storage.outputs.protocol import ShardJob


class Eligibility:
    """Answers are cached until an actor's state or another input of theirs changes."""

    def __init__(
        self,
        pool: ActorPool,
        requirements: FileRequirements | None,
        *,
        methods: Sequence[ShardMethod],
        is_settling: Callable[[], bool],
        has_read_prompts: Callable[[], bool],
    ) -> None:
        """`methods`: those of `ShardWork`. `is_settling`: actors that are not up yet may be up in a moment.
        `has_read_prompts`: only shards are left for GPUs to do."""
        self._pool, self._requirements, self._methods = pool, requirements, methods
        self._is_settling, self._has_read_prompts = is_settling, has_read_prompts
        self._conditions: tuple[int, bool, bool] | None = None
        self._found: dict[tuple[PoolActor, frozenset[str]], ShardMethod | None] = {}
        self._others: dict[tuple[frozenset[str], bool], bool] = {}

    def refresh(self) -> None:
        """Drop answers that may have changed. Call it before work is given out."""
        conditions = (self._pool.version, self._is_settling(), self._has_read_prompts())
        if conditions != self._conditions:
            self._conditions = conditions
            self._found, self._others = {}, {}

    def can_read_prompts(self, actor: PoolActor, owners: Iterable[Owner]) -> bool:
        """True if this actor should read the prompts: it can, and no actor with a GPU could."""
        files = self._requirements.for_members(owners) if self._requirements is not None else frozenset()
        return actor.can_read(files) and (actor.on_gpu or not self._can_another(files, gpu=True))

    def can_fit_layers(self, actor: PoolActor) -> bool:
        return actor.on_gpu or not any(other.on_gpu for other in self._pool.up)

    def can_merge_backbone(self, actor: PoolActor) -> bool:
        """True if this actor has the models whose matrices are merged."""
        return actor.can_read(self._requirements.merging if self._requirements is not None else frozenset())

    def can_do(self, actor: PoolActor, job: ShardJob) -> bool:
        """True if an actor can get a job now: no other actors are meant for it, and the helper that it needs is up."""
        if job.asks_store is not actor.only_copies and self._has_kind(only_copies=job.asks_store):
            return False
        method = self.method(actor, job)
        if method is None or method.helper is None:
            return method is not None
        helper = self._pool.helpers.get(method.helper)
        return helper is not None and helper.is_up

    def missing_helpers(self, shards: Callable[[], Iterable[Shard]]) -> list[Helper]:
        """Helpers that are not started yet and that an actor with room for one of the shards needs."""
        return [
            method.helper
            for method in self._methods
            if method.helper is not None and method.helper not in self._pool.helpers and self._wants(method, shards)
        ]

    def _wants(self, method: ShardMethod, shards: Callable[[], Iterable[Shard]]) -> bool:
        """Whether an actor with room would do one of the shards by this method."""
        free = [actor for actor in self._pool.up if actor.shards.has_room and self._first_method(actor) is method]
        if not free:
            return False
        needed = {self._files(shard) for shard in shards()}  # many shards read the same files
        return any(self._method(actor, files) is method for actor in free for files in needed)

    def method(self, actor: PoolActor, job: ShardJob) -> ShardMethod | None:
        """The method by which an actor does a job; None if it lacks files, or if other actors should do it."""
        return self._method(actor, frozenset() if job.asks_store else self._files(job.shard))

    def _has_kind(self, *, only_copies: bool) -> bool:
        """Whether actors of a kind are up or will be in a moment: those that only request copies, or all others."""
        kind = [actor for actor in self._pool.actors if actor.only_copies is only_copies]
        return any(actor.is_up for actor in kind) or (
            self._is_settling() and any(actor.state is ActorState.STARTING for actor in kind)
        )

    def _files(self, shard: Shard) -> frozenset[str]:
        return self._requirements.shards[shard.file_name] if self._requirements is not None else frozenset()

    def _method(self, actor: PoolActor, files: frozenset[str]) -> ShardMethod | None:
        if (actor, files) not in self._found:
            self._found[actor, files] = self._find_method(actor, files)
        return self._found[actor, files]

    def _find_method(self, actor: PoolActor, files: frozenset[str]) -> ShardMethod | None:
        if not actor.can_read(files):
            return None
        if actor.on_gpu and not self._has_read_prompts() and self._can_another(files, gpu=False):
            return None  # actors that read prompts leave the bytes to others (see `plan_actors`)
        method = self._first_method(actor)
        if method is None or method is self._methods[0]:
            return method
        may_come = self._is_settling() and any(other.state is ActorState.STARTING for other in self._pool.actors)
        earlier = self._methods[: self._methods.index(method)]
        is_better = any(other.can_read(files) and self._first_method(other) in earlier for other in self._pool.up)
        return None if may_come or is_better else method

    def _first_method(self, actor: PoolActor) -> ShardMethod | None:
        """The first method that an actor can use, regardless of files."""
        info = actor.info
        return next((method for method in self._methods if info is not None and method.can_use(info)), None)

    def _can_another(self, files: frozenset[str], *, gpu: bool) -> bool:
        """Whether an actor with (or without) a GPU that can read these files is up, or will be in a moment."""
        if (files, gpu) not in self._others:
            self._others[files, gpu] = self._find_another(files, gpu)
        return self._others[files, gpu]

    def _find_another(self, files: frozenset[str], gpu: bool) -> bool:
        others = [actor for actor in self._pool.actors if not actor.only_copies]
        same_kind = [actor for actor in others if (actor.on_gpu if actor.info else actor.has_gpu) is gpu]
        return any(actor.is_up and actor.can_read(files) for actor in same_kind) or (
            self._is_settling() and any(actor.state is ActorState.STARTING for actor in same_kind)
        )
