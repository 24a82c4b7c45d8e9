"""What jobs for actors have in common, and what a job that failed has lost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.runtime.ray_errors import CallFailure, cause_of, classify_failure, first_line


class Lost(Enum):
    """What a job lost, so that it has to be done again."""

    ACTOR = "the actor that was called"
    PEER = "the other actor of the job, with which the called one works"
    STATES = "the states of prompts, with their node"


class PeerLost(Exception):
    """Raised by an actor whose job needs another actor: that one died, or its node did; the one that raises is well."""


@dataclass(eq=False, kw_only=True)
class Job(ABC):
    """A piece of work for an actor. `failures`: how often an actor died over it or input was lost; `stalls`: how often
    it stood still."""

    failures: int = 0
    stalls: int = 0
    takes_states: ClassVar[bool] = False  # whether it works with what other jobs left in Ray's store

    @property
    @abstractmethod
    def label(self) -> str:
        """What messages call it."""

    @property
    @abstractmethod
    def heartbeat_name(self) -> str:
        """What an actor calls it in `Status.heartbeats`."""

    @abstractmethod
    def complete(self, result: Any) -> None:
        """It is done."""

    @abstractmethod
    def requeue(self) -> None:
        """It is to be done again, before those that wait."""

    def recover(self, lost: Lost) -> None:
        """Something was lost: see to it that the work is done again."""
        self.requeue()


def lost_part(error: Exception, job: Job) -> Lost:
    """What an error of Ray's says was lost. Raises what can't be mended by doing the job again."""
    from ray.exceptions import RayTaskError

    cause = cause_of(error) if isinstance(error, RayTaskError) else error
    if isinstance(cause, RaymoeError):
        raise cause from None
    if isinstance(cause, PeerLost):
        return Lost.PEER
    fate = classify_failure(cause)
    if fate is CallFailure.FULL:
        raise _no_room(job.label, cause) from error
    if fate is CallFailure.FINAL:
        text = str(cause) if cause is not error else first_line(error)
        raise MergeFailed(f"{job.label}: {type(cause).__name__}: {text}") from error
    if job.takes_states and (fate is CallFailure.LOST or cause is not error):
        return Lost.STATES
    return Lost.ACTOR


def _no_room(label: str, error: BaseException) -> MergeFailed:
    """Ray spills what its object store can't hold to the node's disk; so neither has room."""
    return MergeFailed(
        f"{label}: no room for the states of prompts: Ray's object store is full, and so is the disk that it moves "
        f"objects to ({type(error).__name__}). Start Ray with more of either (ray start --object-store-memory, "
        "--object-spilling-directory), and run the same command again to go on from the shards that are finished."
    )
