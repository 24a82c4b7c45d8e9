"""Settings of a run. None of them changes a byte of the output."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymoe.object_store.options import StorageOptions
from raymoe.runtime.timeouts import STALL_TIMEOUT_S
from raymoe.sources.hub import HubOptions
from raymoe.storage.locations import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """Settings of a run.

    `address`: a Ray cluster (None: RAY_ADDRESS, else a local one is started). `gpus_per_expert`: GPUs per actor (None:
    one if the cluster has GPUs and the gates need one). `actors`: the maximum number of actors (None: as many as fit).
    `device`: `cpu` keeps the gate pass off the GPUs, `cuda` refuses to run it elsewhere. `verbosity`: -1 quiet, 0
    normal, 1 and more verbose. `trust_record`: a verification uses the S3 endpoint and profile of the merge's record.
    `strict` is the plan's: actors check all weights for NaN and infinity, and reject them. `inputs`: what is read
    besides models; an output must not replace it. `stall_timeout_s`: seconds without progress after which a job is
    given to another actor; a warning comes after half of them. `keep_uploads`: a merge that is stopped or fails keeps
    the uploaded parts of unfinished shards in an S3 output, for the run that resumes it.
    """

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
