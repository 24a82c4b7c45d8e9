"""Gives actors their work and collects what comes back.

Every actor has two lanes that run side by side: gates (see router_jobs.py) and shards. An actor that reads an expert's
prompts writes that expert's shards first, then the base's, then whatever is left, so that no actor idles while
there is work. More experts than actors simply means that lanes are filled again: waves without a pause between them.

Work goes to actors that can do it: that see the local source files it takes (`Needs`), and have a GPU, if any has. An
actor on a node that does not see a local output sends shards to a writer that does (see shard_transfer.py), but only
shards that no actor could write there itself. What nobody can do any more, since the only node with its files is lost,
ends the merge within a minute.

The jobs of an actor that dies go back to the front of the queue, for whoever has room. Ray restarts the actor, which
may take long or never happen (its node is gone and no other has room); it is given work again when it answers. An actor
that the cluster has no room for yet is in the same state.

A process may also stand still without being dead (see stall.py). A job of which nothing moves is said, then its process
is ended as if it had died; the second time that the same job stands still ends the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from raymoe.console import say
from raymoe.errors import MergeFailed, RaymoeError
from raymoe.formatting import human_time
from raymoe.planning.plan import MergePlan, Shard
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.router_matrices import Rows
from raymoe.runtime.actor_status import Status, Whereabouts
from raymoe.runtime.placement import Needs, owner_names
from raymoe.runtime.ray_errors import Fate, cause_of, fate_of, first_line, own_words
from raymoe.runtime.router_jobs import GateJob, GateWork
from raymoe.runtime.settings import STALL_TIMEOUT_S
from raymoe.runtime.shard_jobs import ShardQueue, ShardTask, ShardWork, SharedReads, read_for_shards
from raymoe.runtime.shard_transfer import SenderLost
from raymoe.runtime.stall import Moves, Stall, Verdict
from raymoe.runtime.transport import RayTransport, Transport

__all__ = ["Outcome", "run_jobs"]

_ATTEMPTS = 3  # at one job: one that kills every actor that takes it up will not be finished by a fourth
_REFUSALS = 5  # deaths in a row of an actor that never comes up: more than Ray restarts it
_STALLS = 2  # of one job: the second time it is not the actor
_TICK_S = 0.25
_STATUS_EVERY_S = 0.5
_SILENT_S = 10.0  # a question for the status that waits so long is not answered
_ASK_EVERY_S = 1.0
_HOPE_S = 50.0  # how long work that nobody can do waits for actors that are away
_SETTLE_S = 10.0  # how long work waits for actors that are not up yet and would be better for it


@dataclass
class Outcome:
    """Gate rows by owner, what held-out prompts say of them, and what came of each shard.

    `readings`: the parts of members that prompts are read in (routers/prompt_passes.py); `members_done`: members whose
    prompts have been read; `layers_done`: layers whose rows are made. `bytes_kept` are those that an earlier run had
    written. `away`: actors that are not up (yet, or again). `writer`: the actor that writes what other nodes send, if
    it is up. `statuses`: the latest that actors have said, by their number; the writer's number comes after all others.
    """

    rows: Rows = field(default_factory=dict)
    summary: RouterSummary | None = None
    readings: int = 0
    members_done: int = 0
    layers_done: int = 0
    gates_done: bool = False
    shard_results: list[Any] = field(default_factory=list)
    bytes_kept: int = 0
    away: list[Any] = field(default_factory=list)
    writer: Any = None
    statuses: dict[int, Status] = field(default_factory=dict)


@dataclass(eq=False)
class _Actor:
    handle: Any
    number: int = 0
    has_gpu: bool = False  # whether it was given one
    gates_for: tuple[str, ...] = ()  # the members whose prompts it reads now or read last
    gates_busy: bool = False
    layers_busy: int = 0
    shards_busy: int = 0
    is_up: bool = False
    place: Whereabouts | None = None  # what it said when it came up
    answer: Any = None  # while it is not up: the reference of the answer that will tell, if it has been asked
    asked_at: float = 0.0
    refusals: int = 0  # how often in a row it died, or could not be asked, before it answered
    status: Status | None = None  # what it said last, since it came up
    status_answer: Any = None  # while it has been asked for its status: the reference of the answer
    status_asked_at: float = 0.0

    def reads(self, files: frozenset[str]) -> bool:
        return self.place is not None and not files & self.place["missing"]

    @property
    def sees_output(self) -> bool:
        return self.place is not None and self.place["output_visible"]

    @property
    def on_gpu(self) -> bool:
        return self.place is not None and self.place["device"] != "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A job that is being done by an actor; `sent`: written by the writer, as that actor sends it. `moves`: when it was
    last seen to move on."""

    actor: _Actor
    job: GateJob | ShardTask
    moves: Moves
    sent: bool = False

    @property
    def seen(self) -> object:
        """What its actor says of it; another value after each move."""
        if self.actor.status is None:
            return None
        name = self.job.detail.name if isinstance(self.job, ShardTask) else self.job.name
        return self.actor.status.moves.get(name), self.actor.status.store_requests


