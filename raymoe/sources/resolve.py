"""Resolves the models of a config to facts: the entry to this package for planning, and for fetching files later.

    parse_model_ref (config) --> ModelRef --resolve_models--> ModelFacts   driver: headers, small JSON
                                  SourceFile --fetch_file--> local path     actors: whole files
                                  open_folders                              another node: headers that the driver lacks

A URL is a URL (file:// means a local path); a name that exists as a local folder is that folder; any other name must be
a Hub id. Several models are resolved at once, each path only once, and all their problems are raised together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from raymoe.architectures.mixture_config import is_mixture
from raymoe.architectures.original_context import context_warning, within_original_context
from raymoe.architectures.wrappers import find_wrapper
from raymoe.config.model_refs import ModelRef, PathRef, expert_suffix, is_local_folder
from raymoe.errors import CheckpointError, Problem, ProblemCollector, first_few
from raymoe.object_store.location import LocationKind
from raymoe.object_store.options import StorageOptions
from raymoe.sources.bucket_folder import fetch_object, open_object_folder
from raymoe.sources.facts import AdapterFacts, CheckpointIndex, ModelFacts, SideFile, SourceFile, TensorEntry
from raymoe.sources.folder_protocol import Folder, read_json_object, side_files, unusable_checkpoint
from raymoe.sources.hub import HubOptions, cache_folders, download, is_hub_id, open_hub_folder
from raymoe.sources.kept_reads import KeptReads
from raymoe.sources.local_folder import LocalFolder, leads_outside, open_file, with_content
from raymoe.sources.lora import adapter_facts
from raymoe.sources.mixture import DenseView, Mixture
from raymoe.sources.output_head import has_own_head
from raymoe.sources.quantization_check import leftover_warning, quantization_problems
from raymoe.sources.unwrap import Unwrapped, unwrap
from raymoe.sources.weight_index import index_adapter_weights, index_model_weights
from raymoe.tensor_names import EMBEDDING, HEAD
from raymoe.untrusted_files import check_size

_MODELS_AT_ONCE = 16  # most of the time each waits for one request

PathKey = tuple[PathRef, bool]
"""A path of a config, and whether it names an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedFolder:
    """One path of a config after reading: a model, or an adapter (whose check needs its model's index as well)."""

    folder: Folder
    config: Mapping[str, Any]
    index: CheckpointIndex
    side_files: tuple[SideFile, ...]
    python_files: tuple[SideFile, ...]
    warnings: tuple[str, ...]
    own_head: bool = False
    wrapper_config: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, TensorEntry] = field(default_factory=dict)


class RemoteFolderResolver(Protocol):
    """Access to other machines that may have the folders that this one lacks."""

    def open(self, paths: Sequence[PathKey]) -> Mapping[PathKey, OpenedFolder | CheckpointError]:
        """Local folders as another machine read them, or why they can't be used; {} if no machine can be queried."""

    def connection(self, files: Iterable[SourceFile]) -> AbstractContextManager[None]:
        """A context for reading several of these files."""

    def read(self, file: SourceFile) -> bytes:
        """A whole small file, from this machine or another one. Raises CheckpointError."""


def resolve_model(
    ref: ModelRef, options: HubOptions | None = None, storage: StorageOptions | None = None
) -> ModelFacts:
    """Read the config and the headers of one model. Raises CheckpointError with all its problems."""
    return resolve_models([ref], options, storage)[ref]


