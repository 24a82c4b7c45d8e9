"""How a merge is run: nothing here changes a byte of the output."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymoe.object_store.options import StorageOptions
from raymoe.runtime.timeouts import STALL_TIMEOUT_S
from raymoe.sources.hub import HubOptions
from raymoe.storage.locations import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """`address`: a Ray cluster (None: RAY_ADDRESS, else a local one is started). `gpus_per_expert`: GPUs an actor gets
    (None: one where the cluster has GPUs and the gates need one). `actors`: most actors at once (None: as many as fit).
    `device`: `cpu` keeps the gate pass off the GPUs, `cuda` refuses to compute it elsewhere. `verbosity`: -1 quiet, 0
    normal, 1 and more verbose. `trust_record`: a verification reaches S3 by the endpoint and profile in the merge's
    record. `strict` is the plan's: actors look at all weights for NaN and infinity, and refuse them. `inputs`: what is
    read besides models, whose place no output may take. `stall_timeout_s`: seconds without progress after which a job
    is given to another actor; after half of them a warning says so. `keep_uploads`: a merge that is stopped or fails
    leaves what it has sent of unfinished shards in an S3 output, for the run that resumes it."""

    address: str | None = None
    gpus_per_expert: float | None = None
    actors: int | None = None
    device: str | None = None
    trust_remote_code: bool = False
    trust_record: bool = False
    strict: bool = False
    overwrite: bool = False
    verbosity: int = 0
    stall_timeout_s: float = STALL_TIMEOUT_S
    keep_uploads: bool = False
    hub: HubOptions = field(default_factory=HubOptions)
    storage: StorageOptions = field(default_factory=StorageOptions)
    inputs: Inputs = field(default_factory=Inputs)
