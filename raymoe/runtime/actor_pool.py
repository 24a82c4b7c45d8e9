"""The actors of a run: the state of each, what it works on, and what it has said last.

    STARTING --answers--> UP --is lost--> RESTARTING --answers--> UP
    STARTING, RESTARTING --is given up--> DEAD

An actor that the cluster has no room for yet is STARTING. One whose process died is RESTARTING: Ray starts it anew,
which may take long or never happen. Both are asked whether they are up until they answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from raymoe.errors import MergeFailed
from raymoe.planning.owner import Owner
from raymoe.runtime.actor_status import ActorInfo, Status
from raymoe.runtime.ray_errors import CallFailure, cause_of, classify_failure, error_text, first_line
from raymoe.runtime.timeouts import PING_INTERVAL_S, STATUS_INTERVAL_S, STATUS_TIMEOUT_S
from raymoe.runtime.transport import Transport
from raymoe.sources.facts import SourceFile

_MAX_STARTUP_FAILURES = 5  # deaths in a row of an actor that never comes up: more than Ray restarts it


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
    """The state after an event. Jobs of an actor may be lost after it was: what is DEAD stays so."""
    if state is ActorState.DEAD or event is ActorEvent.GIVEN_UP:
        return ActorState.DEAD
    if event is ActorEvent.ANSWERED:
        return ActorState.UP
    return state if state is ActorState.STARTING else ActorState.RESTARTING


@dataclass
class Lane:
    """Jobs of one kind that an actor does side by side: a next one if what there is weighs less than `capacity`."""

    capacity: int = 1
    weigh: Callable[[Any], int] = lambda job: 1
    running: set[Any] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        return sum(map(self.weigh, self.running)) < self.capacity


@dataclass(frozen=True, eq=False)
class Helper:
    """An actor that takes no work of its own: jobs of other actors need it (see `ShardMethod`).

    `label` is what messages call it. `start` starts it and gives its handle; it may not be up yet.
    """

    label: str
    start: Callable[[], Any]


@dataclass(eq=False)
class PoolActor:
    """An actor's handle, and what is known of it.

    `has_gpu`: it was given one. `only_copies`: it only asks a store for copies. `helper`: what it was started as, if it
    takes no work of its own. `reads_for`: the members whose prompts it reads now or read last. `info`: what it said
    when it came up. `status`: what it said last, since it came up. `pending_ping` and `pending_status` refer to answers
    that it still owes.
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
    startup_failures: int = 0  # how often in a row it died, or could not be asked, before it answered
    pending_ping: Any = None
    last_ping: float = 0.0
    pending_status: Any = None
    last_status_request: float = 0.0

    @property
    def is_up(self) -> bool:
        return self.state is ActorState.UP

    @property
    def on_gpu(self) -> bool:
        return self.info is not None and self.info["device"] != "cpu"

    @property
    def description(self) -> str:
        """Where it is, for people who look for its process."""
        at = f", process {self.info['pid']} on {self.info['node']}" if self.info else ""
        return f"actor {self.number}{at}"

    def can_read(self, files: frozenset[str]) -> bool:
        return self.info is not None and not files & self.info["missing"]


class ActorPool:
    """The actors that are given work, and the helpers that their jobs need."""

    def __init__(self, actors: Sequence[PoolActor], transport: Transport, files: Sequence[SourceFile] = ()) -> None:
        """`files` are those that each actor is asked about when it comes up."""
        self._actors, self._transport, self._files = list(actors), transport, files
        self.helpers: dict[Helper, PoolActor] = {}  # those that have been started
        self.statuses: dict[int, Status] = {}  # also of actors that are dead by now
        self.version = 0  # another one after each change of a state

    @property
    def actors(self) -> list[PoolActor]:
        """Those that are up, or may still come; without helpers."""
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
        """Start a helper. Its number comes after all others."""
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
        """Ask actors that are not up whether they are. One that has not been started yet answers when it is; one that
        is being restarted refuses (Ray would repeat the call, and tell the user about every try), and is asked again.
        """
        now = self._transport.now()
        for actor in self.with_helpers:
            if not actor.is_up and actor.pending_ping is None and now - actor.last_ping >= PING_INTERVAL_S:
                actor.pending_ping, actor.last_ping = actor.handle.describe.remote(self._files), now

    def take_ping_reply(self, actor: PoolActor) -> bool:
        """Whether the actor is up now. Raises MergeFailed if it never will be and was the last one, or is a helper."""
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
        """An actor gave no answer: it is asked again, or is given up. Raises as `take_ping_reply`."""
        from ray.exceptions import ActorUnavailableError

        if not isinstance(error, ActorUnavailableError):  # raised while Ray restarts an actor, which may take any time
            actor.startup_failures += 1
        may_come = classify_failure(error) in (CallFailure.UNAVAILABLE, CallFailure.LOST)
        if may_come and actor.startup_failures < _MAX_STARTUP_FAILURES:
            return
        self.change(actor, ActorEvent.GIVEN_UP)
        subject = actor.helper.label if actor.helper is not None else "no actor is left: the last one"
        if actor.helper is not None or not self.actors:
            if (cause := cause_of(error)) is not error:  # it lives, and can't do what it is there for
                raise MergeFailed(f"{subject} can't work: {error_text(cause)}") from error
            raise MergeFailed(
                f"{subject} died ({first_line(cause_of(error))}). Memory may have run out; run the same command again "
                "to go on from the shards that are finished."
            ) from error

    def poll_statuses(self) -> None:
        """Take what actors say of themselves, and ask them again. One that stands still does not keep the others."""
        from ray.exceptions import RayError

        pending = {actor.pending_status: actor for actor in self.with_helpers if actor.pending_status is not None}
        for ref in self._transport.ready(list(pending), 0):
            actor, pending[ref].pending_status = pending[ref], None
            try:
                actor.status = self.statuses[actor.number] = self._transport.fetch(ref)
            except RayError:
                continue  # it is being restarted; its work is what is waited for, not its words
        now = self._transport.now()
        for actor in self.with_helpers:
            if actor.is_up and actor.pending_status is None and now - actor.last_status_request >= STATUS_INTERVAL_S:
                actor.pending_status, actor.last_status_request = actor.handle.status.remote(), now

    def is_responsive(self, actor: PoolActor) -> bool:
        """Whether an actor says something when it is asked."""
        return actor.pending_status is None or self._transport.now() - actor.last_status_request < STATUS_TIMEOUT_S
