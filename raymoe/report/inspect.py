"""`raymoe inspect`: summarizes a checkpoint from its config, headers and routers. No other weights are read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.architectures import MoeArchitecture, find_moe_architecture
from raymoe.architectures.mixture_config import is_mixture
from raymoe.architectures.moe_architecture import PER_TOKEN_KEY
from raymoe.checkpoints.merge_record import EXTRACTED, MergeRecord, read_record, unreadable_record
from raymoe.checkpoints.open_checkpoint import open_checkpoint, read_object
from raymoe.console import print_json, print_line
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import human_bytes, human_count, plural
from raymoe.object_store.options import StorageOptions
from raymoe.sources.dtypes import FLOAT_DTYPES
from raymoe.sources.facts import CheckpointIndex, TensorEntry
from raymoe.sources.hub import HubOptions
from raymoe.sources.unwrap import unwrap
from raymoe.sources.weight_index import index_model_weights
from raymoe.storage.file_names import RECORD_NAME
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import load_array


def inspect_checkpoint(place: str | Path, storage: StorageOptions | None = None) -> dict[str, Any]:
    """A summary of the checkpoint in a folder or at a URL, MoE or dense. Raises ProblemReport if there is none."""
    storage = storage or StorageOptions()
    folder = open_checkpoint(place, storage)
    whole = read_object(folder, "config.json", "there is no config.json here", "name the folder of a checkpoint")
    index = index_model_weights(folder)
    text = unwrap(folder.label, whole, index)
    config = text.config
    architecture = find_moe_architecture(config) if is_mixture(config) else None
    bytes_by_dtype: Counter[str] = Counter()
    for entry in index.tensors.values():
        bytes_by_dtype[entry.dtype] += entry.nbytes
    summary: dict[str, Any] = {
        "folder": str(place),
        "model_type": whole.get("model_type"),
        "architecture": _first_text(whole.get("architectures")),
        "layers": _whole_number(config.get("num_hidden_layers")),
        "hidden_size": _whole_number(config.get("hidden_size")),
        "vocab_size": _whole_number(config.get("vocab_size")),
        "parameters": sum(math.prod(entry.shape) for entry in index.tensors.values()),
        "bytes": sum(file.size for file in index.files),
        "dtypes": dict(bytes_by_dtype),
        "shards": [{"file": file.name, "bytes": file.size} for file in index.files],
    }
    if architecture is not None:
        architecture = architecture.as_stored(text.index.tensors)
        summary |= _moe_summary(architecture, config, text.index, summary["parameters"], storage)
    if folder.find(RECORD_NAME) is not None:
        summary["merge"] = _record_summary(read_record(folder))
    return summary


def _whole_number(value: object) -> int | None:
    """A number of an untrusted config.json; None for anything but a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _first_text(values: object) -> str:
    first = values[0] if isinstance(values, list) and values else None
    return first if isinstance(first, str) else "?"


def _record_summary(record: MergeRecord) -> dict[str, Any]:
    """How a merge was made, from its record. Raises ProblemReport if it is not a record of raymoe."""
    if record.extracted is not None:
        return {key: record.content[key] for key in ("raymoe_version", EXTRACTED, "sources", "plan_digest")}
    keys, config = ("raymoe_version", "sources", "config", "plan_digest"), record.content.get("config")
    if missing := [key for key in keys if key not in record.content]:
        raise unreadable_record(record.where, f"it has no {', '.join(missing)}")
    if not isinstance(config, Mapping) or not isinstance(config.get("gate_mode"), str):
        raise unreadable_record(record.where, "its config has no gate_mode")
    return {key: record.content[key] for key in keys}


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression for a name template of a MoE architecture."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{p}>\\d{{1,6}})" if i % 2 else re.escape(p) for i, p in enumerate(pieces)) + "$")


def _moe_summary(
    architecture: MoeArchitecture,
    config: Mapping[str, Any],
    index: CheckpointIndex,
    parameters: int,
    storage: StorageOptions,
) -> dict[str, Any]:
    per_expert: dict[int, int] = {}
    fused: list[tuple[int, int]] = []  # experts along the first axis, parameters of each
    for template in set(architecture.expert.values()):
        pattern = _pattern(template)
        for entry in index.tensors.values():
            if match := pattern.match(entry.name):
                if not architecture.is_fused:
                    number = int(match["expert"])
                    per_expert[number] = per_expert.get(number, 0) + math.prod(entry.shape)
                elif entry.shape and entry.shape[0]:
                    fused.append((entry.shape[0], math.prod(entry.shape[1:])))
    # Sizes in headers may be any number, without data in files: experts are counted, not listed.
    count = max([len(per_expert), *(experts for experts, _ in fused)])
    total = sum(per_expert.values()) + sum(experts * each for experts, each in fused)
    most = sum(each for _, each in fused) or max(per_expert.values(), default=0)
    used = _whole_number(architecture.entry(config, PER_TOKEN_KEY)[1])
    idle = None
    if used is not None and 1 <= used <= count:
        idle = total * (count - used) // count
    return {
        "experts": count,
        "experts_per_token": used,
        "parameters_per_expert": most,
        "active_parameters": None if idle is None else parameters - idle,
        "routers": _router_summary(architecture, index, storage),
    }


