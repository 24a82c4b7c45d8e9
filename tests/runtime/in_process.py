"""A cluster of one actor in this process: all of a merge but Ray.

Planning, scheduler, worker, output and report are the real ones, and the bytes are those of a merge on Ray; an actor's
process takes seconds to start, though. For tests of what a merge says, records or refuses. What happens when processes
die, stand still, or are several has tests on Ray, and tests of the scheduler with a `FakeCluster`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest

from raymoe.runtime import coordinator, expert_actor, progress, scheduler, verify
from raymoe.runtime.expert_actor import ExpertWorker
from raymoe.runtime.scheduler import Outcome

__all__ = ["in_this_process", "is_in_this_process"]

_blocks: list[None] = []  # one for each block that is open


@dataclass(eq=False)
class _Ref:
    """A call's result, or the error that it raised."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


@dataclass(frozen=True)
class _Method:
    """A worker's method as Ray's handles have it; a call is done when `remote` returns."""

    call: Callable[..., Any]
    returns: int = 1

    def options(self, *, name: str = "", num_returns: int = 1) -> _Method:
        return _Method(self.call, num_returns)

    def remote(self, *arguments: Any) -> Any:
        refs = [_Ref() for _ in range(self.returns)]
        try:
            found = self.call(*(each.get() if isinstance(each, _Ref) else each for each in arguments))
            values = list(found) if inspect.isgenerator(found) else [found]
            for ref, value in zip(refs, values, strict=True):
                ref.value = value
        except Exception as error:
            for ref in refs:
                ref.error = error
        return refs if self.returns > 1 else refs[0]


@dataclass(eq=False)
class _Actor:
    worker: ExpertWorker

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.worker, name))


@dataclass
class _Calls:
    """`Transport` of calls that are done at once."""

    sleep: Callable[[float], None] = field(default=time.sleep)

    def now(self) -> float:
        return time.monotonic()

    def ready(self, refs: Sequence[_Ref], timeout_s: float, *, most: int | None = None) -> list[_Ref]:
        return list(refs)[:most]

    def fetch(self, ref: _Ref) -> Any:
        return ref.get()

    def run(self, function: Callable[..., Any], *arguments: Any) -> _Ref:
        ref: _Ref = _Method(function).remote(*arguments)
        return ref

    def end_calls(self) -> None:
        pass

    def put(self, value: Any) -> _Ref:
        return _Ref(value)

    def cancel(self, ref: _Ref) -> None:
        pass

    def end(self, actor: _Actor, *, for_good: bool) -> None:
        raise AssertionError("an actor that answers is not ended")


class _NoMetrics:
    def __init__(self, *_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass


def _run_here(
    plan: Any, work: Any, actor_plan: None, shown: progress.Progress, settings: Any, *, output: Any, run: str = ""
) -> Outcome:
    """`run_on_actors` with the one actor."""
    actors, calls = [_Actor(ExpertWorker(output, settings, run))], _Calls()
    outcome = scheduler.run_jobs(
        plan,
        actors,
        work,
        shown.watch(actors),
        readers=1,
        layers_at_once=1,
        shards_at_once=1,
        stall_timeout_s=settings.stall_timeout_s,
        transport=calls,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.wait", lambda refs, **_: (refs, []))
        patch.setattr("ray.get", lambda ref: ref.get())
        shown.final_update(actors, outcome)
    return outcome


def is_in_this_process() -> bool:
    """Whether merges and verifications run here now."""
    return bool(_blocks)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Merges and verifications in the block run here, whether functions or commands begin them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (coordinator, verify):
            patch.setattr(module, "ray_connection", lambda settings: nullcontext())
            patch.setattr(module, "locate_sources", lambda *_: None)
            patch.setattr(module, "plan_actors", lambda *_: None)
            patch.setattr(module, "run_on_actors", _run_here)
        # What only a process of its own may do to itself.
        patch.setattr(expert_actor, "set_up_process", lambda: None)
        patch.setattr(expert_actor, "prioritize_gate_threads", lambda: None)
        patch.setattr(expert_actor, "limit_threads", lambda *_: None)
        patch.setattr(expert_actor, "fetch_object", lambda ref: ref.get())
        patch.setattr(progress, "MergeMetrics", _NoMetrics)
        _blocks.append(None)
        try:
            yield
        finally:
            _blocks.pop()
