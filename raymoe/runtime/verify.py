"""`raymoe verify`: computes a merge again from its sources, in memory, and compares it with the files in its output.

The record (`raymoe.json`) says what was merged. The plan is made again from the sources as they are now, the gates are
computed again, and every tensor is compared byte for byte, by the same actors that write a merge.

A record may come from an untrusted source. It says what the merge was made of, but it must not decide where this user's
credentials are sent: an endpoint or a profile in it is used only with the user's consent (`with_own_storage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raymoe.checkpoints.merge_record import MergeRecord, prompt_records, read_record, with_own_storage
from raymoe.checkpoints.open_checkpoint import checksum_like, open_checkpoint
from raymoe.config import MergeConfig
from raymoe.errors import CheckpointError
from raymoe.object_store.location import Location
from raymoe.planning.plan import MergePlan, Shard
from raymoe.planning.plan_merge import plan_merge
from raymoe.results import Verification
from raymoe.routers.fit_memory import max_computed_at_once
from raymoe.routers.router_matrices import router_bytes
from raymoe.runtime.actor_plan import Workload, locate_sources, plan_actors
from raymoe.runtime.connect import ray_connection
from raymoe.runtime.progress import Progress
from raymoe.runtime.remote_folders import RayFolderResolver
from raymoe.runtime.run_on_actors import run_on_actors
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_jobs import ShardMethod
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.folder_protocol import Folder
from raymoe.sources.weight_index import index_model_weights
from raymoe.storage.file_names import CARD_NAME, is_part_of_a_model
from raymoe.storage.outputs.protocol import ShardJob
from raymoe.storage.shard_stream import different_tensors
from raymoe.storage.source_reader import SourceReader


def verify_merge(location: str | Path, settings: RuntimeSettings) -> Verification:
    """Compare a finished merge with its sources. Raises ProblemReport if there is no merge, or its sources are gone."""
    folder = open_checkpoint(location, settings.storage)
    record = read_record(folder)
    recorded, options = record.config, record.options
    config = with_own_storage(recorded, settings.storage, folder.label, trusts_record=settings.trust_record)
    settings = replace(settings, storage=config.storage)
    plan = plan_merge(
        config, options, hub=settings.hub, allow_all_same=True, remote_folders=RayFolderResolver(settings)
    )
    of_files, unknown = _file_differences(folder, record, plan, settings)
    differences = [*_prompt_differences(record, plan, config), *of_files]
    edited = [line for line in differences if line.startswith(f"{CARD_NAME}: ")]
    notes = (*(f"{line} (a card may be edited)" for line in edited), *unknown)
    differences = [line for line in differences if line not in edited]
    try:
        written = index_model_weights(folder).tensors
    except CheckpointError as error:
        return Verification(tensors=0, differences=(*differences, *map(str, error.problems)), notes=notes)
    expected = {part.tensor.name for shard in plan.shards for part in shard.parts}
    differences += [f"{name}: a tensor that this merge does not have" for name in sorted(written.keys() - expected)]
    differences += _tensor_differences(plan, Location.of(folder.label), written, settings)
    return Verification(tensors=len(expected), differences=tuple(differences), notes=notes)


def _prompt_differences(record: MergeRecord, plan: MergePlan, config: MergeConfig) -> list[str]:
    """Files of prompts that give other prompts now than at the merge."""
    return [
        f"{now['file']}: {now['key']} of {now['owner']} are not those of the merge "
        f"({then['count']} prompts then, {now['count']} now)"
        for then, now in zip(record.prompt_files, prompt_records(plan, config), strict=False)
        if then != now
    ]


def _file_differences(
    folder: Folder, record: MergeRecord, plan: MergePlan, settings: RuntimeSettings
) -> tuple[list[str], list[str]]:
    """Files that differ from the record, and notes about files that the record can't check.

    The comparison by tensor checks the bytes of weights; here only the ETags of objects are compared.
    """
    differences, unknown = [], []
    if record.plan_digest != plan.digest:
        differences.append("the plan: sources, config or raymoe's output format are not what they were at the merge")
    others = (name for name in folder.names if is_part_of_a_model(name) and name not in record.files)
    differences += [f"{name}: belongs to a model, and this merge did not write it" for name in others]
    weights = {shard.file_name for shard in plan.shards}
    with SourceReader(settings.hub, settings.storage) as reader:
        for name, expected in record.files.items():
            file, checksum = folder.find(name), expected.checksum
            if file is None:
                differences.append(f"{name}: missing")
            elif file.size != expected.size:
                differences.append(f"{name}: {file.size} bytes, expected {expected.size}")
            elif name in weights and (file.etag is None or not checksum.startswith("etag:")):
                continue
            elif (now := checksum_like(checksum, file, reader)) is None:
                unknown.append(
                    f"{name}: the record has an object's ETag, which does not tell whether a copy is the same"
                )
            elif now != checksum:
                differences.append(f"{name}: changed since the merge")
    return differences, unknown


class _Compare(ShardMethod):
    """An actor compares the bytes that the sources give with the written ones; it reads both."""

    def __init__(self, written: Mapping[str, TensorEntry]) -> None:
        self._written = written

    def start(self, actor: Any, job: ShardJob, helper: Any) -> Any:
        names = {part.tensor.name for part in job.shard.parts}
        entries = {name: self._written[name] for name in names if name in self._written}
        return actor.compare_shard.options(name=f"compare {job.name}").remote(job, entries)


class _CompareShards:
    """The shard work of a verification, for `run_on_actors`."""

    def __init__(self, written: Mapping[str, TensorEntry]) -> None:
        self.methods = (_Compare(written),)

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        return (ShardJob(shard=shard),)

    def reads(self, file: SourceFile) -> bool:
        return True

    def complete(self, shard: Shard, results: Sequence[list[str]]) -> list[str]:
        """Names of the tensors that differ."""
        return results[0]


def _tensor_differences(
    plan: MergePlan, location: Location, written: Mapping[str, TensorEntry], settings: RuntimeSettings
) -> list[str]:
    last = "comparing routers"
    with ray_connection(settings), Progress(plan, settings.verbosity, "compared", last_work=last) as progress:
        beside = {
            shard.file_name: [written[p.tensor.name].file for p in shard.parts if p.tensor.name in written]
            for shard in plan.shards
        }
        workload = Workload(
            jobs=len(plan.shards),
            runs_model=plan.runs_model,
            quantize=plan.gates.quantize,
            max_layers_at_once=max_computed_at_once(plan),
        )
        actor_plan = plan_actors(settings, workload, locate_sources(plan, beside))
        outcome = run_on_actors(plan, _CompareShards(written), actor_plan, progress, settings, output=location)
        different = [name for names in outcome.shard_results for name in names]
        with SourceReader(settings.hub, settings.storage) as reader:
            parts = [part for shard in plan.router_shards for part in shard.parts]
            different += different_tensors(parts, written, reader, router_bytes(plan.gates, outcome.rows, reader))
    return [f"{name}: differs" if name in written else f"{name}: missing" for name in sorted(different)]
