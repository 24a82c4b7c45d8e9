"""The actors of a run: the state of each, its jobs, and its latest status.

    STARTING --answers--> UP --is lost--> RESTARTING --answers--> UP
    STARTING, RESTARTING --is given up--> DEAD

An actor is STARTING while the cluster has no room for it. An actor whose process died is RESTARTING: Ray starts a new
process, which may take long or never happen. Both are pinged until they answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from raymoe.console import say
from raymoe.errors import MergeFailed
from raymoe.planning.owner import Owner
from raymoe.runtime.actor_status import ActorInfo, Status
from raymoe.runtime.ray_errors import (
    CallFailure,
    cause_of,
    classify_failure,
    error_text,
    first_line,
    is_out_of_memory,
    memory_remark,
)
from raymoe.runtime.timeouts import PING_INTERVAL_S, STATUS_INTERVAL_S, STATUS_TIMEOUT_S
from raymoe.runtime.transport import Transport
from raymoe.sources.facts import SourceFile

_MAX_STARTUP_FAILURES = 5  # deaths in a row of an actor that never answers: more than Ray restarts it


class ActorState(Enum):
    """Whether an actor takes work."""

    STARTING = "it has never answered"
    UP = "it has answered, and takes work"
    RESTARTING = "it was up; its process died or was ended"
    DEAD = "it never answers again"


class ActorEvent(Enum):
    """What changes an actor's state."""

    ANSWERED = auto()
    LOST = auto()
    GIVEN_UP = auto()


def next_state(state: ActorState, event: ActorEvent) -> ActorState:
    """The state after an event. DEAD is final: jobs of an actor may be reported lost after the actor was given up."""
    if state is ActorState.DEAD or event is ActorEvent.GIVEN_UP:
        return ActorState.DEAD
    if event is ActorEvent.ANSWERED:
        return ActorState.UP
    return state if state is ActorState.STARTING else ActorState.RESTARTING


@dataclass
class Lane:
    """Jobs of one kind that run at once on an actor. Another job is added while their total weight is below
    `capacity`."""

    capacity: int = 1
    weigh: Callable[[Any], int] = lambda job: 1
    running: set[Any] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        return sum(map(self.weigh, self.running)) < self.capacity


@dataclass(frozen=True, eq=False)
class Helper:
    """An actor that takes no work of its own: jobs of other actors need it (see `ShardMethod`).

    `label` is its name in messages. `start` starts it and returns its handle; it may not be up yet.
    """

    label: str
    start: Callable[[], Any]


@dataclass(eq=False)
class PoolActor:
    """An actor's handle, and what is known about it.

    `has_gpu`: it was given a GPU. `only_copies`: it only requests server-side copies. `helper`: the helper that it was
    started as, if it takes no work of its own. `reads_for`: the members of the prompts that it reads now or read last.
    `info`: its answer when it came up. `status`: its latest status since it came up. `pending_ping` and
    `pending_status` refer to answers that have not arrived yet. `ran_out_of_memory`: it was ended for that reason, and
    a warning was printed.
    """

    handle: Any
    number: int = 0
    has_gpu: bool = False
    only_copies: bool = False
    prompts: Lane = field(default_factory=Lane)
    layers: Lane = field(default_factory=Lane)
    shards: Lane = field(default_factory=Lane)
    helper: Helper | None = None
    state: ActorState = ActorState.STARTING
    reads_for: tuple[Owner, ...] = ()
    info: ActorInfo | None = None
    status: Status | None = None
    startup_failures: int = 0  # how often in a row it died, or could not be called, before it answered
    pending_ping: Any = None
    last_ping: float = 0.0
    pending_status: Any = None
    last_status_request: float = 0.0
    ran_out_of_memory: bool = False

    @property
    def is_up(self) -> bool:
        return self.state is ActorState.UP

    @property
    def on_gpu(self) -> bool:
        return self.info is not None and self.info["device"] != "cpu"

    @property
    def description(self) -> str:
        """Where the actor runs, so that users can find its process."""
        at = f", process {self.info['pid']} on {self.info['node']}" if self.info else ""
        return f"actor {self.number}{at}"

    def can_read(self, files: frozenset[str]) -> bool:
        return self.info is not None and not files & self.info["missing"]


