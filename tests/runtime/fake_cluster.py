"""A cluster without processes, whose time is told: actors take so long for a job, and die, come back and stand still at
the moments that a test names. Its exceptions are Ray's own.

    cluster = FakeCluster()
    actors = [cluster.actor(), cluster.actor()]
    cluster.at(2.5, lambda: cluster.kill(actors[0], back_after=1.0))
    run_jobs(plan, actors, Written(), cluster.tick, transport=cluster, ...)
    cluster.begun("write")      [(seconds, actor, job), ...]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayTaskError

from raymoe.gate_modes.layer_values import LayerRows
from raymoe.planning.plan import Shard
from raymoe.runtime.actor_pool import Helper
from raymoe.runtime.actor_status import BACKBONE_JOB, ROUTERS_JOB, ActorInfo, Status, WorkKind, reading_label
from raymoe.runtime.jobs import PeerLost
from raymoe.runtime.shard_jobs import ShardMethod
from raymoe.sources.facts import SourceFile
from raymoe.storage.outputs.protocol import ShardJob

__all__ = ["Direct", "FakeActor", "FakeCluster", "Sent", "Written"]

JOB_S = 1.0  # what a job takes
_START = 1000.0
_MOST_TICKS = 100_000


@dataclass(eq=False, repr=False)
class _Ref:
    """`at`: when it is ready, if ever; `value`: what it gives, or raises. `name` as in `Status.heartbeats`, of a
    job."""

    at: float
    value: Any
    name: str = ""
    by: tuple[FakeActor, ...] = ()
    inputs: tuple[_Ref, ...] = ()
    is_lost: bool = False


@dataclass(eq=False, repr=False)
class FakeActor:
    """An actor's handle, and what its process is like."""

    cluster: FakeCluster
    number: int
    place: ActorInfo
    up_at: float = 0.0
    is_gone: bool = False
    ran_out_of_memory: bool = False  # and is gone for that
    is_still: bool = False  # its jobs do not move on
    is_silent: bool = False  # nor does it answer
    refs: list[_Ref] = field(default_factory=list)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self, method)


@dataclass
class _Method:
    actor: FakeActor
    name: str
    returns: int = 1

    def options(self, *, name: str = "", num_returns: int = 1) -> _Method:
        return _Method(self.actor, self.name, num_returns)

    def remote(self, *arguments: Any) -> Any:
        return self.actor.cluster.call(self.actor, self.name, self.returns, arguments)


