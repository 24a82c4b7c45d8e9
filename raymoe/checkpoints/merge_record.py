"""`raymoe.json`: the record of a finished merge. Enough to check every byte of it, and to make it again.

No times and no host names: the same merge gives the same record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from raymoe._version import __version__
from raymoe.config import MergeConfig
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import short_list
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.urls import is_s3
from raymoe.planning.owner import BASE, CONFIG_KEYS, Owner, OwnerKind
from raymoe.planning.plan import GatePrompts, MergePlan
from raymoe.routers.heldout_report import RouterSummary
from raymoe.sources.local_folder import has_changed, recorded_sample
from raymoe.sources.prompt_sampling import prompt_file_location
from raymoe.storage.file_names import RECORD_NAME, FileRecord

__all__ = ["RECORD_FORMAT", "merge_record", "prompt_records", "recorded_config", "recorded_experts", "with_own_storage"]

RECORD_FORMAT = 1
# Variables by which a user says where S3 is, and as whom requests are made.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_IDENTITY_VARIABLES = ("AWS_PROFILE", "AWS_ACCESS_KEY_ID")


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
        "architecture": plan.architecture,
        "dtype": plan.dtype,
        "parameters": plan.totals.parameters,
        "active_parameters": plan.totals.active_parameters,
        "config": config.to_plain(),
        "prompt_files": prompt_records(plan, config),
        "routers": summary.plain() if summary else None,
        # Records of merges that are not strict stay what they were.
        "options": {key: value for key, value in plan.options.to_record().items() if key != "strict" or value},
        "sources": [
            {"owner": str(s.owner), "model": s.label, "revision": s.revision, "adapter": s.adapter}
            for s in plan.sources
        ],
        # Weight files of this machine as they were: `refusals` compares, so that no newer model is passed over.
        **({"local_files": dict(sorted(samples.items()))} if samples else {}),
        "files": {record.name: {"size": record.size, "checksum": record.checksum} for record in files},
    }


def prompt_records(plan: MergePlan, config: MergeConfig) -> list[dict[str, Any]]:
    """Each file of prompts in `config`, and what was drawn from it: number of texts, SHA-256 of their JSON list."""
    drawn: dict[tuple[object, ...], GatePrompts] = {
        (CONFIG_KEYS[prompts.owner.kind], prompts.owner.index): prompts for prompts in plan.gates.members
    }
    records = []
    for (experts, number, key), file in config.prompt_files.items():
        prompts = drawn[experts, number]
        texts = prompts.positive if key == "positive_prompts" else prompts.negative
        digest = hashlib.sha256(json.dumps(texts, separators=(",", ":")).encode()).hexdigest()
        place = prompt_file_location(file)
        records.append({"owner": str(prompts.owner), "key": key, "file": place, "count": len(texts), "sha256": digest})
    return records


def recorded_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded config, its models and files of prompts named as they were found: whole paths, Hub commits."""
    config = dict(record["config"])
    models = {source["owner"]: source["model"] for source in record["sources"]}
    config["base_model"] = models[str(BASE)]
    members: dict[str, dict[str, Any]] = {}
    for kind, key in CONFIG_KEYS.items():
        config[key] = [dict(expert) for expert in config.get(key) or ()]
        members |= {str(Owner(kind, number)): expert for number, expert in enumerate(config[key])}
    for owner, expert in members.items():
        expert["source_model"] = models[owner]
    for file in record.get("prompt_files", ()):
        expert = members[file["owner"]]
        expert[file["key"]] = {**expert[file["key"]], "file": file["file"]}
    return config


def recorded_experts(sources: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of a record's `sources` that are experts, in their order."""
    owners = ((source, Owner.parse(str(source.get("owner")))) for source in sources)
    return [source for source, owner in owners if owner is not None and owner.kind is OwnerKind.EXPERT]


def with_own_storage(
    config: MergeConfig, own: StorageOptions, folder: str, *, trusts_record: bool = False
) -> MergeConfig:
    """The recorded config, S3 reached as the user says: by `own`, else by the environment, else by the record itself
    where the user trusts it.

    Raises ProblemReport, before anything is asked, where only the record says at which address or as whom.
    """
    recorded = config.storage
    if trusts_record or not (recorded.endpoint or recorded.profile):
        return config
    storage = replace(recorded, endpoint=own.endpoint, profile=own.profile)
    needed = [place for place in _read_locations(config) if is_s3(place)]
    names_endpoint = not recorded.endpoint or own.endpoint or any(map(os.environ.get, _ENDPOINT_VARIABLES))
    names_identity = not recorded.profile or own.profile or any(map(os.environ.get, _IDENTITY_VARIABLES))
    if needed and not (names_endpoint and names_identity):
        address = f"at {recorded.endpoint}" if recorded.endpoint else ""
        identity = f"with the profile {recorded.profile!r} of this user" if recorded.profile else ""
        what = (
            f"the record says that {short_list(needed, most=2)} is reached "
            f"{' '.join(filter(None, (address, identity)))}; "
            "requests signed with your credentials would be sent there"
        )
        variables = [
            *([] if names_endpoint else ["AWS_ENDPOINT_URL_S3"]),
            *([] if names_identity else ["AWS_PROFILE"]),
        ]
        remedy = f"set {' and '.join(variables)} to what you mean, or give --trust-record if you know that place"
        raise ProblemReport([Problem(where=f"{folder}/{RECORD_NAME}", what=what, remedy=remedy)])
    return config.model_copy(update={"storage": storage})


def _read_locations(config: MergeConfig) -> Iterator[str]:
    """What the config reads: models, adapters and files of prompts."""
    for ref in (config.base_model, *(e.source_model for e in (*config.experts, *config.shared_experts))):
        yield from (path.path for path in (ref.model, ref.adapter) if path is not None)
    yield from (file.file for file in config.prompt_files.values())