def run_jobs(
    plan: MergePlan,
    handles: Sequence[Any],
    work: ShardWork,
    on_tick: Callable[[Outcome], None],
    *,
    gpus: Sequence[bool] = (),
    readers: int,
    layers_at_once: int,
    shards_at_once: int,
    needs: Needs | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    transport: Transport | None = None,
) -> Outcome:
    """Compute all gate rows, and do `work` for every shard that needs none. Raises the first error.

    `gpus` says which of the actors were given a GPU. `readers` actors at most read prompts at once. An actor works on
    the routers of `layers_at_once` layers and on `shards_at_once` jobs of shards side by side.
    `needs`: the local files that jobs read, where not all nodes have all of them. `on_tick` is called several times a
    second. A job that stands still for `stall_timeout_s` is given to another actor, once. `transport`: what the handles
    are of; the cluster that this process is connected to, if it is not said.
    """
    transport = transport or RayTransport()
    written = read_for_shards(plan, work.reads)
    gates = GateWork(plan.gates, min(readers, len(handles)), owner_names(plan), written, transport)
    given = zip_longest(handles, gpus, fillvalue=False)
    actors = [_Actor(handle, number, has_gpu) for number, (handle, has_gpu) in enumerate(given)]
    run = _Jobs(plan, gates, actors, work, needs, Stall(stall_timeout_s, transport.now), transport)
    run.layers_at_once, run.shards_at_once = layers_at_once, shards_at_once
    try:
        while run.has_work:
            run.step()
            on_tick(run.outcome)
    finally:
        run.end()
    run.outcome.rows, run.outcome.summary = gates.result()
    return run.outcome