class ActorPool:
    """The actors that are given work, and the helpers that their jobs need."""

    def __init__(self, actors: Sequence[PoolActor], transport: Transport, files: Sequence[SourceFile] = ()) -> None:
        """`files` are the files that each actor is asked about when it comes up."""
        self._actors, self._transport, self._files = list(actors), transport, files
        self.helpers: dict[Helper, PoolActor] = {}  # those that have been started
        self.statuses: dict[int, Status] = {}  # also of actors that are dead by now
        self.version = 0  # changes whenever an actor's state changes

    @property
    def actors(self) -> list[PoolActor]:
        """Actors that are up or may still come up, without helpers."""
        return [actor for actor in self._actors if actor.state is not ActorState.DEAD]

    @property
    def up(self) -> list[PoolActor]:
        return [actor for actor in self._actors if actor.is_up]

    @property
    def with_helpers(self) -> list[PoolActor]:
        return [*self.actors, *self.helpers.values()]

    @property
    def pending_pings(self) -> dict[Any, PoolActor]:
        return {actor.pending_ping: actor for actor in self.with_helpers if actor.pending_ping is not None}

    def start_helper(self, helper: Helper) -> None:
        """Start a helper. It gets the next actor number."""
        number = len(self._actors) + len(self.helpers)
        self.helpers[helper] = PoolActor(helper.start(), number, helper=helper)

    def end_helpers(self) -> None:
        """End the helpers for good."""
        for actor in self.helpers.values():
            self._transport.end(actor.handle, for_good=True)

    def change(self, actor: PoolActor, event: ActorEvent) -> None:
        """The one place where an actor's state changes."""
        actor.state = next_state(actor.state, event)
        actor.status = actor.pending_status = None
        if event is not ActorEvent.ANSWERED:
            actor.reads_for = ()
        self.version += 1

    def ping_absent(self) -> None:
        """Ping the actors that are not up. A ping of an actor that has not started yet is answered when it starts. A
        ping of an actor that is restarting fails (Ray would repeat the call, and report every try to the user), and is
        sent again.
        """
        now = self._transport.now()
        for actor in self.with_helpers:
            if not actor.is_up and actor.pending_ping is None and now - actor.last_ping >= PING_INTERVAL_S:
                actor.pending_ping, actor.last_ping = actor.handle.describe.remote(self._files), now

    def take_ping_reply(self, actor: PoolActor) -> bool:
        """Whether the actor is up now. Raises MergeFailed if it never will be, and it is a helper or was the last
        actor."""
        from ray.exceptions import RayError

        reply, actor.pending_ping = actor.pending_ping, None
        try:
            actor.info = self._transport.fetch(reply)
        except RayError as error:
            self.on_startup_failure(actor, error)
            return False
        actor.startup_failures = 0
        self.change(actor, ActorEvent.ANSWERED)
        return True

    def on_startup_failure(self, actor: PoolActor, error: Exception) -> None:
        """An actor did not answer: ping it again, or give it up. Raises as `take_ping_reply`."""
        from ray.exceptions import ActorUnavailableError

        self.note_memory(actor, error)
        # raised while an actor restarts, which may take any length of time
        if not isinstance(error, ActorUnavailableError):
            actor.startup_failures += 1
        may_come = classify_failure(error) in (CallFailure.UNAVAILABLE, CallFailure.LOST)
        if may_come and actor.startup_failures < _MAX_STARTUP_FAILURES:
            return
        self.change(actor, ActorEvent.GIVEN_UP)
        subject = actor.helper.label if actor.helper is not None else "no actor is left: the last one"
        if actor.helper is not None or not self.actors:
            if (cause := cause_of(error)) is not error:  # the process lives, but can't do its job
                raise MergeFailed(f"{subject} can't work: {error_text(cause)}") from error
            raise MergeFailed(
                f"{subject} died ({first_line(cause_of(error))}). {memory_remark(error)}; run the same command again "
                "to go on from the shards that are finished."
            ) from error
        if actor.ran_out_of_memory:
            say(f"warning: {actor.description} is given up; the merge goes on with {len(self.actors)} actors")

    def note_memory(self, actor: PoolActor, error: Exception) -> None:
        """Warn that an actor was lost because memory ran out, if Ray says so, and say how many actors have room.

        The warning comes once per actor: Ray restarts it, and it may die again for the same reason.
        """
        if actor.ran_out_of_memory or not is_out_of_memory(error):
            return
        actor.ran_out_of_memory = True
        fit = sum(other is not actor for other in self.up)
        remedy = f"; if memory is too small for more, use --actors {fit}" if fit else ""
        say(
            f"warning: memory ran out on the node of {actor.description}, and Ray ended that process; "
            f"{fit} of {len(self._actors)} actors are up without it{remedy}"
        )

    def poll_statuses(self) -> None:
        """Collect the actors' statuses and request new ones. An actor that does not answer does not delay the
        others."""
        from ray.exceptions import RayError

        pending = {actor.pending_status: actor for actor in self.with_helpers if actor.pending_status is not None}
        for ref in self._transport.ready(list(pending), 0):
            actor, pending[ref].pending_status = pending[ref], None
            try:
                actor.status = self.statuses[actor.number] = self._transport.fetch(ref)
            except RayError:
                continue  # it is restarting: wait for its work, not for its status
        now = self._transport.now()
        for actor in self.with_helpers:
            if actor.is_up and actor.pending_status is None and now - actor.last_status_request >= STATUS_INTERVAL_S:
                actor.pending_status, actor.last_status_request = actor.handle.status.remote(), now

    def is_responsive(self, actor: PoolActor) -> bool:
        """Whether an actor answers status requests."""
        return actor.pending_status is None or self._transport.now() - actor.last_status_request < STATUS_TIMEOUT_S
