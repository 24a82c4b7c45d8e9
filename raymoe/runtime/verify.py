"""`raymoe verify`: makes a merge again from its sources, in memory, and compares it with what is in the folder.

The record (`raymoe.json`) says what was merged; the plan is made anew from the sources as they are now, the gates are
computed anew, and every tensor is compared byte for byte, by the same actors that write a merge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymoe import api
from raymoe.config import MODES, MergeConfig
from raymoe.errors import CheckpointError, Problem, ProblemReport
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.types import Shard
from raymoe.runtime.cluster import connected, expert_actors, slots_for
from raymoe.runtime.merge import random_gate_rows, router_bytes
from raymoe.runtime.progress import Progress
from raymoe.runtime.schedule import run_jobs
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.checkpoint import index_model_weights
from raymoe.sources.local import LocalFolder
from raymoe.sources.types import TensorEntry
from raymoe.storage.journal import JOURNAL, RECORD_NAME
from raymoe.storage.local import file_checksum
from raymoe.storage.reader import SourceReader
from raymoe.storage.stream import different_tensors

__all__ = ["Verification", "read_record", "verify_merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared, and every difference, one line each."""

    tensors: int
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.differences

    @property
    def summary(self) -> str:
        if self.ok:
            return f"verified: {self.tensors} tensors equal to what the sources give, byte for byte"
        return f"NOT verified: {len(self.differences)} differences"


def verify_merge(folder: Path, settings: RuntimeSettings) -> Verification:
    """Compare a finished merge with its sources. Raises ProblemReport if there is no merge, or its sources are gone."""
    record = read_record(folder)
    try:
        config = MergeConfig.from_plain(_with_resolved_models(record))
        options = MergeOptions(**record["options"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"this record can't be read: {str(error).splitlines()[0]}"
        raise ProblemReport([Problem(where=str(folder / RECORD_NAME), what=what)]) from error
    plan = api.plan(config, options, hub=settings.hub, allow_all_same=True)
    differences = _file_differences(folder, record, plan)
    try:
        written = index_model_weights(LocalFolder(str(folder))).tensors
    except CheckpointError as error:
        return Verification(tensors=0, differences=(*differences, *map(str, error.problems)))
    expected = {part.name for shard in plan.shards for part in shard.parts}
    differences += [f"{name}: a tensor that this merge does not have" for name in sorted(written.keys() - expected)]
    differences += _tensor_differences(plan, folder, written, settings)
    return Verification(tensors=len(expected), differences=tuple(differences))


def read_record(folder: Path) -> Mapping[str, Any]:
    """The record of a finished merge."""
    path = folder / RECORD_NAME
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        what = "there is no raymoe.json, the record of a finished merge"
        remedy = "name the folder of a merge made by raymoe"
        if (folder / JOURNAL).is_dir():
            what, remedy = "this merge is not finished", "run the merge command again to finish it"
        raise ProblemReport([Problem(where=str(folder), what=what, remedy=remedy)]) from None
    except (OSError, ValueError) as error:
        raise ProblemReport([Problem(where=str(path), what=f"can't be read: {error}")]) from error
    if not isinstance(record, dict):
        raise ProblemReport([Problem(where=str(path), what="is no record of a merge")])
    return record


def _with_resolved_models(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded config, its models named as they were resolved: whole paths, Hub commits."""
    config = dict(record["config"])
    models = {source["owner"]: source["model"] for source in record["sources"]}
    config["base_model"] = models["base"]
    for key, owner in (("experts", "expert"), ("shared_experts", "shared")):
        experts = enumerate(config.get(key) or ())
        config[key] = [{**expert, "source_model": models[f"{owner} {number}"]} for number, expert in experts]
    return config


def _file_differences(folder: Path, record: Mapping[str, Any], plan: MergePlan) -> list[str]:
    """Files that are not as the record says. Weights are left to the comparison tensor by tensor."""
    differences = []
    if record.get("plan_digest") != plan.digest:
        differences.append("the plan: sources, config or raymoe's output format are not what they were at the merge")
    weights = {shard.file_name for shard in plan.shards}
    for name, expected in record.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            differences.append(f"{name}: missing")
        elif path.stat().st_size != expected["size"]:
            differences.append(f"{name}: {path.stat().st_size} bytes, expected {expected['size']}")
        elif name not in weights and file_checksum(path) != expected["checksum"]:
            differences.append(f"{name}: changed since the merge")
    return differences


def _tensor_differences(
    plan: MergePlan, folder: Path, written: Mapping[str, TensorEntry], settings: RuntimeSettings
) -> list[str]:
    def compare(actor: Any, shard: Shard) -> Any:
        entries = {part.name: written[part.name] for part in shard.parts if part.name in written}
        return actor.compare_shard.options(name=f"compare {shard.file_name}").remote(shard, entries)

    with connected(settings), Progress(plan, settings.verbosity) as progress:
        compute = MODES[plan.gates.mode].reads_layers
        slots = slots_for(settings, jobs=len(plan.shards), compute=compute, quantise=plan.gates.quantise)
        with expert_actors(slots, str(folder.absolute()), settings) as actors:
            outcome = run_jobs(plan, actors, compare, progress.watch(actors))
        rows = outcome.rows | random_gate_rows(plan.gates)
        different = [name for names in outcome.shard_results for name in names]
        with SourceReader(settings.hub) as reader:
            parts = [part for shard in plan.shards if shard.owner == "router" for part in shard.parts]
            different += different_tensors(parts, written, reader, router_bytes(plan.gates, rows))
    return [f"{name}: differs" if name in written else f"{name}: missing" for name in sorted(different)]
