"""Schedules the actors' work and collects the results.

Every actor has two lanes that run at once: gates (see router_jobs.py) and shards. An actor that reads an expert's
prompts writes that expert's shards first, then the base's, then any others, so that no actor idles while there is work.
If there are more experts than actors, an actor takes the next expert when it has finished one.

Work goes to actors that can do it: they see the local source files that it needs (`FileRequirements`), and have a GPU
if any actor has one. An actor does a shard by one of the work's methods (`ShardMethod`). A method may need a helper: an
actor that takes no work of its own. The merge ends within a minute if no actor can do some work, because the only node
with its files is lost.

If an actor dies, its jobs are requeued at the front, for the next actor with room. Ray restarts the actor, which may
take long or never happen (its node is gone and no other has room). It gets work again when it answers. An actor that
the cluster has no room for yet is handled in the same way.

A process may also stall without dying (see stall.py). The coordinator warns about a job that makes no progress, then
ends its process as if it had died. If the same job stalls a second time, the merge ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from raymoe.console import say
from raymoe.errors import MergeFailed
from raymoe.formatting import human_time
from raymoe.planning.plan import MergePlan
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.router_matrices import RouterRows
from raymoe.runtime.actor_pool import ActorEvent, ActorPool, Lane, PoolActor
from raymoe.runtime.actor_status import Status
from raymoe.runtime.eligibility import Eligibility
from raymoe.runtime.jobs import Job, Lost, lost_part
from raymoe.runtime.moment_jobs import MomentWork
from raymoe.runtime.placement import FileRequirements, owner_names
from raymoe.runtime.ray_errors import cause_of, first_line, memory_remark
from raymoe.runtime.router_jobs import GateWork, PromptWork, ReadPromptsJob
from raymoe.runtime.shard_jobs import ShardQueue, ShardWork, SharedReads, WriteShardJob, tensors_read_for_shards
from raymoe.runtime.stall import LastHeartbeat, StallClock, Verdict
from raymoe.runtime.stuck import StuckCheck
from raymoe.runtime.timeouts import STALL_TIMEOUT_S, STARTUP_GRACE_S, TICK_S
from raymoe.runtime.transport import RayTransport, Transport
from raymoe.storage.outputs.protocol import ShardJob

_MAX_ATTEMPTS = 3  # per job: if it kills every actor that takes it, a fourth would not finish it either
_OPENED_AHEAD = 16  # shards with jobs that wait for actors; opening a shard takes several requests to a store
_MAX_STALLS = 2  # per job: the second time, the actor is not the cause


@dataclass
class Outcome:
    """Gate rows by owner, the scores on held-out prompts, and the result of each shard.

    `readings`: the parts of members that prompts are read in (routers/prompt_passes.py); `members_done`: members with
    all prompts read; `layers_done`: layers with computed rows. `bytes_kept` were written by an earlier run.
    `backbone_members_done` and `backbone_layers_done`: the same of a backbone that is merged by what prompts give.
    `unavailable`: actors that are not up (yet, or again). `helpers`: helpers that are up, by number. `statuses`: the
    latest statuses of actors and helpers, by number.
    """

    rows: RouterRows = field(default_factory=dict)
    summary: RouterSummary | None = None
    readings: int = 0
    members_done: int = 0
    layers_done: int = 0
    gates_done: bool = False
    backbone_members_done: int = 0
    backbone_layers_done: int = 0
    backbone_done: bool = True
    shard_results: list[Any] = field(default_factory=list)
    bytes_kept: int = 0
    unavailable: list[Any] = field(default_factory=list)
    helpers: dict[int, Any] = field(default_factory=dict)
    statuses: dict[int, Status] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A job that an actor is doing in one of its lanes. If the job needs a helper, the helper is the one that is
    called. `last_heartbeat`: when the job was last seen to make progress."""

    actor: PoolActor
    lane: Lane
    job: Job
    last_heartbeat: LastHeartbeat
    helper: PoolActor | None = None

    @property
    def actors(self) -> tuple[PoolActor, ...]:
        """All actors that take part: if one of them dies, the job is done again."""
        return (self.actor,) if self.helper is None else (self.actor, self.helper)

    def lost_actor(self, lost: Lost) -> PoolActor | None:
        """The actor that was lost, if an actor was lost."""
        if lost is Lost.STATES:
            return None
        return self.helper if self.helper is not None and lost is Lost.ACTOR else self.actor

    @property
    def heartbeat(self) -> object:
        """The job's progress as its actor reports it; the value changes with each step."""
        if self.actor.status is None:
            return None
        return self.actor.status.heartbeats.get(self.job.heartbeat_name), self.actor.status.store_requests


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
    copiers: Sequence[Any] = (),
    copies_at_once: int = 1,
    requirements: FileRequirements | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    transport: Transport | None = None,
) -> Outcome:
    """Compute all gate rows, and do `work` for every shard that needs none. Raises the first error.

    `gpus` says which of the actors were given a GPU. At most `readers` actors read prompts at once. An actor works on
    the routers of `layers_at_once` layers and on `shards_at_once` shard jobs at once. `copiers` are further actors,
    which only request server-side copies, each for `copies_at_once` parts at once. `requirements`: the local files that
    jobs read, if some nodes lack some of them. `on_tick` is called several times per second. A job that stalls for
    `stall_timeout_s` is given to another actor, once. `transport`: how the handles are called; by default, the cluster
    that this process is connected to.
    """
    transport = transport or RayTransport()
    shard_tensors = tensors_read_for_shards(plan, work.reads)
    names, readers = owner_names(plan), min(readers, len(handles))
    gates = GateWork(plan.gates, readers, names, shard_tensors, transport)
    moments = MomentWork(plan.moments, readers, names, transport)
    actors = [
        PoolActor(handle, number, has_gpu, layers=Lane(layers_at_once), shards=Lane(shards_at_once))
        for number, (handle, has_gpu) in enumerate(zip_longest(handles, gpus, fillvalue=False))
    ]
    actors += [
        PoolActor(
            handle,
            number,
            only_copies=True,
            prompts=Lane(0),
            layers=Lane(0),
            shards=Lane(copies_at_once, weigh=lambda job: max(1, job.detail.copies)),
        )
        for number, handle in enumerate(copiers, start=len(actors))
    ]
    pool = ActorPool(actors, transport, requirements.files if requirements is not None else ())
    run = _Jobs(plan, gates, moments, pool, work, requirements, StallClock(stall_timeout_s, transport.now), transport)
    try:
        while run.has_work:
            run.step()
            on_tick(run.outcome)
    finally:
        run.end()
    run.outcome.rows, run.outcome.summary = gates.result()
    return run.outcome