def resolve_models(
    refs: Iterable[ModelRef],
    options: HubOptions | None = None,
    storage: StorageOptions | None = None,
    remote_folders: RemoteFolderResolver | None = None,
    whole: Collection[ModelRef] | None = None,
    kept: KeptReads | None = None,
    backbones: Collection[ModelRef] = (),
) -> dict[ModelRef, ModelFacts]:
    """Resolve several models at once. Raises one CheckpointError with the problems of all, in their order.

    A reference to an expert of a mixture gives the dense model with its FFNs. If one of `backbones` is a mixture, it
    gives the mixture's backbone; any other mixture is given as it is.
    `remote_folders` looks for local folders that are not here. `whole` are the models of which more than the FFN is
    used (None: all of them): `ModelFacts.own_head` is determined for these only, since that may read two tensors.
    `kept` has what an earlier run read of objects, and gets what this one reads.
    """
    refs, options, storage = list(dict.fromkeys(refs)), options or HubOptions(), storage or StorageOptions()
    named = (key for ref in refs for key in ((ref.model, False), (ref.adapter, True)))
    keys: list[PathKey] = list(dict.fromkeys((path, is_adapter) for path, is_adapter in named if path is not None))
    absent = [key for key in keys if remote_folders and (place := _local_path(key[0])) and not os.path.exists(place)]
    remote = remote_folders.open(absent) if remote_folders and absent else {}
    with_heads = {ref.model for ref in (refs if whole is None else whole)}
    with ThreadPoolExecutor(max_workers=_MODELS_AT_ONCE) as pool:
        parts = {
            key: pool.submit(_open, *key, options, storage, kept, with_head=key[0] in with_heads)
            if key not in remote
            else pool.submit(_result_of, remote[key])
            for key in keys
        }
    collector = ProblemCollector(kind=CheckpointError)
    opened = {key: part for key, future in parts.items() if (part := collector.run(future.result))}
    facts: dict[ModelRef, ModelFacts] = {}
    mixtures: dict[PathRef, Mixture] = {}  # as many as have experts, or a backbone, among the models
    for ref in refs:
        model = opened.get((ref.model, False))
        adapter = opened.get((ref.adapter, True)) if ref.adapter else None
        if model and (adapter or not ref.adapter):
            as_backbone = ref in backbones and is_mixture(model.config)
            view = None
            if ref.expert is not None or as_backbone:
                view = collector.run(_dense_view, ref, model, mixtures)
                if view is None:
                    continue
            resolved = collector.run(_facts, ref, model, adapter, view)
            if resolved:
                facts[ref] = replace(resolved, folders=folders_of(ref, options))
    if collector.problems:
        raise collector.report()
    return facts


def folders_of(ref: ModelRef, options: HubOptions) -> tuple[str, ...]:
    """Absolute paths or URLs of a model's and its adapter's folders, whether they exist or not."""
    found: list[str] = []
    for path in ref.paths:
        if (location := path.location) is not None:
            found.append(location.text)
        elif is_local_folder(path.path) or _local_path(path) is not None:
            found.append(os.path.abspath(os.path.expanduser(path.path)))
        else:
            found += cache_folders(path.path, options)
    return tuple(found)


def open_folders(paths: Sequence[PathKey], storage: StorageOptions) -> dict[PathKey, OpenedFolder | CheckpointError]:
    """The given local paths that are folders of this machine, after reading; or what is wrong with them."""
    found: dict[PathKey, OpenedFolder | CheckpointError] = {}
    for path, is_adapter in paths:
        place = _local_path(path)
        if place is None or not os.path.isdir(place):
            continue
        try:
            found[path, is_adapter] = _open(PathRef(path=place), is_adapter, HubOptions(), storage)
        except CheckpointError as error:
            found[path, is_adapter] = error
    return found


def _local_path(path: PathRef) -> str | None:
    """The absolute path that a name must mean, whether it exists or not; None for URLs and possible Hub ids."""
    if (location := path.location) is not None:
        return location.text if location.kind.is_local else None
    # No Hub id begins so, and the check would import the Hub's library.
    is_path = path.path.startswith(("/", "./", "../", "~"))
    if path.revision is not None or (not is_path and is_hub_id(path.path)):
        return None
    return os.path.abspath(os.path.expanduser(path.path))


def _result_of(opened: OpenedFolder | CheckpointError) -> OpenedFolder:
    """The result from another machine. Raises the error that it found."""
    if isinstance(opened, CheckpointError):
        raise opened
    return opened


