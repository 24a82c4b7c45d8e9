"""`raymoe.json`: the record of a finished merge. Enough to check every byte of it, and to make it again.

No times and no host names: the same merge gives the same record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import raymoe
from raymoe.config import MergeConfig
from raymoe.planning.types import MergePlan
from raymoe.storage.records import FileRecord

__all__ = ["RECORD_FORMAT", "merge_record"]

RECORD_FORMAT = 1


def merge_record(plan: MergePlan, config: MergeConfig, files: Sequence[FileRecord]) -> dict[str, Any]:
    """The record's content. `options` are what, besides the config, decided the output's bytes."""
    return {
        "format": RECORD_FORMAT,
        "raymoe_version": raymoe.__version__,
        "plan_digest": plan.digest,
        "architecture": plan.host,
        "dtype": plan.dtype,
        "parameters": plan.totals.parameters,
        "active_parameters": plan.totals.active_parameters,
        "config": config.to_plain(),
        "options": asdict(plan.options),
        "sources": [
            {"owner": s.owner, "model": s.label, "revision": s.revision, "adapter": s.adapter} for s in plan.sources
        ],
        "files": {record.name: {"size": record.size, "checksum": record.checksum} for record in files},
    }
