"""Gives actors their work and collects what comes back.

Every actor has two lanes that run side by side: gates (see router_jobs.py) and shards. An actor that reads an expert's
prompts writes that expert's shards first, then the base's, then whatever is left, so that no actor idles while
there is work. More experts than actors simply means that lanes are filled again: waves without a pause between them.

Work goes to actors that can do it: that see the local source files it takes (`FileRequirements`), and have a GPU, if
any has. An actor on a node that does not see a local output sends shards to a writer that does (see shard_transfer.py),
but only shards that no actor could write there itself. What nobody can do any more, since the only node with its files
is lost, ends the merge within a minute.

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
from raymoe.planning.owner import Owner
from raymoe.planning.plan import MergePlan, Shard
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.router_matrices import RouterRows
from raymoe.runtime.actor_status import ActorInfo, Status
from raymoe.runtime.placement import FileRequirements, owner_names
from raymoe.runtime.ray_errors import CallFailure, cause_of, classify_failure, error_text, first_line
from raymoe.runtime.router_jobs import GateJob, GateWork
from raymoe.runtime.settings import STALL_TIMEOUT_S
from raymoe.runtime.shard_jobs import ShardQueue, ShardTask, ShardWork, SharedReads, tensors_read_for_shards
from raymoe.runtime.shard_transfer import SenderLost
from raymoe.runtime.stall import LastHeartbeat, StallClock, Verdict
from raymoe.runtime.transport import RayTransport, Transport

__all__ = ["Outcome", "run_jobs"]

_MAX_ATTEMPTS = 3  # at one job: one that kills every actor that takes it up will not be finished by a fourth
_MAX_STARTUP_FAILURES = 5  # deaths in a row of an actor that never comes up: more than Ray restarts it
_MAX_STALLS = 2  # of one job: the second time it is not the actor
_TICK_S = 0.25
_STATUS_INTERVAL_S = 0.5
_STATUS_TIMEOUT_S = 10.0  # a question for the status that waits so long is not answered
_PING_INTERVAL_S = 1.0
_STUCK_TIMEOUT_S = 50.0  # how long work that nobody can do waits for actors that are away
_STARTUP_GRACE_S = 10.0  # how long work waits for actors that are not up yet and would be better for it


@dataclass
class Outcome:
    """Gate rows by owner, what held-out prompts say of them, and what came of each shard.

    `readings`: the parts of members that prompts are read in (routers/prompt_passes.py); `members_done`: members whose
    prompts have been read; `layers_done`: layers whose rows are made. `bytes_kept` are those that an earlier run had
    written. `unavailable`: actors that are not up (yet, or again). `writer`: the actor that writes what other nodes
    send, if it is up. `statuses`: the latest that actors have said, by their number; the writer's number comes after
    all others.
    """

    rows: RouterRows = field(default_factory=dict)
    summary: RouterSummary | None = None
    readings: int = 0
    members_done: int = 0
    layers_done: int = 0
    gates_done: bool = False
    shard_results: list[Any] = field(default_factory=list)
    bytes_kept: int = 0
    unavailable: list[Any] = field(default_factory=list)
    writer: Any = None
    statuses: dict[int, Status] = field(default_factory=dict)


@dataclass(eq=False)
class _Actor:
    handle: Any
    number: int = 0
    has_gpu: bool = False  # whether it was given one
    gates_for: tuple[Owner, ...] = ()  # the members whose prompts it reads now or read last
    gates_busy: bool = False
    layers_busy: int = 0
    shards_busy: int = 0
    is_up: bool = False
    info: ActorInfo | None = None  # what it said when it came up
    pending_ping: Any = None  # while it is not up: the reference of the answer that will tell, if it has been asked
    last_ping: float = 0.0
    startup_failures: int = 0  # how often in a row it died, or could not be asked, before it answered
    status: Status | None = None  # what it said last, since it came up
    pending_status: Any = None  # while it has been asked for its status: the reference of the answer
    last_status_request: float = 0.0

    def can_read(self, files: frozenset[str]) -> bool:
        return self.info is not None and not files & self.info["missing"]

    @property
    def sees_output(self) -> bool:
        return self.info is not None and self.info["output_visible"]

    @property
    def on_gpu(self) -> bool:
        return self.info is not None and self.info["device"] != "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A job that is being done by an actor; `via_writer`: written by the writer, as that actor sends it.
    `last_heartbeat`: when it was last seen to move on."""

    actor: _Actor
    job: GateJob | ShardTask
    last_heartbeat: LastHeartbeat
    via_writer: bool = False

    @property
    def heartbeat(self) -> object:
        """What its actor says of it; another value after each move."""
        if self.actor.status is None:
            return None
        name = self.job.detail.name if isinstance(self.job, ShardTask) else self.job.name
        return self.actor.status.heartbeats.get(name), self.actor.status.store_requests


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
    requirements: FileRequirements | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    transport: Transport | None = None,
) -> Outcome:
    """Compute all gate rows, and do `work` for every shard that needs none. Raises the first error.

    `gpus` says which of the actors were given a GPU. `readers` actors at most read prompts at once. An actor works on
    the routers of `layers_at_once` layers and on `shards_at_once` jobs of shards side by side.
    `requirements`: the local files that jobs read, where not all nodes have all of them. `on_tick` is called several
    times a second. A job that stands still for `stall_timeout_s` is given to another actor, once. `transport`: what the
    handles are of; the cluster that this process is connected to, if it is not said.
    """
    transport = transport or RayTransport()
    shard_tensors = tensors_read_for_shards(plan, work.reads)
    gates = GateWork(plan.gates, min(readers, len(handles)), owner_names(plan), shard_tensors, transport)
    given = zip_longest(handles, gpus, fillvalue=False)
    actors = [_Actor(handle, number, has_gpu) for number, (handle, has_gpu) in enumerate(given)]
    run = _Jobs(plan, gates, actors, work, requirements, StallClock(stall_timeout_s, transport.now), transport)
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
        requirements: FileRequirements | None,
        stall: StallClock,
        transport: Transport,
    ) -> None:
        self._transport = transport
        self.outcome, self.gates = Outcome(readings=gates.readings), gates
        self.shards = ShardQueue(list(plan.worker_shards), work)
        self.layers_at_once = self.shards_at_once = 1
        self._actors, self._count = actors, len(actors)
        self._writer: _Actor | None = None
        self._sending, self._shared_reads = work.sending, SharedReads(plan, work.reads)
        self._requirements, self._files = requirements, requirements.files if requirements is not None else ()
        self._running: dict[Any, _Run] = {}
        # by actor and files: whether it may do such shards
        self._write_eligibility: dict[tuple[_Actor, frozenset[str]], bool] = {}
        self._other_eligibility: dict[tuple[frozenset[str], bool], bool] = {}
        self._began = self._last_busy = transport.now()
        self._stall, self._last_up = stall, stall.now

    @property
    def has_work(self) -> bool:
        return bool(self.gates.is_waiting or self.shards.waiting or self.shards.ready or self._running)

    def step(self) -> None:
        """Give out work, and take what has come back within a tick."""
        self._write_eligibility, self._other_eligibility = {}, {}  # who is up does not change while work is given out
        everyone = [*self._actors, *([self._writer] if self._writer else [])]
        for actor in everyone:
            if not actor.is_up:
                self._ping(actor)
        for actor in self._actors:
            if actor.is_up:
                self._fill_gates(actor)
                self._fill_shards(actor)
        self._fail_if_stuck()
        self._poll_statuses(everyone)
        self._check_stalls()
        self.outcome.writer = self._writer.handle if self._writer is not None and self._writer.is_up else None
        self.outcome.unavailable = [actor.handle for actor in self._actors if not actor.is_up]
        pings = {actor.pending_ping: actor for actor in everyone if actor.pending_ping is not None}
        for ref in self._wait([*self._running, *pings]):
            if ref in pings:
                self._on_startup_reply(pings[ref])
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
        if (
            not actor.gates_busy
            and (job := self.gates.next_reading(lambda job: self._can_read_prompts(actor, job))) is not None
        ):
            actor.gates_for, actor.gates_busy = job.owners, True
            self._running[self.gates.start(actor.handle, job)] = self._new_run(actor, job)
        if not actor.on_gpu and any(other.is_up and other.on_gpu for other in self._actors):
            return
        while actor.layers_busy < self.layers_at_once and (job := self.gates.next_layer()) is not None:
            actor.layers_busy += 1
            self._running[self.gates.start(actor.handle, job)] = self._new_run(actor, job)

    def _can_read_prompts(self, actor: _Actor, job: GateJob) -> bool:
        """Whether an actor is to read these prompts: it can, and none with a GPU could."""
        files = self._requirements.for_members(job.owners) if self._requirements is not None else frozenset()
        if not actor.can_read(files):
            return False
        return actor.on_gpu or not self._other_actor_can(files, gpu=True)

    @property
    def _is_settling(self) -> bool:
        return self._transport.now() - self._began < _STARTUP_GRACE_S

    def _other_actor_can(self, files: frozenset[str], *, gpu: bool) -> bool:
        """Whether actors with, or without, a GPU are there that can read these files, or will be in a moment."""
        if (files, gpu) not in self._other_eligibility:
            self._other_eligibility[files, gpu] = self._find_other_actor(files, gpu)
        return self._other_eligibility[files, gpu]

    def _find_other_actor(self, files: frozenset[str], gpu: bool) -> bool:
        same_kind = [other for other in self._actors if (other.on_gpu if other.info else other.has_gpu) is gpu]
        return any(other.is_up and other.can_read(files) for other in same_kind) or (
            self._is_settling and any(other.info is None for other in same_kind)
        )

    def _fill_shards(self, actor: _Actor) -> None:
        while actor.shards_busy < self.shards_at_once:
            job = self.shards.next_for(actor.gates_for, lambda shard: self._can_write(actor, shard))
            if job is None:
                return
            actor.shards_busy += 1
            actors = sum(other.is_up for other in self._actors)
            detail = self._shared_reads.with_sharing_hints(job.detail, self.shards.names, actors)
            if actor.sees_output or self._sending is None:
                ref = self.shards.work.start(actor.handle, detail)
                self._running[ref] = self._new_run(actor, job)
            else:
                assert self._writer is not None
                ref = self._sending.start(self._writer.handle, actor.handle, detail)
                self._running[ref] = self._new_run(actor, job, via_writer=True)

    def _can_write(self, actor: _Actor, shard: Shard) -> bool:
        """Whether an actor is to do a shard: it can, and if it would have to send it, nobody can write it directly."""
        files = self._requirements.shards[shard.file_name] if self._requirements is not None else frozenset()
        if (actor, files) not in self._write_eligibility:
            self._write_eligibility[actor, files] = self._can_write_files(actor, files)
        return self._write_eligibility[actor, files]

    def _can_write_files(self, actor: _Actor, files: frozenset[str]) -> bool:
        if not actor.can_read(files):
            return False
        if actor.on_gpu and not self.gates.is_done and self._other_actor_can(files, gpu=False):
            return False  # those that read prompts leave the bytes to others (see `plan_actors`)
        if actor.sees_output or self._sending is None:
            return True
        if self._is_settling and any(other.info is None for other in self._actors):
            return False
        if any(other.is_up and other.sees_output and other.can_read(files) for other in self._actors):
            return False
        if self._writer is None:
            self._writer = _Actor(self._sending.start_writer(), self._count)
        return self._writer.is_up

    def _fail_if_stuck(self) -> None:
        """Raises MergeFailed where what is left can't be done by anybody who is here or may come soon."""
        now = self._transport.now()
        up = [actor for actor in self._actors if actor.is_up]
        are_up = bool(up) and (self._writer is None or self._writer.is_up)
        if are_up:
            self._last_up = self._stall.now
        elif self._stall.now - self._last_up >= self._stall.limit_s:
            subject = "the actor that writes to the output has not" if up else "none of the actors has"
            raise MergeFailed(
                f"{subject} been up for {human_time(self._stall.limit_s)}: Ray has no room for it, or its process "
                "stands "
                "still. Run the same command again to go on from the shards that are finished."
            )
        if self._running or not are_up:
            self._last_busy = now
            return
        away = len(up) < len(self._actors)
        if now - self._last_busy < (_STUCK_TIMEOUT_S if away else _STARTUP_GRACE_S):
            return
        missing_by_node = {actor.info["node"]: actor.info["missing"] for actor in up if actor.info is not None}
        files, label = self._first_waiting()
        missing = sorted({file for file in files if all(file in gone for gone in missing_by_node.values())})
        what = f"{missing[0]} is on none of the nodes" if missing else "no node has all the files that it takes"
        raise MergeFailed(
            f"{label}: {what} with an actor ({', '.join(sorted(missing_by_node))}). A node that had it may be lost; "
            "run the "
            "same command again when it is back, to go on from the shards that are finished."
        )

    def _first_waiting(self) -> tuple[frozenset[str], str]:
        """The files and the name of work that waits."""
        if self._requirements is None:
            return frozenset(), "the merge"
        if (shard := self.shards.first_waiting()) is not None:
            return self._requirements.shards[shard.file_name], f"{shard.file_name} ({shard.owner})"
        owners = self.gates.waiting_owners
        return self._requirements.for_members(owners), f"gates of {', '.join(map(str, owners))}"

    def _collect(self, ref: Any, run: _Run) -> None:
        """Take a job's result, or see to it that it is done again. Raises what can't be mended so."""
        actor, job = run.actor, run.job
        _free_lane(run)
        loss, result = self._result(ref, job, via_writer=run.via_writer)
        if loss == "actor" and run.via_writer and self._writer is not None:
            self._writer.is_up = False
        if loss in ("actor", "sender"):
            self._requeue(job)
            if not (loss == "actor" and run.via_writer):
                actor.is_up, actor.gates_for = False, ()
        elif loss == "states":
            assert isinstance(job, GateJob)
            self.gates.recapture(job)
        elif isinstance(job, ShardTask):
            self.shards.complete(job.opened, result)
        else:
            self.gates.complete(job, result)

    def _requeue(self, job: GateJob | ShardTask) -> None:
        """A job is to be done again, before those that wait."""
        if isinstance(job, ShardTask):
            self.shards.ready.insert(0, job)
        else:
            self.gates.requeue(job)

    def _new_run(self, actor: _Actor, job: GateJob | ShardTask, *, via_writer: bool = False) -> _Run:
        return _Run(actor, job, self._stall.begin(), via_writer)

    def _poll_statuses(self, actors: Sequence[_Actor]) -> None:
        """Take what actors say of themselves, and ask them again. One that stands still does not keep the others."""
        from ray.exceptions import RayError

        self._stall.look()
        pending = {actor.pending_status: actor for actor in actors if actor.pending_status is not None}
        for ref in self._transport.ready(list(pending), 0):
            actor, pending[ref].pending_status = pending[ref], None
            try:
                actor.status = self.outcome.statuses[actor.number] = self._transport.fetch(ref)
            except RayError:
                continue  # it is being restarted; its work is what is waited for, not its words
        now = self._transport.now()
        for actor in actors:
            if actor.is_up and actor.pending_status is None and now - actor.last_status_request >= _STATUS_INTERVAL_S:
                actor.pending_status, actor.last_status_request = actor.handle.status.remote(), now

    def _check_stalls(self) -> None:
        """Say which jobs stand still, and give them to another actor. Raises MergeFailed for one that does so again."""
        for ref, run in list(self._running.items()):
            if ref not in self._running:  # its actor has just been ended for another job
                continue
            verdict = self._stall.judge(run.last_heartbeat, run.heartbeat)
            if verdict is Verdict.WARN:
                still, left = self._stall.limit_s / 2, self._stall.limit_s / 2
                then = f"in {human_time(left)} that process is ended and another one does the job"
                say(
                    f"warning: {run.job.label}: nothing has moved for {human_time(still)} "
                    f"({_describe_actor(run.actor)}); {then}"
                )
            elif verdict is Verdict.REASSIGN:
                self._reassign(run)

    def _reassign(self, run: _Run) -> None:
        still = f"nothing has moved for {human_time(self._stall.limit_s)} ({_describe_actor(run.actor)})"
        run.job.stalls += 1
        if run.job.stalls >= _MAX_STALLS:
            raise MergeFailed(
                f"{run.job.label}: {still}, for the second time. A filesystem or network that does not answer is the "
                "usual cause. Run the same command again to go on from the shards that are finished; where work is so "
                "slow, give it more time with --stall-timeout."
            )
        say(f"warning: {run.job.label}: {still}; the process is ended and another one does the job")
        # Of a stream, whichever side does not answer; where both do, neither can be told from the other.
        sides = [run.actor, self._writer] if run.via_writer and self._writer is not None else [run.actor]
        for actor in [side for side in sides if not self._is_responsive(side)] or sides:
            self._end(actor)

    def _is_responsive(self, actor: _Actor) -> bool:
        return actor.pending_status is None or self._transport.now() - actor.last_status_request < _STATUS_TIMEOUT_S

    def _end(self, actor: _Actor) -> None:
        """End an actor's process, and take its jobs from it: Ray starts it anew, if it can be ended at all."""
        self._transport.end(actor.handle, for_good=False)
        for ref, run in list(self._running.items()):
            if actor is run.actor or (run.via_writer and actor is self._writer):
                del self._running[ref]  # a result that still comes is of no use
                _free_lane(run)
                self._requeue(run.job)
        actor.is_up, actor.gates_for = False, ()
        actor.status = actor.pending_status = None

    def _on_startup_reply(self, actor: _Actor) -> None:
        """The actor is up, or will never be. Raises MergeFailed where it was the last one, or the writer."""
        from ray.exceptions import RayError

        reply, actor.pending_ping = actor.pending_ping, None
        try:
            actor.info = self._transport.fetch(reply)
            actor.is_up, actor.startup_failures = True, 0
            self.gates.forget_actor(actor.handle)
            actor.status = actor.pending_status = None
        except RayError as error:
            self._on_startup_failure(actor, error)

    def _on_startup_failure(self, actor: _Actor, error: Exception) -> None:
        """An actor gave no answer: it is asked again, or is given up for good. Raises as `_on_startup_reply`."""
        fate = classify_failure(error)
        actor.startup_failures += not isinstance(error, _unavailable())
        if fate in (CallFailure.UNAVAILABLE, CallFailure.LOST) and actor.startup_failures < _MAX_STARTUP_FAILURES:
            return
        if actor is not self._writer:
            self._actors.remove(actor)
        subject = "the actor that writes to the output" if actor is self._writer else "no actor is left: the last one"
        if actor is self._writer or not self._actors:
            if (cause := cause_of(error)) is not error:  # it lives, and can't do what it is there for
                raise MergeFailed(f"{subject} can't work: {error_text(cause)}") from error
            raise MergeFailed(
                f"{subject} died ({first_line(cause_of(error))}). Memory may have run out; run the same command again "
                "to go on from the shards that are finished."
            ) from error

    def _wait(self, refs: list[Any]) -> list[Any]:
        """The first reference that is ready, if one is within a tick."""
        if not refs:  # all actors are away, and have just said so
            self._transport.sleep(_TICK_S)
        return self._transport.ready(refs, _TICK_S, most=1)

    def _result(self, ref: Any, job: GateJob | ShardTask, *, via_writer: bool) -> tuple[str, Any]:
        """What came back; or what was lost, as `_lost_part` says, if it has not been lost too often."""
        from ray.exceptions import RayError

        try:
            return "", self._transport.fetch(ref)
        except RayError as error:
            lost = _lost_part(error, job, via_writer=via_writer)
            job.failures += 1
            if job.failures < _MAX_ATTEMPTS:
                return lost, None
            what = "what it works with was lost with its node" if lost == "states" else "its actor died"
            raise MergeFailed(
                f"{job.label}: {what} ({first_line(cause_of(error))}), {job.failures} times. Memory may have run out; "
                "run the same command again to go on from the shards that are finished."
            ) from error

    def _ping(self, actor: _Actor) -> None:
        """Ask an actor that is away whether it is up. One that has not been started yet answers when it is; one that is
        being restarted refuses (Ray would repeat the call, and tell the user about every try), and is asked again."""
        now = self._transport.now()
        if actor.pending_ping is None and now - actor.last_ping >= _PING_INTERVAL_S:
            actor.pending_ping, actor.last_ping = actor.handle.describe.remote(self._files), now


