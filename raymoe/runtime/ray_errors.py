"""Ray's exceptions, sorted once: what each of them says of a call to an actor.

Every class is in the table by its name, since versions of Ray differ in what they have. A class of Ray's that is not in
it counts as its nearest base class that is. Other libraries use some of these names (`torch.OutOfMemoryError`): their
classes are never looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from raymoe.errors import RaymoeError


class CallFailure(Enum):
    """What became of a call that gave no result, and so what is to be done."""

    UNAVAILABLE = "away"
    """The process or its node died, or Ray could not make the call. The actor may answer again: it is asked."""
    DEAD = "gone"
    """This actor never answers again. Another actor can do the work."""
    LOST = "lost"
    """An object that the call takes or gives was lost with its node. It has to be made again."""
    FULL = "full"
    """Neither the object store nor the disk that it spills to has room. Doing the same again does not help."""
    FINAL = "final"
    """The call itself fails, wherever it is made."""


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
    """What an exception of Ray's says of the call; FINAL for any other exception."""
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
    """What a message says of memory where an actor died; the start of a sentence."""
    return "Memory ran out on its node" if is_out_of_memory(error) else "Memory may have run out"


def cause_of(error: BaseException) -> BaseException:
    """What a method of an actor raised, where Ray wraps it; else the error itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def first_line(error: BaseException) -> str:
    """The first line that an error has to say, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def error_text(error: BaseException) -> str:
    """What an error of an actor says to people: an error of raymoe all, with its remedy; any other its class and last
    line, which follows the traceback if it has one."""
    if isinstance(error, RaymoeError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
