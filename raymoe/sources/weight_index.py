"""Finds the weights of a model (or adapter) in a folder, and indexes their tensors from file headers.

    model.safetensors                                    one file
    model.safetensors.index.json + shards                weight_map: tensor name -> shard
    pytorch_model.bin, pytorch_model.bin.index.json      the same as zip archives of a pickle, see torch_pickle.py

They are tried in this order, as in transformers. An index file is untrusted input: the shards that it names must be in
the folder, and its entries must agree with the shards' own headers, which have priority.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from raymoe.errors import CheckpointError, Problem, ProblemCollector, first_few
from raymoe.formatting import short_list
from raymoe.sources.facts import CheckpointIndex, SourceFile, TensorEntry
from raymoe.sources.folder_protocol import Folder, is_inside, read_json_object, unusable_checkpoint
from raymoe.sources.lora import EMPTY_ADAPTER
from raymoe.sources.safetensors_header import parse_header
from raymoe.sources.torch_pickle import parse_pickled

_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_OTHER_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|npz|ckpt)")
_CONVERT_REMEDY = "save the model with transformers' save_pretrained, which writes model.safetensors"
_HEADERS_AT_ONCE = 8  # a header of a remote file is one or two round trips
_NAMED = 5  # how many names a message lists


def index_model_weights(folder: Folder) -> CheckpointIndex:
    """All tensors of a model. Raises CheckpointError with all problems that headers show."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if (file := folder.find(single)) is not None:
            return _index_files(folder, {single: file}, weight_map={})
        if folder.find(index) is not None:
            return _index_shards(folder, index)
    raise _no_weights(folder)