def _unavailable() -> type[Exception]:
    """What Ray raises while it restarts an actor, which may take any time."""
    from ray.exceptions import ActorUnavailableError

    kind: type[Exception] = ActorUnavailableError
    return kind


def _free_lane(run: _Run) -> None:
    """An actor has room for another job of this kind."""
    if isinstance(run.job, ShardTask):
        run.actor.shards_busy -= 1
    elif isinstance(run.job.what, int):
        run.actor.layers_busy -= 1
    else:
        run.actor.gates_busy = False


def _describe_actor(actor: _Actor) -> str:
    """Where an actor is, for people who look for its process."""
    info = actor.info
    return f"actor {actor.number}, process {info['pid']} on {info['node']}" if info else f"actor {actor.number}"


def _lost_part(error: Exception, job: GateJob | ShardTask, *, via_writer: bool) -> str:
    """What an error of Ray's says was lost: the 'actor' that was asked, the 'sender' of what it writes, or the prompts'
    'states'. Raises what can't be mended by doing the job again."""
    from ray.exceptions import RayTaskError

    cause = cause_of(error) if isinstance(error, RayTaskError) else error
    if isinstance(cause, RaymoeError):
        raise cause from None
    if isinstance(cause, SenderLost):
        return "sender"
    fate = classify_failure(cause)
    if fate is CallFailure.FULL:
        raise _no_room(job.label, cause) from error
    if fate is CallFailure.FINAL:
        text = str(cause) if cause is not error else first_line(error)
        raise MergeFailed(f"{job.label}: {type(cause).__name__}: {text}") from error
    takes_states = isinstance(job, GateJob) and isinstance(job.what, int)  # nothing else works with what others left
    if takes_states and (fate is CallFailure.LOST or cause is not error):
        return "states"
    return "sender" if via_writer and cause is not error else "actor"


def _no_room(label: str, error: BaseException) -> MergeFailed:
    """Ray spills what its object store can't hold to the node's disk; so neither has room."""
    return MergeFailed(
        f"{label}: no room for the states of prompts: Ray's object store is full, and so is the disk that it moves "
        f"objects to ({type(error).__name__}). Start Ray with more of either (ray start --object-store-memory, "
        "--object-spilling-directory), and run the same command again to go on from the shards that are finished."
    )