def _open(
    path: PathRef,
    is_adapter: bool,
    options: HubOptions,
    storage: StorageOptions,
    kept: KeptReads | None = None,
    *,
    with_head: bool = True,
) -> OpenedFolder:
    folder = _find_folder(path, is_adapter, options, storage, kept)
    collector = ProblemCollector(kind=CheckpointError)
    config_name = "adapter_config.json" if is_adapter else "config.json"
    if is_adapter and config_name not in folder.names and "config.json" in folder.names:
        raise unusable_checkpoint(
            folder.label,
            "this is a model, not a LoRA adapter (no adapter_config.json)",
            "name an adapter after '+'",
        )
    if not is_adapter and config_name not in folder.names and "adapter_config.json" in folder.names:
        what = "this is a LoRA adapter, not a whole model"
        raise unusable_checkpoint(folder.label, what, "name it together with its base model: 'base+adapter'")
    config = collector.run(read_json_object, folder, config_name)
    index_weights = index_adapter_weights if is_adapter else index_model_weights
    index = collector.run(index_weights, folder)
    if not is_adapter:
        collector.problems += quantization_problems(folder.label, config or {}, index)
    side, python = side_files(folder), side_files(folder, ("*.py",))
    collector.problems += first_few(_size_problems(folder, side))
    python = tuple(each for each in python if not _size_problems(folder, [each]))
    if isinstance(folder, LocalFolder):
        collector.problems += first_few(_outside_problems(folder, side))
        python = tuple(each for each in python if not _outside_problems(folder, [each]))
    if collector.problems or config is None or index is None:
        raise collector.report()
    warnings = [folder.bin_warning if any(file.name.endswith(".bin") for file in index.files) else None]
    if not is_adapter:
        warnings.append(leftover_warning(folder.label, config, index))
    own = Unwrapped(config=config, index=index) if is_adapter else unwrap(folder.label, config, index)
    warnings.append(None if is_adapter else context_warning(folder.label, own.config))
    return OpenedFolder(
        folder=folder,
        config=_effective_config(within_original_context(own.config)),
        index=own.index,
        side_files=side,
        python_files=python,
        warnings=tuple(warning for warning in warnings if warning),
        own_head=not is_adapter and with_head and has_own_head(folder, own.config, own.index),
        wrapper_config=own.wrapper_config,
        rest=own.rest,
    )


def _outside_problems(folder: LocalFolder, files: Sequence[SideFile]) -> list[Problem]:
    """Files that belong to a model, and may be published with it, but are links to files outside of its folder."""
    return [
        Problem(
            where=f"{folder.label}/{each.name}",
            what="this link leads out of the model's folder, and the file would become part of the merge",
            remedy="copy the file there, in the link's place",
        )
        for each in files
        if leads_outside(each.file.location, folder.label)
    ]


def _size_problems(folder: Folder, files: Sequence[SideFile]) -> list[Problem]:
    """Files that belong to a model but are too large: raymoe and the libraries that load them read them as a whole."""
    problems: list[Problem] = []
    for each in files:
        try:
            check_size(each.file.size)
        except ValueError as error:
            remedy = "download or save the file again, or use another model"
            problems.append(Problem(where=f"{folder.label}/{each.name}", what=str(error), remedy=remedy))
    return problems


def _effective_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as transformers interprets it: a Mistral with `layer_types` is a Ministral (AutoConfig, 5.x)."""
    if config.get("model_type") == "mistral" and "layer_types" in config:
        return {**config, "model_type": "ministral"}
    return config


def _find_folder(
    path: PathRef, is_adapter: bool, options: HubOptions, storage: StorageOptions, kept: KeptReads | None
) -> Folder:
    role = "adapter" if is_adapter else "model"
    if (location := path.location) is not None:
        if location.kind.is_object:
            return open_object_folder(location.text, role, storage, kept)
        if not os.path.isdir(location.text):
            what = f"there is no folder {location} here"
            raise unusable_checkpoint(path.path, what, f"correct the URL of the {role}")
        return LocalFolder(location.text)
    if is_local_folder(path.path):
        if path.revision is not None:
            what = f"a local folder has no revisions, but '@{path.revision}' asks for one"
            raise unusable_checkpoint(
                path.path, what, "leave the revision out, or move the folder away to mean the Hub's model"
            )
        _reject_cache_folder(path.path)
        return LocalFolder(path.path)
    expanded = os.path.expanduser(path.path)
    if os.path.isfile(expanded):
        raise unusable_checkpoint(
            path.path, f"this is a file; a {role} is named by its folder", "name the folder that holds it"
        )
    if not is_hub_id(path.path):
        what = f"no folder {path.path!r} here ({os.path.abspath(expanded)}), and not a Hub id such as org/name"
        raise unusable_checkpoint(path.path, what, f"correct the name of the {role}")
    try:
        return open_hub_folder(path, options)
    except CheckpointError as error:
        # A name such as models/base may have been meant as a folder, so the message says that raymoe looked for one
        # first.
        first, *rest = error.problems
        what = f"{first.what}; and there is no folder {path.path} here"
        raise CheckpointError([replace(first, what=what), *rest]) from None


def _reject_cache_folder(path: str) -> None:
    """Raises CheckpointError for the folder in which the Hub's cache keeps all revisions of a model."""
    place = Path(os.path.abspath(os.path.expanduser(path)))
    whole = place.parent if place.name == "snapshots" else place
    kind, *names = whole.name.split("--")
    if kind != "models" or not names or not (whole / "snapshots").is_dir() or (place / "config.json").exists():
        return
    commits = sorted(folder.name for folder in (whole / "snapshots").iterdir() if folder.is_dir())
    what = "this folder of the Hub's cache holds revisions of a model, and is not the model itself"
    where = f", or a revision's folder: {whole}/snapshots/{commits[0] if len(commits) == 1 else '<commit>'}"
    raise unusable_checkpoint(path, what, f"name the model by its Hub id, {'/'.join(names)}{where if commits else ''}")


