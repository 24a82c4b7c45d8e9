"""Looks at a merge from outside: which of its actors are up and what they are at, and which shards are finished.

Actors are asked by a connection of its own to the cluster, as anybody on it could; shards are counted in the output's
journal. Nothing here waits: answers are taken when they come.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from raymoe.runtime.actor_status import Working, WorkKind
from tests.processes import below, titled
from tests.soak.compare import RECORD, noted_shards
from tests.soak.places import Place

__all__ = ["INTERNAL", "Actor", "Seen", "Watch", "actor_processes", "connected"]

INTERNAL = "_ray_internal"
"""How the names of Ray's own actors begin."""


@dataclass(kw_only=True)
class Actor:
    """An expert actor. `pid` and `busy_with` are None while it is not known to be up."""

    handle: Any
    pid: int | None = None
    busy_with: tuple[Working, ...] | None = None
    _asked: dict[Any, str] = field(default_factory=dict)

    def look(self) -> None:
        """Take answers that have come, and ask again."""
        import ray

        for ref in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else ():
            question = self._asked.pop(ref)
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayError:  # it has died, or is being restarted
                self.pid = self.busy_with = None
                continue
            if question == "describe":
                self.pid = answer["pid"]
            else:
                self.busy_with = answer.busy_with
        if not self._asked:
            question = "describe" if self.pid is None else "status"
            self._asked[getattr(self.handle, question).remote()] = question


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a merge is at: one of MOMENTS (cases.py). `up`: processes of its actors, with what they are busy with."""

    at: str
    done: int
    up: Mapping[int, tuple[Working, ...]]


class Watch:
    """Follows a run of a merge whose actors write `shards` shards and, with `has_gates`, run models for the routers.
    `is_blind`: the actors can't be seen from here."""

    def __init__(self, place: Place, shards: int, *, has_gates: bool, is_blind: bool = False) -> None:
        self._place, self._shards, self._has_gates, self._is_blind = place, shards, has_gates, is_blind
        self._actors: dict[str, Actor] = {}
        self._was_up = False
        self._gate_moment = "prompts"  # while nobody is busy: what was seen last, or is to come
        self._done_first = shards_done(place)  # by an earlier run

    def look(self) -> Seen:
        if not self._is_blind:
            self._find_actors()
        done = shards_done(self._place)
        actors = self._actors.values()
        up = {a.pid: a.busy_with for a in actors if a.pid is not None and a.busy_with is not None}
        self._was_up = self._was_up or bool(up)
        return Seen(at=self._moment(up, done), done=self._shards if done is None else done, up=up)

    def _find_actors(self) -> None:
        import ray

        names = {actor["name"]: actor["namespace"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        names = {name: space for name, space in names.items() if not name.startswith(INTERNAL)}
        self._actors = {name: actor for name, actor in self._actors.items() if name in names}
        for name, namespace in names.items():
            if name not in self._actors:
                with contextlib.suppress(ValueError):  # it has gone already
                    self._actors[name] = Actor(handle=ray.get_actor(name, namespace))
        for actor in self._actors.values():
            actor.look()

    def _moment(self, up: Mapping[int, tuple[Working, ...]], done: int | None) -> str:
        kinds = {job.kind for busy_with in up.values() for job in busy_with}
        is_reading = WorkKind.PROMPTS in kinds
        if is_reading or WorkKind.ROUTERS in kinds:
            self._gate_moment = "prompts" if is_reading else "routers"
            return self._gate_moment
        if not self._was_up and done == self._done_first:
            return "start"
        if done is not None and done < self._shards:
            return "shards"
        return self._gate_moment if self._has_gates and up and done is not None else "end"


def shards_done(place: Place) -> int | None:
    """How many shards the output's journal calls finished; None where the whole merge is."""
    files = place.files()
    if RECORD in files:
        return None
    return noted_shards(files)


def actor_processes(pids: list[int]) -> list[psutil.Process]:
    """Processes of expert actors below these."""
    return titled(below(*pids), "ray::ExpertActor")


@contextmanager
def connected(environment: Mapping[str, str]) -> Iterator[None]:
    """A connection of this process to the cluster of this environment, whose token it uses from now on."""
    os.environ.update(environment)
    import ray  # reads the way of authentication as it is imported

    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(namespace="chaos", logging_level="ERROR", log_to_driver=False)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in the place of it
    try:
        yield
    finally:
        ray.shutdown()