def _router_summary(architecture: MoeArchitecture, index: CheckpointIndex, storage: StorageOptions) -> dict[str, Any]:
    """Row lengths and the cosines between experts' rows, over all layers: near 1 means that rows hardly differ."""
    pattern = _pattern(architecture.router)
    entries: list[TensorEntry] = [
        entry
        for entry in index.tensors.values()
        if pattern.match(entry.name) and entry.dtype in FLOAT_DTYPES and len(entry.shape) == 2 and all(entry.shape)
    ]
    # In a .bin file, many tensors may share the same bytes; in safetensors, each has its own.
    if sum(entry.nbytes for entry in entries) > sum(file.size for file in index.files):
        where, what = entries[0].file.location, f"its {len(entries)} routers have more bytes than the files"
        raise ProblemReport([Problem(where=where, what=what, remedy="save the model again as safetensors")])
    norms, cosines = [], []
    with SourceReader(HubOptions(), storage) as reader:
        for entry in entries:
            rows = load_array(reader, entry).astype(np.float64) / architecture.router_factor(entry.shape[1])
            lengths = np.linalg.norm(rows, axis=1)
            units = rows / np.maximum(lengths, 1e-12)[:, None]
            norms.append(lengths.mean())
            if len(rows) > 1:
                cosines.append(_mean_cosine(units))
    summary: dict[str, Any] = {"layers": len(entries)}
    if norms:
        summary["row_norm"] = {"min": min(norms), "max": max(norms)}
    if cosines:
        summary["cosine_between_rows"] = {
            "min": min(cosines),
            "mean": float(np.mean(cosines)),
            "max": max(cosines),
        }
    return summary


def _mean_cosine(units: npt.NDArray[np.float64]) -> float:
    """The mean over all pairs of rows (N, hidden) of length 1 or 0, from their sum: a matrix of all pairs would be N *
    N."""
    count = len(units)
    in_all, of_rows = np.square(units.sum(axis=0)).sum(), np.square(units).sum()
    return float((in_all - of_rows) / (count * (count - 1)))


def print_summary(summary: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    print_line(f"{summary['folder']}: {summary['architecture']} ({summary['model_type']})")
    sizes = ", ".join(f"{human_bytes(count)} {dtype}" for dtype, count in summary["dtypes"].items())
    print_line(f"{human_count(summary['parameters'])} parameters in {len(summary['shards'])} shards, {sizes}")
    layers, hidden, vocab = (_format_number(summary[key]) for key in ("layers", "hidden_size", "vocab_size"))
    print_line(f"{layers} layers, hidden size {hidden}, vocabulary {vocab}")
    if "experts" in summary:
        each = human_count(summary["parameters_per_expert"])
        active = "?" if summary["active_parameters"] is None else human_count(summary["active_parameters"])
        count, used = summary["experts"], _format_number(summary["experts_per_token"])
        print_line(f"{count} experts of {each}, {used} for each token: {active} parameters active")
        routers = summary["routers"]
        if "cosine_between_rows" in routers:
            cosine, norm = routers["cosine_between_rows"], routers["row_norm"]
            print_line(
                f"routers of {routers['layers']} {plural('layer', routers['layers'])}: "
                f"row length {norm['min']:.3g} to {norm['max']:.3g}, "
                f"mean cosine between experts' rows {cosine['mean']:.3f} ({cosine['min']:.3f} to {cosine['max']:.3f})"
            )
    merge = summary.get("merge")
    if merge and EXTRACTED in merge:
        print_line(f"an expert that raymoe {merge['raymoe_version']} took out of a mixture: {merge[EXTRACTED]}")
    elif merge:
        mode, backbone = merge["config"]["gate_mode"], _merged_backbone(merge["config"].get("backbone"))
        print_line(f"made by raymoe {merge['raymoe_version']}, gate mode {mode}{backbone}:")
        for source in merge["sources"]:
            print_line(f"  {source['owner']:10} {source['model']}")


def _merged_backbone(recorded: object) -> str:
    """The backbone in a record's config, as text; empty if it is the base's."""
    method = recorded.get("method") if isinstance(recorded, Mapping) else recorded
    return f", backbone {method}" if isinstance(method, str) and method != "base" else ""


def _format_number(number: int | None) -> str:
    return "?" if number is None else str(number)