def _facts(ref: ModelRef, model: OpenedFolder, adapter: OpenedFolder | None, view: DenseView | None) -> ModelFacts:
    facts, warnings, index, own_head = None, model.warnings, model.index, model.own_head
    label = f"{model.folder.label}{expert_suffix(ref.expert)}"
    if view is not None:
        warnings, index = warnings + view.warnings, view.index
    if adapter is not None:
        folder = adapter.folder
        facts = adapter_facts(
            folder.label,
            folder.revision,
            adapter.config,
            adapter.index,
            index,
            wrapper=find_wrapper(model.wrapper_config),
        )
        warnings += adapter.warnings + _other_base_warning(facts, ref.model)
        index = replace(index, tensors={**index.tensors, **facts.replaced})
        own_head = own_head or bool({HEAD, EMBEDDING} & facts.replaced.keys())
    return ModelFacts(
        label=f"{label}+{facts.label}" if facts else label,
        revision=model.folder.revision,
        config=model.config if view is None else view.config,
        index=index,
        side_files=model.side_files,
        python_files=model.python_files,
        adapter=facts,
        warnings=warnings,
        own_head=own_head,
        wrapper_config=model.wrapper_config,
        rest=model.rest,
        mixture=None if view is None else view.mixture,
    )


def _dense_view(ref: ModelRef, model: OpenedFolder, mixtures: dict[PathRef, Mixture]) -> DenseView:
    """The dense model that a mixture is used as. Raises CheckpointError."""
    if ref.model not in mixtures:
        mixtures[ref.model] = Mixture(model.folder.label, model.config, model.index)
    return mixtures[ref.model].view(ref.expert)


def _other_base_warning(adapter: AdapterFacts, model: PathRef) -> tuple[str, ...]:
    """A warning if an adapter says that it was made for a model with another name. Models move, so only the last part
    of the name is compared."""
    made_for = adapter.config.get("base_model_name_or_path")
    if not isinstance(made_for, str) or not made_for.strip("/") or "snapshots/" in made_for:
        return ()
    if _last_part(made_for) == _last_part(model.path):
        return ()
    return (f"{adapter.label}: this adapter was made for {made_for}, and is applied to {model}",)


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].casefold()


def fetch_file(file: SourceFile, options: HubOptions | None = None, storage: StorageOptions | None = None) -> Path:
    """A path on this node with the bytes of `file`: itself, or a copy in the Hub cache, downloaded if needed.

    An object is copied to a temporary file, which is removed when this process exits. This is meant for small files:
    weights are read by range (`sources.bucket_folder.read_range`). Raises CheckpointError if the file is missing, can't
    be fetched, or has changed since planning.
    """
    if file.kind is LocationKind.HUB:
        return download(file, options or HubOptions())
    if file.kind.is_object:
        return fetch_object(file, storage or StorageOptions())
    os.close(open_file(file))
    return Path(file.location)


def fetch_side_files(
    facts: ModelFacts, options: HubOptions | None = None, storage: StorageOptions | None = None
) -> dict[str, Path]:
    """Local paths of a model's side files by their names in the folder (`chat_templates/...` included)."""
    return {side.name: fetch_file(side.file, options, storage) for side in facts.side_files}


def with_contents(facts: ModelFacts, read: Callable[[SourceFile], bytes]) -> ModelFacts:
    """The facts with the checksums of local side files, so that a plan's digest distinguishes their versions."""
    side = tuple(
        replace(side, file=with_content(side.file, read(side.file))) if side.file.kind.is_local else side
        for side in facts.side_files
    )
    return replace(facts, side_files=side)