class FakeCluster:
    """The `Transport` of its actors. Times are seconds since it was made."""

    def __init__(self) -> None:
        self.actors: list[FakeActor] = []
        self.calls: list[tuple[float, FakeActor, str, str]] = []  # when, whom, what, and the job
        self.ended: list[tuple[FakeActor, bool]] = []
        self.cancelled: list[_Ref] = []
        self.raising: dict[str, Exception] = {}  # by method: what its calls raise
        self.takes: dict[str, float] = {}  # by method: how long it takes, unless JOB_S
        self._time, self._events, self._ticks = _START, list[tuple[float, Callable[[], Any]]](), 0

    def actor(
        self,
        *,
        device: str = "cpu",
        missing: Sequence[str] = (),
        sees_output: bool = True,
        up_after: float = 0.0,
        node: str = "node 1",
    ) -> FakeActor:
        number = len(self.actors)
        place = ActorInfo(
            pid=100 + number,
            node=node,
            node_id=node,
            output_visible=sees_output,
            device=device,
            missing=frozenset(missing),
        )
        self.actors.append(FakeActor(self, number, place, up_at=self._time + up_after))
        return self.actors[-1]

    @property
    def seconds(self) -> float:
        return self._time - _START

    def at(self, seconds: float, happens: Callable[[], Any]) -> None:
        self._events.append((_START + seconds, happens))

    def when(self, is_so: Callable[[], bool], happens: Callable[[], Any]) -> None:
        """Something happens at the first tick at which something is so."""

        def look() -> None:
            if is_so():
                happens()
            else:
                self._events.append((self._time + 0.1, look))

        self._events.append((self._time, look))

    def begun(self, method: str) -> list[tuple[float, FakeActor, str]]:
        return [(when, actor, job) for when, actor, what, job in self.calls if what == method]

    def busy(self, actor: FakeActor) -> bool:
        """Whether a job of the actor's is under way."""
        return any(ref.name and ref.at > self._time for ref in actor.refs)

    def tick(self, *_: Any) -> None:
        """What `run_jobs` calls between its steps."""
        self._ticks += 1
        assert self._ticks < _MOST_TICKS, f"no end after {self.seconds} s"

    # What happens to actors

    def kill(self, actor: FakeActor, *, back_after: float | None) -> None:
        """Its process ends, and what it was doing; None: it never comes back."""
        actor.is_gone, actor.is_still, actor.is_silent = back_after is None, False, False
        actor.up_at = math.inf if back_after is None else self._time + back_after
        for ref in [ref for ref in actor.refs if ref.at > self._time]:
            ref.at, ref.value = self._time, self._death(ref, actor)
        actor.refs = [ref for ref in actor.refs if not ref.name]  # what it left in the store stays

    def run_out_of_memory(self, actor: FakeActor) -> None:
        """Ray's memory monitor ends its process, and Ray has started it as often as it does."""
        actor.ran_out_of_memory = True
        self.kill(actor, back_after=None)

    def lose_node(self, actor: FakeActor, *, back_after: float | None) -> None:
        """The actor's node is lost, with the objects on it."""
        for ref in actor.refs:
            ref.is_lost = True
        self.kill(actor, back_after=back_after)

    def stand_still(self, actor: FakeActor, *, silent: bool = False) -> None:
        actor.is_still, actor.is_silent = True, silent
        for ref in actor.refs:
            if ref.name and ref.at > self._time:
                ref.at = math.inf

    def _death(self, ref: _Ref, actor: FakeActor) -> Exception:
        if len(ref.by) > 1 and ref.by[0] is not actor:  # the one that sends to another
            return RayTaskError("receive", "", PeerLost("the sender died"))
        return self._refusal(actor)

    def _refusal(self, actor: FakeActor) -> Exception:
        """What Ray raises for a call to an actor that is not up."""
        if actor.ran_out_of_memory:
            return OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.\nMore of it")
        return ActorDiedError() if actor.is_gone else ActorUnavailableError("away", b"0" * 16)

    # What actors are asked

    def call(self, actor: FakeActor, method: str, returns: int, arguments: tuple[Any, ...]) -> Any:
        if method == "describe":
            return self._answer(actor, actor.place, is_first=True)
        if method == "status":
            return self._answer(actor, self._status(actor))
        job, result = _job(method, arguments)
        by = (actor, arguments[0]) if method == "receive" else (actor,)
        self.calls.append((self.seconds, actor, method, job))
        takes = math.inf if any(each.is_still for each in by) else self.takes.get(method, JOB_S)
        inputs = tuple(each for each in _flat(arguments) if isinstance(each, _Ref))
        done = _Ref(self._time + takes, self.raising.get(method, result), job, by, inputs)
        left = [_Ref(done.at, None) for _ in range(returns - 1)]
        for each in by:
            if self._is_up(each):
                each.refs += [*left, done]
            else:
                done.at, done.value = self._time, self._death(done, each)
        return [*left, done] if left else done

    def _answer(self, actor: FakeActor, value: Any, *, is_first: bool = False) -> _Ref:
        """An actor that has never been up answers when it is; one that is restarted refuses at once, as Ray has it."""
        if actor.is_silent:
            return _Ref(math.inf, value, by=(actor,))
        if is_first and not actor.is_gone and not actor.refs:
            ref = _Ref(max(self._time, actor.up_at), value, by=(actor,))
        elif self._is_up(actor):
            ref = _Ref(self._time, value, by=(actor,))
        else:
            return _Ref(self._time, self._refusal(actor))
        actor.refs.append(ref)
        return ref

    def _is_up(self, actor: FakeActor) -> bool:
        return not actor.is_gone and actor.up_at <= self._time

    def _status(self, actor: FakeActor) -> Status:
        at = 0 if actor.is_still else self._time
        moves = {ref.name: int(10 * at) for ref in actor.refs if ref.name and ref.at > self._time}
        counts = dict.fromkeys(
            ("bytes_written", "bytes_copied_by_store", "bytes_kept", "gate_tokens", "gate_tokens_planned"), 0
        )
        counts |= dict.fromkeys(
            ("readings_counted", "store_retries", "store_requests", "peak_rss_bytes", "peak_gpu_bytes"), 0
        )
        return Status(heartbeats=moves, busy_with=(), **counts)  # type: ignore[arg-type]

    # Transport

    def now(self) -> float:
        return self._time

    def sleep(self, seconds: float) -> None:
        self._pass(self._time + seconds)

    def ready(self, refs: Sequence[_Ref], timeout_s: float, *, most: int | None = None) -> list[_Ref]:
        until, wanted = self._time + timeout_s, most or len(refs)
        while True:
            found = [ref for ref in refs if ref.at <= self._time][:wanted]
            if len(found) == wanted or self._time >= until:
                return found
            self._pass(min([until, *(ref.at for ref in refs if ref.at > self._time)]))

    def fetch(self, ref: _Ref) -> Any:
        assert ref.at <= self._time
        if any(each.is_lost for each in ref.inputs):
            raise ObjectLostError("ab" * 14, None, "")
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def run(self, function: Callable[..., Any], *arguments: Any) -> _Ref:
        """Called at once; it takes as long as `takes` says of the function's name, or no time."""
        try:
            value = function(*arguments)
        except Exception as error:
            value = error
        return _Ref(self._time + self.takes.get(function.__name__, 0.0), value)

    def end_calls(self) -> None:
        pass

    def put(self, value: Any) -> _Ref:
        return _Ref(self._time, value)

    def cancel(self, ref: _Ref) -> None:
        self.cancelled.append(ref)

    def end(self, actor: FakeActor, *, for_good: bool) -> None:
        self.ended.append((actor, for_good))
        self.kill(actor, back_after=None if for_good else 1.0)

    def _pass(self, until: float) -> None:
        """Time passes, and what is to happen in it happens."""
        while due := [event for event in self._events if event[0] <= until]:
            event = min(due, key=lambda event: event[0])
            self._events.remove(event)
            self._time = max(self._time, event[0])
            event[1]()
        self._time = until


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments, with the references to merged matrices that are inside some of them."""
    for each in arguments:
        yield each
        held = each.matrices if isinstance(each, ShardJob) else each
        yield from held.values() if isinstance(held, dict) else ()


def _job(method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    """The job's name, and what it gives."""
    if method == "capture":
        return reading_label(arguments[1]), None
    if method == "capture_inputs":
        return reading_label(arguments[1], WorkKind.INPUTS), None
    if method == "merge_layer":
        return BACKBONE_JOB, None
    if method == "fit_layer":
        rows = np.zeros((arguments[1], 4), np.float32)
        return ROUTERS_JOB, LayerRows(experts=rows, shared=None, scores=None)
    job: ShardJob = arguments[-1]
    return job.name, job.shard.file_name


class Direct(ShardMethod):
    """An actor writes, if it sees the output or need not see it."""

    def __init__(self, *, must_see_output: bool = False) -> None:
        self._must_see_output = must_see_output

    def can_use(self, actor: ActorInfo) -> bool:
        return actor["output_visible"] or not self._must_see_output

    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        return actor.write.remote(job)


class Sent(ShardMethod):
    """An actor sends to the writer, which `start` starts."""

    def __init__(self, start: Callable[[], FakeActor]) -> None:
        self.helper = Helper("the actor that writes to the output", start)

    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        return helper.receive.remote(actor, job)


class Written:
    """The shard work: every shard is one job. `done` are those that are complete."""

    def __init__(self, writer: Callable[[], FakeActor] | None = None) -> None:
        """`writer`: what starts the actor that writes for others."""
        self.done: list[str] = []
        self.methods: tuple[ShardMethod, ...] = (Direct(must_see_output=True), Sent(writer)) if writer else (Direct(),)

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return [ShardJob(shard=shard)]

    def reads(self, file: SourceFile) -> bool:
        return False

    def complete(self, shard: Shard, results: Sequence[Any]) -> str:
        assert list(results) == [shard.file_name]
        self.done.append(shard.file_name)
        return shard.file_name