class _Jobs:
    """The state of `run_jobs`: who is there, what waits, what is being done."""

    def __init__(
        self,
        plan: MergePlan,
        gates: GateWork,
        actors: list[_Actor],
        work: ShardWork,
        needs: Needs | None,
        stall: Stall,
        transport: Transport,
    ) -> None:
        self._transport = transport
        self.outcome, self.gates = Outcome(readings=gates.readings), gates
        self.shards = ShardQueue([shard for shard in plan.shards if shard.owner != "router"], work)
        self.layers_at_once = self.shards_at_once = 1
        self._actors, self._count = actors, len(actors)
        self._writer: _Actor | None = None
        self._sending, self._shared = work.sending, SharedReads(plan, work.reads)
        self._needs, self._files = needs, needs.files if needs is not None else ()
        self._running: dict[Any, _Run] = {}
        self._may: dict[tuple[_Actor, frozenset[str]], bool] = {}  # by actor and files: whether it may do such shards
        self._others: dict[tuple[frozenset[str], bool], bool] = {}
        self._began = self._busy_at = transport.now()
        self._stall, self._up_at = stall, stall.now

    @property
    def has_work(self) -> bool:
        return bool(self.gates.is_waiting or self.shards.waiting or self.shards.ready or self._running)

    def step(self) -> None:
        """Give out work, and take what has come back within a tick."""
        self._may, self._others = {}, {}  # who is up does not change while work is given out
        everyone = [*self._actors, *([self._writer] if self._writer else [])]
        for actor in everyone:
            if not actor.is_up:
                self._ask(actor)
        for actor in self._actors:
            if actor.is_up:
                self._fill_gates(actor)
                self._fill_shards(actor)
        self._check_hope()
        self._hear(everyone)
        self._check_moves()
        self.outcome.writer = self._writer.handle if self._writer is not None and self._writer.is_up else None
        self.outcome.away = [actor.handle for actor in self._actors if not actor.is_up]
        asked = {actor.answer: actor for actor in everyone if actor.answer is not None}
        for ref in self._wait([*self._running, *asked]):
            if ref in asked:
                self._welcome(asked[ref])
            else:
                self._collect(ref, self._running.pop(ref))
        self.outcome.members_done, self.outcome.layers_done = self.gates.members_done, self.gates.layers_done
        self.outcome.gates_done = self.gates.is_done
        self.outcome.shard_results, self.outcome.bytes_kept = self.shards.results, self.shards.bytes_kept

    def end(self) -> None:
        """Nothing more is wanted."""
        for ref in self._running:
            self._transport.cancel(ref)
        if self._writer is not None:
            self._transport.end(self._writer.handle, for_good=True)

    def _fill_gates(self, actor: _Actor) -> None:
        if not actor.gates_busy and (job := self.gates.next_member(lambda job: self._may_read(actor, job))) is not None:
            actor.gates_for, actor.gates_busy = job.owners, True
            self._running[self.gates.start(actor.handle, job)] = self._begun(actor, job)
        if not actor.on_gpu and any(other.is_up and other.on_gpu for other in self._actors):
            return
        while actor.layers_busy < self.layers_at_once and (job := self.gates.next_layer()) is not None:
            actor.layers_busy += 1
            self._running[self.gates.start(actor.handle, job)] = self._begun(actor, job)

    def _may_read(self, actor: _Actor, job: GateJob) -> bool:
        """Whether an actor is to read these prompts: it can, and none with a GPU could."""
        files = self._needs.of_members(job.owners) if self._needs is not None else frozenset()
        if not actor.reads(files):
            return False
        return actor.on_gpu or not self._others_do(files, gpu=True)

    @property
    def _is_settling(self) -> bool:
        return self._transport.now() - self._began < _SETTLE_S

    def _others_do(self, files: frozenset[str], *, gpu: bool) -> bool:
        """Whether actors with, or without, a GPU are there that can read these files, or will be in a moment."""
        if (files, gpu) not in self._others:
            self._others[files, gpu] = self._look_for_others(files, gpu)
        return self._others[files, gpu]

    def _look_for_others(self, files: frozenset[str], gpu: bool) -> bool:
        alike = [other for other in self._actors if (other.on_gpu if other.place else other.has_gpu) is gpu]
        return any(other.is_up and other.reads(files) for other in alike) or (
            self._is_settling and any(other.place is None for other in alike)
        )

    def _fill_shards(self, actor: _Actor) -> None:
        while actor.shards_busy < self.shards_at_once:
            job = self.shards.next_for(actor.gates_for, lambda shard: self._may_do(actor, shard))
            if job is None:
                return
            actor.shards_busy += 1
            actors = sum(other.is_up for other in self._actors)
            detail = self._shared.told(job.detail, self.shards.names, actors)
            if actor.sees_output or self._sending is None:
                ref = self.shards.work.start(actor.handle, detail)
                self._running[ref] = self._begun(actor, job)
            else:
                assert self._writer is not None
                ref = self._sending.start(self._writer.handle, actor.handle, detail)
                self._running[ref] = self._begun(actor, job, sent=True)

    def _may_do(self, actor: _Actor, shard: Shard) -> bool:
        """Whether an actor is to do a shard: it can, and if it would have to send it, nobody can write it directly."""
        files = self._needs.shards[shard.file_name] if self._needs is not None else frozenset()
        if (actor, files) not in self._may:
            self._may[actor, files] = self._may_do_those_of(actor, files)
        return self._may[actor, files]

    def _may_do_those_of(self, actor: _Actor, files: frozenset[str]) -> bool:
        if not actor.reads(files):
            return False
        if actor.on_gpu and not self.gates.is_done and self._others_do(files, gpu=False):
            return False  # those that read prompts leave the bytes to others (see `slots_for`)
        if actor.sees_output or self._sending is None:
            return True
        if self._is_settling and any(other.place is None for other in self._actors):
            return False
        if any(other.is_up and other.sees_output and other.reads(files) for other in self._actors):
            return False
        if self._writer is None:
            self._writer = _Actor(self._sending.start_writer(), self._count)
        return self._writer.is_up

    def _check_hope(self) -> None:
        """Raises MergeFailed where what is left can't be done by anybody who is here or may come soon."""
        now = self._transport.now()
        here = [actor for actor in self._actors if actor.is_up]
        are_up = bool(here) and (self._writer is None or self._writer.is_up)
        if are_up:
            self._up_at = self._stall.now
        elif self._stall.now - self._up_at >= self._stall.limit_s:
            who = "the actor that writes to the output has not" if here else "none of the actors has"
            raise MergeFailed(
                f"{who} been up for {human_time(self._stall.limit_s)}: Ray has no room for it, or its process stands "
                "still. Run the same command again to go on from the shards that are finished."
            )
        if self._running or not are_up:
            self._busy_at = now
            return
        away = len(here) < len(self._actors)
        if now - self._busy_at < (_HOPE_S if away else _SETTLE_S):
            return
        places = {actor.place["node"]: actor.place["missing"] for actor in here if actor.place is not None}
        files, label = self._first_waiting()
        missing = sorted({file for file in files if all(file in gone for gone in places.values())})
        what = f"{missing[0]} is on none of the nodes" if missing else "no node has all the files that it takes"
        raise MergeFailed(
            f"{label}: {what} with an actor ({', '.join(sorted(places))}). A node that had it may be lost; run the "
            "same command again when it is back, to go on from the shards that are finished."
        )

    def _first_waiting(self) -> tuple[frozenset[str], str]:
        """The files and the name of work that waits."""
        if self._needs is None:
            return frozenset(), "the merge"
        if (shard := self.shards.first_waiting()) is not None:
            return self._needs.shards[shard.file_name], f"{shard.file_name} ({shard.owner})"
        owners = self.gates.waiting_owners
        return self._needs.of_members(owners), f"gates of {', '.join(owners)}"

    def _collect(self, ref: Any, run: _Run) -> None:
        """Take a job's result, or see to it that it is done again. Raises what can't be mended so."""
        actor, job = run.actor, run.job
        _leave(run)
        loss, result = self._result(ref, job, sent=run.sent)
        if loss == "actor" and run.sent and self._writer is not None:
            self._writer.is_up = False
        if loss in ("actor", "sender"):
            self._send_back(job)
            if not (loss == "actor" and run.sent):
                actor.is_up, actor.gates_for = False, ()
        elif loss == "states":
            assert isinstance(job, GateJob)
            self.gates.capture_again(job)
        elif isinstance(job, ShardTask):
            self.shards.came_back(job.opened, result)
        else:
            self.gates.came_back(job, result)

    def _send_back(self, job: GateJob | ShardTask) -> None:
        """A job is to be done again, before those that wait."""
        if isinstance(job, ShardTask):
            self.shards.ready.insert(0, job)
        else:
            self.gates.send_back(job)

    def _begun(self, actor: _Actor, job: GateJob | ShardTask, *, sent: bool = False) -> _Run:
        return _Run(actor, job, self._stall.begin(), sent)

    def _hear(self, actors: Sequence[_Actor]) -> None:
        """Take what actors say of themselves, and ask them again. One that stands still does not keep the others."""
        from ray.exceptions import RayError

        self._stall.look()
        asked = {actor.status_answer: actor for actor in actors if actor.status_answer is not None}
        for ref in self._transport.ready(list(asked), 0):
            actor, asked[ref].status_answer = asked[ref], None
            try:
                actor.status = self.outcome.statuses[actor.number] = self._transport.fetch(ref)
            except RayError:
                continue  # it is being restarted; its work is what is waited for, not its words
        now = self._transport.now()
        for actor in actors:
            if actor.is_up and actor.status_answer is None and now - actor.status_asked_at >= _STATUS_EVERY_S:
                actor.status_answer, actor.status_asked_at = actor.handle.status.remote(), now

    def _check_moves(self) -> None:
        """Say which jobs stand still, and give them to another actor. Raises MergeFailed for one that does so again."""
        for ref, run in list(self._running.items()):
            if ref not in self._running:  # its actor has just been ended for another job
                continue
            verdict = self._stall.judge(run.moves, run.seen)
            if verdict is Verdict.SAY:
                still, left = self._stall.limit_s / 2, self._stall.limit_s / 2
                then = f"in {human_time(left)} that process is ended and another one does the job"
                say(f"warning: {run.job.label}: nothing has moved for {human_time(still)} ({_at(run.actor)}); {then}")
            elif verdict is Verdict.GIVE_AWAY:
                self._give_away(run)

    def _give_away(self, run: _Run) -> None:
        still = f"nothing has moved for {human_time(self._stall.limit_s)} ({_at(run.actor)})"
        run.job.stalls += 1
        if run.job.stalls >= _STALLS:
            raise MergeFailed(
                f"{run.job.label}: {still}, for the second time. A filesystem or network that does not answer is the "
                "usual cause. Run the same command again to go on from the shards that are finished; where work is so "
                "slow, give it more time with --stall-timeout."
            )
        say(f"warning: {run.job.label}: {still}; the process is ended and another one does the job")
        # Of a stream, whichever side does not answer; where both do, neither can be told from the other.
        sides = [run.actor, self._writer] if run.sent and self._writer is not None else [run.actor]
        for actor in [side for side in sides if not self._answers(side)] or sides:
            self._end(actor)

    def _answers(self, actor: _Actor) -> bool:
        return actor.status_answer is None or self._transport.now() - actor.status_asked_at < _SILENT_S

    def _end(self, actor: _Actor) -> None:
        """End an actor's process, and take its jobs from it: Ray starts it anew, if it can be ended at all."""
        self._transport.end(actor.handle, for_good=False)
        for ref, run in list(self._running.items()):
            if actor is run.actor or (run.sent and actor is self._writer):
                del self._running[ref]  # a result that still comes is of no use
                _leave(run)
                self._send_back(run.job)
        actor.is_up, actor.gates_for = False, ()
        actor.status = actor.status_answer = None

    def _welcome(self, actor: _Actor) -> None:
        """The actor is up, or will never be. Raises MergeFailed where it was the last one, or the writer."""
        from ray.exceptions import RayError

        answer, actor.answer = actor.answer, None
        try:
            actor.place = self._transport.fetch(answer)
            actor.is_up, actor.refusals = True, 0
            self.gates.forget(actor.handle)
            actor.status = actor.status_answer = None
        except RayError as error:
            self._not_up(actor, error)

    def _not_up(self, actor: _Actor, error: Exception) -> None:
        """An actor gave no answer: it is asked again, or is given up for good. Raises as `_welcome`."""
        fate = fate_of(error)
        actor.refusals += not isinstance(error, _unavailable())
        if fate in (Fate.AWAY, Fate.LOST) and actor.refusals < _REFUSALS:
            return
        if actor is not self._writer:
            self._actors.remove(actor)
        who = "the actor that writes to the output" if actor is self._writer else "no actor is left: the last one"
        if actor is self._writer or not self._actors:
            if (cause := cause_of(error)) is not error:  # it lives, and can't do what it is there for
                raise MergeFailed(f"{who} can't work: {own_words(cause)}") from error
            raise MergeFailed(
                f"{who} died ({first_line(cause_of(error))}). Memory may have run out; run the same command again "
                "to go on from the shards that are finished."
            ) from error

    def _wait(self, refs: list[Any]) -> list[Any]:
        """The first reference that is ready, if one is within a tick."""
        if not refs:  # all actors are away, and have just said so
            self._transport.sleep(_TICK_S)
        return self._transport.ready(refs, _TICK_S, most=1)

    def _result(self, ref: Any, job: GateJob | ShardTask, *, sent: bool) -> tuple[str, Any]:
        """What came back; or what was lost, as `_loss` says, if it has not been lost too often."""
        from ray.exceptions import RayError

        try:
            return "", self._transport.fetch(ref)
        except RayError as error:
            lost = _loss(error, job, sent=sent)
            job.failures += 1
            if job.failures < _ATTEMPTS:
                return lost, None
            what = "what it works with was lost with its node" if lost == "states" else "its actor died"
            raise MergeFailed(
                f"{job.label}: {what} ({first_line(cause_of(error))}), {job.failures} times. Memory may have run out; "
                "run the same command again to go on from the shards that are finished."
            ) from error

    def _ask(self, actor: _Actor) -> None:
        """Ask an actor that is away whether it is up. One that has not been started yet answers when it is; one that is
        being restarted refuses (Ray would repeat the call, and tell the user about every try), and is asked again."""
        now = self._transport.now()
        if actor.answer is None and now - actor.asked_at >= _ASK_EVERY_S:
            actor.answer, actor.asked_at = actor.handle.where.remote(self._files), now


