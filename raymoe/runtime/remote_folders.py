"""Reads headers and small files of model folders that the driver's node does not have, on the nodes that have them.

Only paths that can't be Hub ids are looked for: absolute ones, `~/...`, `./...`, file:// URLs. A path that may be a Hub
id is treated as one. Without a cluster (no address, no RAY_ADDRESS) no node is queried, and a missing folder is an
error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from raymoe.errors import CheckpointError, Problem
from raymoe.object_store.options import StorageOptions
from raymoe.runtime.connect import ray_connection
from raymoe.runtime.placement import cluster_nodes, current_node_id, run_on_nodes
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.facts import SourceFile
from raymoe.sources.resolve import OpenedFolder, PathKey, fetch_file, open_folders


class RayFolderResolver:
    """Implements `RemoteFolderResolver` on the nodes of the cluster that the merge will run on. It connects on first
    use."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = replace(settings, verbosity=min(settings.verbosity, -1))

    def open(self, paths: Sequence[PathKey]) -> Mapping[PathKey, OpenedFolder | CheckpointError]:
        """The folders, each read by the first node that has it. A folder that no node has gives an error that names
        it."""
        if not self._has_cluster:
            return {}
        with ray_connection(self._settings):
            nodes = [node for node in cluster_nodes() if node.node_id != current_node_id()]
            if not nodes:
                return {}
            answers = run_on_nodes(_open_folders, (tuple(paths), self._settings.storage), nodes, "read headers")
        found: dict[PathKey, OpenedFolder | CheckpointError] = {}
        for node in nodes:
            for key, opened in answers.get(node.node_id, {}).items():
                if not isinstance(found.get(key), OpenedFolder):
                    found[key] = opened
        asked_nodes = ", ".join(node.name for node in nodes if node.node_id in answers)
        silent_nodes = ", ".join(node.name for node in nodes if node.node_id not in answers)
        parts = f"asked: {asked_nodes}{f'; without an answer: {silent_nodes}' if silent_nodes else ''}"
        return {key: found.get(key) or _not_found_problem(key, parts) for key in paths}

    @contextmanager
    def connection(self, files: Iterable[SourceFile]) -> Iterator[None]:
        """One connection for all reads in the context, if any of these files is on another node only."""
        with ray_connection(self._settings) if any(map(self._is_remote, files)) else nullcontext():
            yield

    def _is_remote(self, file: SourceFile) -> bool:
        return file.kind.is_local and not os.path.exists(file.location) and self._has_cluster

    def read(self, file: SourceFile) -> bytes:
        """A small file, read on this node if it is here."""
        settings = self._settings
        if not self._is_remote(file):
            return fetch_file(file, settings.hub, settings.storage).read_bytes()
        with ray_connection(settings):
            for node in cluster_nodes():
                content: bytes | None = run_on_nodes(_read, file, [node], f"read {file.name}").get(node.node_id)
                if content is not None:
                    return content
        what = "the file is on no node of the cluster any more"
        raise CheckpointError([Problem(where=file.location, what=what, remedy="put it back, and run the merge again")])

    @property
    def _has_cluster(self) -> bool:
        """Whether there is a cluster to query."""
        ray: Any = sys.modules.get("ray")
        named = self._settings.address or os.environ.get("RAY_ADDRESS")
        return bool(named and named != "local") or (ray is not None and ray.is_initialized())


def _not_found_problem(key: PathKey, asked_nodes: str) -> CheckpointError:
    path, is_adapter = key
    role = "adapter" if is_adapter else "model"
    what = f"no folder {path.path} on this node, nor on any other ({asked_nodes})"
    return CheckpointError([Problem(where=path.path, what=what, remedy=f"correct the name of the {role}")])


def _open_folders(request: tuple[Sequence[PathKey], StorageOptions]) -> dict[PathKey, OpenedFolder | CheckpointError]:
    return open_folders(*request)


def _read(file: SourceFile) -> bytes | None:
    try:
        return fetch_file(file).read_bytes()
    except CheckpointError:
        return None
