"""What an actor reports about itself: where it runs, what it works on, and what it has done so far."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypedDict

from raymoe.planning.plan import GatePrompts
from raymoe.routers.prompt_passes import Reading

ROUTERS_JOB = "routers"  # the name of router computation in `Status.heartbeats`
BACKBONE_JOB = "backbone"  # the same of merging a layer of the backbone


class WorkKind(Enum):
    """What an actor does with the subject of its work."""

    PROMPTS = "reads the prompts of members"
    ROUTERS = "makes the routers of a layer"
    INPUTS = "reads the prompts of members for the backbone"
    BACKBONE = "merges the backbone of a layer"
    SHARD = "writes, sends or compares a shard"
    RECEIVE = "writes a shard that another actor sends"


@dataclass(frozen=True, slots=True)
class Working:
    """What an actor works on. `subject`: the members of the prompts that it reads, or a shard's file name."""

    kind: WorkKind
    subject: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The text that users see."""
        subject = ", ".join(self.subject)
        labels = {
            WorkKind.PROMPTS: f"gates of {subject}",
            WorkKind.ROUTERS: ROUTERS_JOB,
            WorkKind.INPUTS: f"backbone inputs of {subject}",
            WorkKind.BACKBONE: BACKBONE_JOB,
            WorkKind.SHARD: subject,
            WorkKind.RECEIVE: f"receive {subject}",
        }
        return labels[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What an actor has done so far.

    `gate_tokens` counts tokens that have passed a layer, once per layer. `gate_tokens_planned` is the total for the
    `readings_counted` parts of members that the actor has begun to read. `heartbeats` counts by job how often it made
    progress (see job_activity.py). `store_requests` counts requests to object stores, which have timeouts and retries
    of their own. `warnings` name the first tensors with findings; `warnings_left_out` is the number of the others.
    """

    bytes_written: int
    bytes_copied_by_store: int
    bytes_kept: int
    gate_tokens: int
    gate_tokens_planned: int
    readings_counted: int
    store_retries: int
    store_requests: int
    heartbeats: Mapping[str, int]
    peak_rss_bytes: int
    peak_gpu_bytes: int
    busy_with: tuple[Working, ...]
    warnings: tuple[str, ...] = ()
    warnings_left_out: int = 0


class ActorInfo(TypedDict):
    """What an actor reports when it comes up: its process, its node (as text, and Ray's id), whether it sees the
    output, its compute device, and which of the requested files it can't read."""

    pid: int
    node: str
    node_id: str
    output_visible: bool
    device: str
    missing: frozenset[str]


def reading_label(members: Sequence[GatePrompts], kind: WorkKind = WorkKind.PROMPTS) -> str:
    """The name of the job that reads these prompts."""
    names = (member.name if isinstance(member, Reading) else str(member.owner) for member in members)
    return Working(kind, tuple(names)).label


def node_name() -> str:
    """This node's name in messages: its host name, and its address in Ray."""
    host = socket.gethostname()
    if "ray" not in sys.modules:
        return f"node {host}"
    import ray

    return f"node {ray.util.get_node_ip_address()} ({host})" if ray.is_initialized() else f"node {host}"
