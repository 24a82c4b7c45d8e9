"""The interface of jobs for actors, and what a failed job has lost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.runtime.ray_errors import CallFailure, cause_of, classify_failure, first_line


class Lost(Enum):
    """What a job lost, so that it must run again."""

    ACTOR = "the actor that was called"
    PEER = "the other actor of the job, with which the called one works"
    STATES = "the states of prompts, with their node"


class PeerLost(Exception):
    """Raised by an actor if the other actor of its job, or that actor's node, died. The raising actor is healthy."""


@dataclass(eq=False, kw_only=True)
class Job(ABC):
    """A piece of work for an actor. `failures`: how often an actor died during it or its input was lost; `stalls`: how
    often it stalled."""

    failures: int = 0
    stalls: int = 0

    @property
    def takes_states(self) -> bool:
        """Whether its input is the output of other jobs in Ray's object store."""
        return False

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in messages."""

    @property
    @abstractmethod
    def heartbeat_name(self) -> str:
        """Its name in `Status.heartbeats`."""

    @abstractmethod
    def complete(self, result: Any) -> None:
        """Called when it is done."""

    @abstractmethod
    def requeue(self) -> None:
        """Put it back to the front of the queue."""

    def recover(self, lost: Lost) -> None:
        """Handle a loss: make sure that the work is done again."""
        self.requeue()


def lost_part(error: Exception, job: Job) -> Lost:
    """What was lost, according to an error of Ray's. Raises MergeFailed if a repetition of the job can't help."""
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
    """Ray spills objects that its object store can't hold to the node's disk; so both are full."""
    return MergeFailed(
        f"{label}: no room for the states of prompts: Ray's object store is full, and the disk that it moves "
        f"objects to is full too ({type(error).__name__}). Start Ray with more of either (ray start "
        "--object-store-memory, --object-spilling-directory), and run the same command again to go on from the shards "
        "that are finished."
    )