def _unavailable() -> type[Exception]:
    """What Ray raises while it restarts an actor, which may take any time."""
    from ray.exceptions import ActorUnavailableError

    kind: type[Exception] = ActorUnavailableError
    return kind


def _leave(run: _Run) -> None:
    """An actor has room for another job of this kind."""
    if isinstance(run.job, ShardTask):
        run.actor.shards_busy -= 1
    elif isinstance(run.job.what, int):
        run.actor.layers_busy -= 1
    else:
        run.actor.gates_busy = False


def _at(actor: _Actor) -> str:
    """Where an actor is, for people who look for its process."""
    place = actor.place
    return f"actor {actor.number}, process {place['pid']} on {place['node']}" if place else f"actor {actor.number}"


def _loss(error: Exception, job: GateJob | ShardTask, *, sent: bool) -> str:
    """What an error of Ray's says was lost: the 'actor' that was asked, the 'sender' of what it writes, or the prompts'
    'states'. Raises what can't be mended by doing the job again."""
    from ray.exceptions import RayTaskError

    cause = cause_of(error) if isinstance(error, RayTaskError) else error
    if isinstance(cause, RaymoeError):
        raise cause from None
    if isinstance(cause, SenderLost):
        return "sender"
    fate = fate_of(cause)
    if fate is Fate.FULL:
        raise _no_room(job.label, cause) from error
    if fate is Fate.FINAL:
        said = str(cause) if cause is not error else first_line(error)
        raise MergeFailed(f"{job.label}: {type(cause).__name__}: {said}") from error
    takes_states = isinstance(job, GateJob) and isinstance(job.what, int)  # nothing else works with what others left
    if takes_states and (fate is Fate.LOST or cause is not error):
        return "states"
    return "sender" if sent and cause is not error else "actor"


def _no_room(label: str, error: BaseException) -> MergeFailed:
    """Ray spills what its object store can't hold to the node's disk; so neither has room."""
    return MergeFailed(
        f"{label}: no room for the states of prompts: Ray's object store is full, and so is the disk that it moves "
        f"objects to ({type(error).__name__}). Start Ray with more of either (ray start --object-store-memory, "
        "--object-spilling-directory), and run the same command again to go on from the shards that are finished."
    )
