"""Which actors may do which work: those that see its files, by what they compute on and whether they see the output.

Prompts are read on GPUs where there are any. Actors with a GPU leave shards to others while prompts are to be read. A
shard is sent to the writer only if no actor can write it to the output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from raymoe.planning.owner import Owner
from raymoe.planning.plan import Shard
from raymoe.runtime.actor_pool import ActorPool, ActorState, PoolActor
from raymoe.runtime.placement import FileRequirements


class WriteWay(Enum):
    """How an actor does a shard."""

    DIRECTLY = "it sees the output, or needs none"
    VIA_WRITER = "it sends the shard to the writer"
    NOT_AT_ALL = "it lacks files, or others are to do it"


class Eligibility:
    """Answers are kept until an actor's state changes, or what else they depend on."""

    def __init__(
        self,
        pool: ActorPool,
        requirements: FileRequirements | None,
        *,
        can_send: bool,
        is_settling: Callable[[], bool],
        has_read_prompts: Callable[[], bool],
    ) -> None:
        """`can_send`: the writer can be started. `is_settling`: actors that are not up yet may be in a moment.
        `has_read_prompts`: nothing is left for GPUs to do but shards."""
        self._pool, self._requirements, self._can_send = pool, requirements, can_send
        self._is_settling, self._has_read_prompts = is_settling, has_read_prompts
        self._conditions: tuple[int, bool, bool] | None = None
        self._ways: dict[tuple[PoolActor, frozenset[str]], WriteWay] = {}
        self._others: dict[tuple[frozenset[str], bool], bool] = {}

    def refresh(self) -> None:
        """Drop answers that may be others by now. To be called before work is given out."""
        conditions = (self._pool.version, self._is_settling(), self._has_read_prompts())
        if conditions != self._conditions:
            self._conditions = conditions
            self._ways, self._others = {}, {}

    def can_read_prompts(self, actor: PoolActor, owners: Iterable[Owner]) -> bool:
        """Whether an actor is to read prompts: it can, and none with a GPU could."""
        files = self._requirements.for_members(owners) if self._requirements is not None else frozenset()
        return actor.can_read(files) and (actor.on_gpu or not self._can_another(files, gpu=True))

    def can_fit_layers(self, actor: PoolActor) -> bool:
        return actor.on_gpu or not any(other.on_gpu for other in self._pool.up)

    def can_write(self, actor: PoolActor, shard: Shard) -> bool:
        """Whether an actor can be given a shard now."""
        way = self.write_way(actor, shard)
        if way is WriteWay.VIA_WRITER:
            return self._pool.writer is not None and self._pool.writer.is_up
        return way is WriteWay.DIRECTLY

    def needs_writer(self, shards: Sequence[Shard]) -> bool:
        """Whether an actor with room for one of the shards would have to send it."""
        if not self._can_send:
            return False
        free = [actor for actor in self._pool.up if actor.shards.has_room and not actor.sees_output]
        if not free:
            return False
        # Many shards read the same files.
        needed = {self._files(shard) for shard in shards}
        return any(self._way(actor, files) is WriteWay.VIA_WRITER for actor in free for files in needed)

    def write_way(self, actor: PoolActor, shard: Shard) -> WriteWay:
        return self._way(actor, self._files(shard))

    def _files(self, shard: Shard) -> frozenset[str]:
        return self._requirements.shards[shard.file_name] if self._requirements is not None else frozenset()

    def _way(self, actor: PoolActor, files: frozenset[str]) -> WriteWay:
        if (actor, files) not in self._ways:
            self._ways[actor, files] = self._find_way(actor, files)
        return self._ways[actor, files]

    def _find_way(self, actor: PoolActor, files: frozenset[str]) -> WriteWay:
        if not actor.can_read(files):
            return WriteWay.NOT_AT_ALL
        if actor.on_gpu and not self._has_read_prompts() and self._can_another(files, gpu=False):
            return WriteWay.NOT_AT_ALL  # those that read prompts leave the bytes to others (see `plan_actors`)
        if actor.sees_output or not self._can_send:
            return WriteWay.DIRECTLY
        may_come = self._is_settling() and any(other.state is ActorState.STARTING for other in self._pool.actors)
        if may_come or any(other.sees_output and other.can_read(files) for other in self._pool.up):
            return WriteWay.NOT_AT_ALL
        return WriteWay.VIA_WRITER

    def _can_another(self, files: frozenset[str], *, gpu: bool) -> bool:
        """Whether actors with, or without, a GPU are there that can read these files, or will be in a moment."""
        if (files, gpu) not in self._others:
            self._others[files, gpu] = self._find_another(files, gpu)
        return self._others[files, gpu]

    def _find_another(self, files: frozenset[str], gpu: bool) -> bool:
        same_kind = [actor for actor in self._pool.actors if (actor.on_gpu if actor.info else actor.has_gpu) is gpu]
        return any(actor.is_up and actor.can_read(files) for actor in same_kind) or (
            self._is_settling() and any(actor.state is ActorState.STARTING for actor in same_kind)
        )
