"""Classifies Ray's exceptions: what each says about a call to an actor.

Classes are listed by name, since Ray versions differ in which ones exist. An unlisted Ray class counts as its nearest
listed base class. Other libraries use some of these names (`torch.OutOfMemoryError`); their classes are never looked
up.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from raymoe.errors import RaymoeError


class CallFailure(Enum):
    """Why a call gave no result, which decides what happens next."""

    UNAVAILABLE = "away"
    """The process or its node died, or Ray could not make the call. The actor may answer again, so it is pinged."""
    DEAD = "gone"
    """This actor never answers again. Another actor can do the work."""
    LOST = "lost"
    """An argument or result of the call was lost with its node. It has to be computed again."""
    FULL = "full"
    """Neither the object store nor its spill disk has room. A repetition does not help."""
    FINAL = "final"
    """The call itself fails, on every actor."""


CALL_FAILURES: Mapping[str, CallFailure] = {
    **dict.fromkeys(
        [
            "ActorUnavailableError",
            "AsyncioActorExit",
            "LocalRayletDiedError",
            "NodeDiedError",
            "OutOfMemoryError",
            "RayActorError",
            "RaySystemError",
            "RpcError",
            "TaskCancelledError",
            "TaskPlacementGroupRemoved",
            "TaskUnschedulableError",
            "WorkerCrashedError",
        ],
        CallFailure.UNAVAILABLE,
    ),
    **dict.fromkeys(
        [
            "ActorDiedError",
            "ActorHandleNotFoundError",
            "ActorPlacementGroupRemoved",
            "ActorUnschedulableError",
            "RuntimeEnvSetupError",
        ],
        CallFailure.DEAD,
    ),
    **dict.fromkeys(
        [
            "ObjectFetchTimedOutError",
            "ObjectFreedError",
            "ObjectLostError",
            "ObjectReconstructionFailedError",
            "OwnerDiedError",
            "PlasmaObjectNotAvailable",
            "ReferenceCountingAssertionError",
        ],
        CallFailure.LOST,
    ),
    **dict.fromkeys(["ObjectStoreFullError", "OutOfDiskError"], CallFailure.FULL),
    **dict.fromkeys(
        [
            "ActorAlreadyExistsError",
            "AuthenticationError",
            "CrossLanguageError",
            "GetTimeoutError",
            "ObjectRefStreamEndOfStreamError",
            "OufOfBandObjectRefSerializationException",
            "PendingCallsLimitExceeded",
            "RayCgraphCapacityExceeded",
            "RayChannelError",
            "RayChannelTimeoutError",
            "RayDirectTransportError",
            "RayError",
            "RayTaskError",
            "StreamingGeneratorReplayInconsistentError",
            "UnserializableException",
            "UserCodeException",
        ],
        CallFailure.FINAL,
    ),
}


def classify_failure(error: BaseException) -> CallFailure:
    """The failure that an exception of Ray's stands for; FINAL for any other exception."""
    rays = (kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] == "ray")
    return next((CALL_FAILURES[name] for name in rays if name in CALL_FAILURES), CallFailure.FINAL)


def is_out_of_memory(error: BaseException) -> bool:
    """True if Ray's memory monitor ended the process: memory ran out on its node.

    Calls raise this when Ray does not start the actor again. While it does, they raise ActorUnavailableError, whatever
    ended the process. A process that the kernel ends looks like any other death.
    """
    from ray.exceptions import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def memory_remark(error: BaseException) -> str:
    """A remark about memory for messages about an actor's death; the start of a sentence."""
    return "Memory ran out on its node" if is_out_of_memory(error) else "Memory may have run out"


def cause_of(error: BaseException) -> BaseException:
    """The exception that an actor's method raised, if Ray wrapped it; else the error itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def error_text(error: BaseException) -> str:
    """The text of an actor's error for users. An error of raymoe's is shown whole, with its remedy. For any other, it
    is the class and the last line, which follows the traceback if there is one."""
    if isinstance(error, RaymoeError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
