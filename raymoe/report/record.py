"""`raymoe.json`: the record of a finished merge. Enough to check every byte of it, and to make it again.

No times and no host names: the same merge gives the same record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from raymoe._version import __version__
from raymoe.config import MergeConfig
from raymoe.gates.summary import RouterSummary
from raymoe.planning.types import MergePlan
from raymoe.sources.local import has_changed, recorded_sample
from raymoe.sources.prompts import prompt_file_place
from raymoe.storage.records import FileRecord

__all__ = ["RECORD_FORMAT", "merge_record", "prompt_records"]

RECORD_FORMAT = 1


def merge_record(
    plan: MergePlan, config: MergeConfig, files: Sequence[FileRecord], summary: RouterSummary | None
) -> dict[str, Any]:
    """The record's content. `options` are what, besides the config, decided the output's bytes."""
    samples = {
        file.location: sample
        for source in plan.sources
        for file in source.files
        if not has_changed(file) and (sample := recorded_sample(file)) is not None
    }
    return {
        "format": RECORD_FORMAT,
        "raymoe_version": __version__,
        "plan_digest": plan.digest,
        "architecture": plan.host,
        "dtype": plan.dtype,
        "parameters": plan.totals.parameters,
        "active_parameters": plan.totals.active_parameters,
        "config": config.to_plain(),
        "prompt_files": prompt_records(plan, config),
        "routers": summary.plain() if summary else None,
        # Records of merges that are not strict stay what they were.
        "options": {key: value for key, value in asdict(plan.options).items() if key != "strict" or value},
        "sources": [
            {"owner": s.owner, "model": s.label, "revision": s.revision, "adapter": s.adapter} for s in plan.sources
        ],
        # Weight files of this machine as they were: `refusals` compares, so that no newer model is passed over.
        **({"local_files": dict(sorted(samples.items()))} if samples else {}),
        "files": {record.name: {"size": record.size, "checksum": record.checksum} for record in files},
    }


def prompt_records(plan: MergePlan, config: MergeConfig) -> list[dict[str, Any]]:
    """Each file of prompts in `config`, and what was drawn from it: number of texts, SHA-256 of their JSON list."""
    drawn = {prompts.owner: prompts for prompts in (*plan.gates.experts, *plan.gates.shared)}
    records = []
    for (experts, number, key), file in config.prompt_files.items():
        prompts = drawn[f"{'expert' if experts == 'experts' else 'shared'} {number}"]
        texts = prompts.positive if key == "positive_prompts" else prompts.negative
        digest = hashlib.sha256(json.dumps(texts, separators=(",", ":")).encode()).hexdigest()
        place = prompt_file_place(file)
        records.append({"owner": prompts.owner, "key": key, "file": place, "count": len(texts), "sha256": digest})
    return records
