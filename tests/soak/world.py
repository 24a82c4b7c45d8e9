"""Where a soak takes place: servers, the Ray cluster, models in folders and buckets, and undisturbed merges.

World.source(model, reads_s3)       what a config calls a model; uploaded when first asked for
World.place(case)                   an output: a folder, or a prefix of a bucket with neighbours (places.py)
World.reference(case)               the undisturbed merge of the same kind, made once: its files and its requests
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.object_store.fault_proxy import FaultProxy
from tests.object_store.servers import Server, new_keys, start_server
from tests.pico import PROMPTS
from tests.soak.cases import MergeCase, Variant
from tests.soak.cluster import Cluster, ray_cluster
from tests.soak.fsspec_store import install
from tests.soak.models import Models
from tests.soak.places import FolderPlace, FsspecPlace, Place, S3Place

__all__ = ["Reference", "World", "command", "open_world"]

_TIMEOUT_S = 300
_PROMPT_WORDS = 25
_SOURCES, _OUTPUTS = "soak-models", "soak-out"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An undisturbed merge: the folder of its files, how many requests it took, and its phases by name ("start_s" and
    "end_s", seconds from the start)."""

    folder: Path
    requests: int
    phases: Mapping[str, Mapping[str, float]]


class World:
    """Shared by the threads of a soak."""

    def __init__(self, folder: Path, servers: Mapping[str, Server], cluster: Cluster, pythonpath: str) -> None:
        """`pythonpath`: what the cluster was started with."""
        self.folder, self.servers, self.cluster, self.pythonpath = folder, servers, cluster, pythonpath
        self.models = Models(folder / "models")
        self._clients = {name: server.client() for name, server in servers.items()}
        self._uploaded: set[tuple[str, str]] = set()
        self._references: dict[tuple[str, ...], Reference] = {}
        self._locks: dict[object, threading.Lock] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        for client in self._clients.values():
            for bucket in (_SOURCES, _OUTPUTS):
                client.create_bucket(Bucket=bucket)

    def on(self, cluster: Cluster) -> World:
        """The same with another cluster."""
        other = copy.copy(self)
        other.cluster = cluster
        return other

    def source(self, model: str, server: str | None) -> str:
        """How a config names a model: its folder, or its URL in a server."""
        path = self.models.path(model)
        if server is None:
            return str(path)
        with self._locked(("upload", server, model)):
            if (server, model) not in self._uploaded:
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    with open(file, "rb") as body:
                        key = f"{model}/{file.relative_to(path)}"
                        self._clients[server].put_object(Bucket=_SOURCES, Key=key, Body=body)
                self._uploaded.add((server, model))
        return f"s3://{_SOURCES}/{model}"

    def endpoint(self, case: MergeCase) -> str | None:
        """Where the case's object store is, if it has one."""
        return self.servers[case.server].endpoint if case.server else None

    def place(self, case: MergeCase, shards: Sequence[str] = ()) -> Place:
        """A new place for the output of a case. Somebody else's upload is begun under the name of one of `shards`."""
        name = f"merge-{next(self._numbers)}"
        if not ((case.writes_s3 or case.writes_fsspec) and case.server):
            return FolderPlace(self.folder / "outputs" / name)
        # Every second time somebody else is at work on an object of the very same name.
        foreign = shards[case.seed % len(shards)] if shards and case.seed % 2 else "somebody-elses.bin"
        client, endpoint = self._clients[case.server], self.servers[case.server].endpoint
        if case.writes_fsspec:
            return FsspecPlace(client, _OUTPUTS, name, foreign, endpoint)
        return S3Place(client, _OUTPUTS, name, foreign)

    def environment(self, case: MergeCase, endpoint: str | None) -> dict[str, str]:
        """The environment of a driver."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))}
        store = {**self.servers[case.server].environment, "AWS_ENDPOINT_URL": endpoint} if case.server else {}
        return {**kept, **store, **self.cluster.environment, "PYTHONPATH": self.pythonpath}

    def write_config(self, case: MergeCase, endpoint: str | None, path: Path) -> Path:
        variant, server = case.variant, case.server if case.reads_s3 else None

        def expert(number: int, model: str) -> dict[str, Any]:
            prompts = {"positive_prompts": prompts_of(variant, number)} if variant.has_prompts else {}
            return {"source_model": self.source(model, server), **prompts, **variant.expert_keys}

        content = {
            "base_model": self.source(variant.base, server),
            "gate_mode": variant.mode,
            **variant.config,
            "experts": [expert(number, model) for number, model in enumerate(variant.experts)],
        }
        if endpoint is not None:
            content["storage"] = {
                # Actors run in a cluster that knows nothing of this driver's environment.
                "endpoint": endpoint,
                **({"checksum": "sha256"} if case.sha256 else {}),
                **({"deadline_s": 1} if case.impatient else {}),
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def reference(self, case: MergeCase) -> Reference:
        key = (case.variant.name, case.direction)  # servers must make no difference
        with self._locked(key):
            if key not in self._references:
                self._references[key] = self._merge_undisturbed(case, "-".join(key).replace(" ", "_"))
            return self._references[key]

    def _merge_undisturbed(self, case: MergeCase, name: str) -> Reference:
        plain, place, report = case.plain, self.place(case), self.folder / "references" / f"{name}.json"
        with self._counted(case) as (endpoint, requests):
            config = self.write_config(plain, endpoint, self.folder / "references" / f"{name}.yaml")
            run = subprocess.run(
                [*command(plain, config, place.at(endpoint)), "--result", str(report)],
                env=self.environment(plain, endpoint),
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            count = requests()
        if run.returncode != 0:
            raise RuntimeError(f"the undisturbed merge {name} failed:\n{run.stdout}{run.stderr}")
        folder = self.folder / "references" / name
        place.download(folder)
        place.remove()
        return Reference(folder=folder, requests=count, phases=json.loads(report.read_text())["phases"])

    @contextmanager
    def _counted(self, case: MergeCase) -> Iterator[tuple[str | None, Callable[[], int]]]:
        """An endpoint of the case's object store that counts its requests, and their number so far."""
        if case.server is None:
            yield None, lambda: 0
            return
        with FaultProxy(self.servers[case.server].endpoint) as proxy:
            yield proxy.url, lambda: sum(proxy.stats().requests.values())

    @contextmanager
    def _locked(self, key: object) -> Iterator[None]:
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            yield