def index_adapter_weights(folder: Folder) -> CheckpointIndex:
    """All tensors of a PEFT adapter."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (file := folder.find(name)) is not None:
            return _index_files(folder, {name: file}, weight_map={}, if_empty=EMPTY_ADAPTER)
    raise unusable_checkpoint(
        folder.label,
        "adapter_model.safetensors is missing",
        folder.missing_remedy("adapter_model.safetensors"),
    )


def _index_shards(folder: Folder, index: str) -> CheckpointIndex:
    where = f"{folder.label}/{index}"
    weight_map = read_json_object(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise unusable_checkpoint(
            where, "'weight_map' is missing, empty or not an object", folder.missing_remedy(index)
        )
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise unusable_checkpoint(
            where, "'weight_map' has values that are not file names", folder.missing_remedy(index)
        )
    suffix = index.removesuffix(".index.json").rsplit(".", 1)[-1]
    shards: dict[str, SourceFile] = {}
    problems: list[Problem] = []
    more = 0
    for name in sorted(set(weight_map.values())):
        if len(problems) >= _NAMED:
            if not is_inside(name) or not name.endswith(f".{suffix}") or folder.find(name) is None:
                more += 1
        elif not is_inside(name):
            what, remedy = f"names the file {name!r}, which is not inside the folder", "don't use this checkpoint"
            problems.append(Problem(where=where, what=what, remedy=remedy))
        elif not name.endswith(f".{suffix}"):
            what, remedy = f"names the file {name!r}, which is no .{suffix} file", "correct the index file"
            problems.append(Problem(where=where, what=what, remedy=remedy))
        elif (file := folder.find(name)) is None:
            what = f"{name} is missing, but {index} names it"
            problems.append(Problem(where=folder.label, what=what, remedy=folder.missing_remedy(name)))
        else:
            shards[name] = file
    if more:
        problems.append(Problem(where=where, what=f"and {more} more files of the index that can't be used"))
    if problems:
        raise CheckpointError(problems)
    return _index_files(folder, shards, weight_map)


def _index_files(
    folder: Folder, files: Mapping[str, SourceFile], weight_map: Mapping[str, str], if_empty: str = _CONVERT_REMEDY
) -> CheckpointIndex:
    """Index all files, and check them against the weight map (empty if a single file holds everything)."""
    by_file = _entries_by_file(folder, files)
    holders: dict[str, dict[str, TensorEntry]] = {}
    for file_name, entries in by_file.items():
        for entry in entries:
            holders.setdefault(entry.name, {})[file_name] = entry
    problems = first_few(_weight_map_problems(folder, holders, weight_map), _NAMED)
    problems += first_few(_duplicate_problems(folder, holders, weight_map), _NAMED)
    # If two shards have a tensor, the last one counts. A tensor that is not in the index still belongs to the model.
    tensors = {name: list(held.values())[-1] for name, held in holders.items()}
    if not tensors:
        problems.append(Problem(where=folder.label, what="the weight files hold no tensors", remedy=if_empty))
    if problems:
        raise CheckpointError(problems)
    return CheckpointIndex(files=tuple(files.values()), tensors=tensors)


def _entries_by_file(folder: Folder, files: Mapping[str, SourceFile]) -> dict[str, Sequence[TensorEntry]]:
    result: dict[str, Sequence[TensorEntry]] = {}
    collector = ProblemCollector(kind=CheckpointError)
    with ThreadPoolExecutor(max_workers=_HEADERS_AT_ONCE) as pool:
        futures = {name: pool.submit(_entries, folder, name, file) for name, file in files.items()}
        for name, future in futures.items():
            if (entries := collector.run(future.result)) is not None:
                result[name] = entries
    if collector.problems:
        raise CheckpointError(first_few(collector.problems, 2 * _NAMED))  # each file may have several problems
    return result


def _entries(folder: Folder, name: str, file: SourceFile) -> Sequence[TensorEntry]:
    where = f"{folder.label}/{name}"
    if name.endswith(".safetensors"):
        return parse_header(partial(folder.read_range, file), file, where)
    return parse_pickled(folder.local_path(file), file, where)


def _weight_map_problems(
    folder: Folder, holders: Mapping[str, Mapping[str, TensorEntry]], weight_map: Mapping[str, str]
) -> Iterator[Problem]:
    """Tensors in another shard than the index says, grouped by (named file, actual file)."""
    wrong: dict[tuple[str, str], list[str]] = {}
    for name, file_name in weight_map.items():
        held = holders.get(name, {})
        if file_name not in held:
            wrong.setdefault((file_name, next(iter(held), "")), []).append(name)
    for (file_name, actual), names in wrong.items():
        found = f"found in {actual} instead" if actual else "found in no file"
        what = f"the index file names this file for {_short_list(names)}, {found}"
        remedy = "index and shards are not of one checkpoint: download or save all of them again"
        yield Problem(where=f"{folder.label}/{file_name}", what=what, remedy=remedy)


def _duplicate_problems(
    folder: Folder, holders: Mapping[str, Mapping[str, TensorEntry]], weight_map: Mapping[str, str]
) -> Iterator[Problem]:
    """Tensors in several shards, unless the index names the last of them.

    transformers loads the shards in the order of their names, whatever the index says, so the last one remains.
    """
    duplicates: dict[tuple[str, ...], list[str]] = {}
    for name, held in holders.items():
        if len(held) > 1 and weight_map.get(name) != list(held)[-1]:
            duplicates.setdefault(tuple(held), []).append(name)
    for files, names in duplicates.items():
        where = short_list(files, _NAMED, " and in ")
        what = f"{_short_list(names)} in {where}: transformers takes the last, which the index does not name"
        yield Problem(where=folder.label, what=what, remedy=_CONVERT_REMEDY)


def _short_list(names: Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:_NAMED])
    return f"{listed} and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else listed


def _no_weights(folder: Folder) -> CheckpointError:
    shards = [name for name in folder.names if _SHARD.fullmatch(name)]
    if shards:
        index = shards[0].split("-")[0] + "." + shards[0].rsplit(".", 1)[-1] + ".index.json"
        what = f"found {len(shards)} shards ({shards[0]}, ...) but no {index}"
        return unusable_checkpoint(folder.label, what, f"add {index}, which belongs to the checkpoint")
    if "adapter_config.json" in folder.names:
        what = "this is a LoRA adapter, not a whole model"
        return unusable_checkpoint(folder.label, what, "name it together with its base model: 'base+adapter'")
    others = [name for name in folder.names if _OTHER_WEIGHTS.fullmatch(name)]
    what = "no weights found (model.safetensors, model.safetensors.index.json, pytorch_model.bin)"
    if others:
        return unusable_checkpoint(folder.label, f"{what}, only {', '.join(others[:_NAMED])}", _CONVERT_REMEDY)
    return unusable_checkpoint(folder.label, what, folder.missing_remedy("model.safetensors"))
