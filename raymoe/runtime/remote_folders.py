"""Models whose folders the driver's node does not have: their headers and small files are read where they are.

Only paths that can mean nothing else are looked for: whole ones, `~/...`, `./...`, file:// URLs. What may be a Hub id
is one. Without a cluster (no address, no RAY_ADDRESS) nobody is asked, and a folder that is not here is a mistake.
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
    """Implements `RemoteFolderResolver` on the nodes of the cluster that the merge will run on. Connects when it is
    asked."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = replace(settings, verbosity=min(settings.verbosity, -1))

    def open(self, paths: Sequence[PathKey]) -> Mapping[PathKey, OpenedFolder | CheckpointError]:
        """The folders as the first node that has them read them; one that no node has is a problem that names them."""
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
        """A small file, from this node if it has it."""
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
        """Whether there is a cluster to be asked."""
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