def prompts_of(variant: Variant, expert: int) -> list[str]:
    """The prompts of an expert: words that no other expert's have, or a few that all tests use."""
    if not variant.prompts:
        return list(PROMPTS[expert])
    numbers = random.Random(expert)
    words = [f"{chr(97 + expert)}{numbers.randrange(1000)}" for _ in range(_PROMPT_WORDS * variant.prompts)]
    return [" ".join(words[start : start + _PROMPT_WORDS]) for start in range(0, len(words), _PROMPT_WORDS)]


def command(case: MergeCase, config: Path, output: str) -> list[str]:
    """The merge as a user runs it. The seed is that of random gates; it is always the same."""
    words = [sys.executable, "-m", "raymoe", "merge", str(config), output, "--quiet"]
    return [*words, "--out-shard-size", str(case.variant.shard_bytes), "--actors", str(case.actors)]


@contextmanager
def open_world(folder: Path, kinds: Sequence[str], cpus: int, *, job_server: bool = False) -> Iterator[World]:
    """Servers and cluster start here; all of it is gone at the end, but for the work folder's logs."""
    with contextlib.ExitStack() as stack:
        keys = new_keys()  # the same for all servers: actors have one pair in their environment
        servers = {kind: stack.enter_context(start_server(kind, folder / "servers" / kind, keys)) for kind in kinds}
        variables = {"PYTHONPATH": install(folder / "fsspec")}
        if servers:
            one = next(iter(servers.values()))
            variables |= {k: v for k, v in one.environment.items() if k != "AWS_ENDPOINT_URL"}
        cluster = stack.enter_context(ray_cluster(variables, folder / "ray.log", cpus, job_server=job_server))
        for name in ("models", "outputs", "references"):
            stack.callback(shutil.rmtree, folder / name, ignore_errors=True)
            (folder / name).mkdir(exist_ok=True)
        yield World(folder, servers, cluster, variables["PYTHONPATH"])