class _Jobs:
    """The state of `run_jobs`: waiting jobs, running jobs, and the actors."""

    def __init__(
        self,
        plan: MergePlan,
        gates: GateWork,
        moments: MomentWork,
        pool: ActorPool,
        work: ShardWork,
        requirements: FileRequirements | None,
        stall: StallClock,
        transport: Transport,
    ) -> None:
        self._transport, self._pool, self._stall = transport, pool, stall
        self.outcome = Outcome(readings=gates.readings, statuses=pool.statuses)
        self.gates, self.moments = gates, moments
        self.shards = ShardQueue(list(plan.worker_shards), work, transport)
        self._shared_reads = SharedReads(plan, work.reads)
        self._requirements = requirements
        self._running: dict[Any, _Run] = {}
        self._stuck = StuckCheck(pool, stall, transport.now)
        began = transport.now()
        self._eligibility = Eligibility(
            pool,
            requirements,
            methods=work.methods,
            is_settling=lambda: transport.now() - began < STARTUP_GRACE_S,
            has_read_prompts=lambda: gates.is_done and moments.is_done,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.moments.is_waiting or self.gates.is_waiting or self.shards.has_work or self._running)

    def step(self) -> None:
        """Give out work, and take all results that arrive within a tick."""
        self._pool.ping_absent()
        self._give_out_work()
        self._stuck.check(is_busy=bool(self._running or self.shards.calls), first_waiting=self._first_waiting)
        self._stall.look()
        self._pool.poll_statuses()
        self._check_stalls()
        self._take_results()
        self._update_outcome()

    def end(self) -> None:
        """Stop: no more results are needed."""
        for ref in self._running:
            self._transport.cancel(ref)
        self._pool.end_helpers()
        self._transport.end_calls()

    def _give_out_work(self) -> None:
        self._eligibility.refresh()
        for helper in self._eligibility.missing_helpers(self.shards.unfinished):
            self._pool.start_helper(helper)
        for actor in self._pool.up:
            self._fill_prompts(actor)
            self._fill_layers(actor)
        self.shards.open_ahead(
            (actor.reads_for for actor in self._pool.up), _OPENED_AHEAD + len(self._pool.actors), self._can_start
        )
        for actor in self._pool.up:
            self._fill_shards(actor)

    def _fill_prompts(self, actor: PoolActor) -> None:
        if not actor.prompts.has_room:
            return
        # The models that read the prompts of the gates have the merged backbone.
        work = self.gates if self.moments.is_done else self.moments
        job = work.next_reading(lambda job: self._eligibility.can_read_prompts(actor, job.owners))
        if job is not None:
            job.matrices = self.moments.matrices if work is self.gates else {}
            actor.reads_for = job.owners
            self._begin(job.start(actor.handle), actor, actor.prompts, job)

    def _fill_layers(self, actor: PoolActor) -> None:
        if not self._eligibility.can_fit_layers(actor):
            return
        works: list[PromptWork] = [self.moments] if self._eligibility.can_merge_backbone(actor) else []
        for work in (*works, self.gates):
            while actor.layers.has_room and (job := work.next_layer()) is not None:
                self._begin(job.start(actor.handle), actor, actor.layers, job)

    def _can_start(self, job: ShardJob) -> bool:
        """Whether all matrices of the backbone that a job writes are merged. Copies need none."""
        return job.asks_store or self.moments.has_all_for(job.shard)

    def _fill_shards(self, actor: PoolActor) -> None:
        while actor.shards.has_room:
            job = self.shards.next_for(
                actor.reads_for, lambda job: self._can_start(job) and self._eligibility.can_do(actor, job)
            )
            if job is None:
                return
            if matrices := {} if job.detail.asks_store else self.moments.needed_by(job.detail.shard):
                job.detail = replace(job.detail, matrices=matrices)
            detail = self._shared_reads.with_sharing_hints(job.detail, self.shards.names, len(self._pool.up))
            method = self._eligibility.method(actor, job.detail)
            assert method is not None, f"{job.label}: given to an actor that may not do it"
            helper = self._pool.helpers[method.helper] if method.helper is not None else None
            ref = method.start(actor.handle, detail, helper.handle if helper is not None else None)
            self._begin(ref, actor, actor.shards, job, helper)

    def _begin(self, ref: Any, actor: PoolActor, lane: Lane, job: Job, helper: PoolActor | None = None) -> None:
        """An actor has been asked to do a job; `ref` is ready when it is done."""
        lane.running.add(job)
        self._running[ref] = _Run(actor, lane, job, self._stall.begin(), helper)

    def _pop(self, ref: Any) -> _Run:
        """Remove a job that no longer runs: its actor has room for another one of this kind."""
        run = self._running.pop(ref)
        run.lane.running.discard(run.job)
        return run

    def _first_waiting(self) -> tuple[frozenset[str], str]:
        """The files and the name of the first waiting work."""
        if self._requirements is None:
            return frozenset(), "the merge"
        if (shard := next(self.shards.unfinished(), None)) is not None:
            return self._requirements.shards[shard.file_name], f"{shard.file_name} ({shard.owner})"
        owners = self.moments.waiting_owners or self.gates.waiting_owners
        return self._requirements.for_members(owners), f"gates of {', '.join(map(str, owners))}"

    def _take_results(self) -> None:
        pings = self._pool.pending_pings
        for ref in self._wait([*self._running, *self.shards.calls, *pings]):
            if ref in self.shards.calls:
                self.shards.take(ref)
            elif ref not in pings:
                self._collect(ref, self._pop(ref))
            elif self._pool.take_ping_reply(pings[ref]):
                self.gates.forget_actor(pings[ref].handle)

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Wait up to a tick for a first reference; returns all references that are ready then."""
        if not refs:  # all actors are unavailable, and have just failed to answer
            self._transport.sleep(TICK_S)
        return self._transport.ready(refs, 0) if self._transport.ready(refs, TICK_S, most=1) else []

    def _update_outcome(self) -> None:
        outcome = self.outcome
        outcome.helpers = {helper.number: helper.handle for helper in self._pool.helpers.values() if helper.is_up}
        outcome.unavailable = [actor.handle for actor in self._pool.actors if not actor.is_up]
        outcome.members_done, outcome.layers_done = self.gates.members_done, self.gates.layers_done
        outcome.gates_done, outcome.backbone_done = self.gates.is_done, self.moments.is_done
        outcome.backbone_members_done = self.moments.members_done
        outcome.backbone_layers_done = self.moments.layers_done
        outcome.shard_results, outcome.bytes_kept = self.shards.results, self.shards.bytes_kept

    def _collect(self, ref: Any, run: _Run) -> None:
        """Take a job's result, or requeue it. Raises an error that a repetition can't fix."""
        lost, result = self._result(ref, run)
        if lost is None:
            run.job.complete(result)
            return
        if lost is Lost.STATES and isinstance(run.job, (ReadPromptsJob, WriteShardJob)):
            self.moments.merge_again(run.job.matrices)
        run.job.recover(lost)
        if (actor := run.lost_actor(lost)) is not None:
            self._pool.change(actor, ActorEvent.LOST)

    def _check_stalls(self) -> None:
        """Warn about stalled jobs, and give them to another actor. Raises MergeFailed for a job that stalls again."""
        for ref, run in list(self._running.items()):
            if ref not in self._running:  # its actor has just been ended because of another job
                continue
            verdict = self._stall.judge(run.last_heartbeat, run.heartbeat)
            if verdict is Verdict.WARN:
                half = human_time(self._stall.limit_s / 2)
                say(
                    f"warning: {run.job.label}: no progress for {half} ({run.actor.description}); "
                    f"in {half} that process is ended and another actor takes the job"
                )
            elif verdict is Verdict.REASSIGN:
                self._reassign(run)

    def _reassign(self, run: _Run) -> None:
        still = f"no progress for {human_time(self._stall.limit_s)} ({run.actor.description})"
        run.job.stalls += 1
        if run.job.stalls >= _MAX_STALLS:
            raise MergeFailed(
                f"{run.job.label}: {still}, for the second time. A filesystem or network that does not answer is the "
                "usual cause. Run the same command again to go on from the shards that are finished; where work is so "
                "slow, give it more time with --stall-timeout."
            )
        say(f"warning: {run.job.label}: {still}; the process is ended and another actor takes the job")
        # Of several actors, end those that do not answer; if all answer, the stalled one can't be told apart.
        for actor in [each for each in run.actors if not self._pool.is_responsive(each)] or run.actors:
            self._end_actor(actor)

    def _end_actor(self, actor: PoolActor) -> None:
        """End an actor's process and requeue its jobs. Ray restarts it, if the process can be ended at all."""
        self._transport.end(actor.handle, for_good=False)
        for ref, run in list(self._running.items()):
            if actor in run.actors:
                self._pop(ref).job.requeue()  # a result that still arrives is ignored
        self._pool.change(actor, ActorEvent.LOST)

    def _result(self, ref: Any, run: _Run) -> tuple[Lost | None, Any]:
        """The result; or what was lost, if the job has not failed too often."""
        from ray.exceptions import RayError

        try:
            return None, self._transport.fetch(ref)
        except RayError as error:
            job, lost = run.job, lost_part(error, run.job)
            job.failures += 1
            if (actor := run.lost_actor(lost)) is not None:
                self._pool.note_memory(actor, error)
            if job.failures < _MAX_ATTEMPTS:
                return lost, None
            what = "its input was lost with its node" if lost is Lost.STATES else "its actor died"
            raise MergeFailed(
                f"{job.label}: {what} ({first_line(cause_of(error))}), {job.failures} times. {memory_remark(error)}; "
                "run the same command again to go on from the shards that are finished."
            ) from error
