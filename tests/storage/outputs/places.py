"""Places for outputs, as another program sees them, and a merge into one without Ray: a run's calls in their order."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.planning import MergePlan
from raymoe.planning.plan import Shard
from raymoe.routers.router_matrices import router_bytes
from raymoe.sources.hub import HubOptions
from raymoe.storage.file_names import RECORD_NAME, FileRecord
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.source_reader import SourceReader
from tests.object_store.servers import environment, running_server

OPTIONS = StorageOptions(deadline_s=30)


class Place:
    """A place as another program sees it."""

    def __init__(self, location: str, server: str = "moto") -> None:
        """`server` is the kind of server that s3:// is here."""
        self.location, self._server = location, server

    def open(self) -> tuple[Any, str]:
        """A filesystem of fsspec, and this place in it.

        fsspec keeps one for the same arguments, whatever the environment says now: so a server is named by them.
        """
        options: dict[str, Any] = {"use_listings_cache": False}
        if self.location.startswith("s3://"):
            server = running_server(self._server)
            options |= {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
        filesystem, path = fsspec.url_to_fs(self.location, **options)
        return filesystem, path

    def files(self) -> dict[str, bytes]:
        filesystem, path = self.open()
        filesystem.invalidate_cache()
        found = filesystem.find(path) if filesystem.exists(path) else []
        return {name.removeprefix(path).strip("/"): filesystem.cat_file(name) for name in found}

    def open_uploads(self) -> list[str]:
        if not self.location.startswith("s3://"):
            return []
        bucket = self.location.removeprefix("s3://").split("/")[0]
        found = running_server(self._server).client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return [upload["Key"] for upload in found]

    def put(self, name: str, content: bytes) -> None:
        filesystem, path = self.open()
        filesystem.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{path}/{name}", content)

    def remove(self, name: str) -> None:
        filesystem, path = self.open()
        filesystem.rm_file(f"{path}/{name}")

    def clear(self) -> None:
        """Remove everything. A store in memory looks through all that it has for each listing."""
        filesystem, path = self.open()
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    def etag(self, name: str) -> str:
        """The ETag of an object on S3."""
        bucket, key = f"{self.location}/{name}".removeprefix("s3://").split("/", 1)
        return str(running_server(self._server).client().head_object(Bucket=bucket, Key=key)["ETag"]).strip('"')

    def visible(self) -> list[str]:
        return sorted(name for name in self.files() if not name.startswith(".raymoe/"))


class OwnFileSystem(fsspec.get_filesystem_class("file")):  # type: ignore[misc]
    """Files of this machine under a scheme of our own: what a store with temporary names and a commit looks like."""

    protocol = "raymoetest"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        return super()._strip_protocol(str(path).removeprefix("raymoetest://bucket"))


def made_place(kind: str, tmp_path: Path) -> Iterator[Place]:
    """A place of a kind: `folder`, `memory` and `own` (stores of fsspec), or the server of S3 that it is on."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    if kind == "folder":
        yield Place(str(tmp_path / "out"))
    elif kind == "memory":
        yield Place(f"memory://{name}/out")
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
    elif kind == "own":
        fsspec.register_implementation("raymoetest", OwnFileSystem, clobber=True)
        yield Place(f"raymoetest://bucket{tmp_path}/{name}/out")
    else:
        server = running_server(kind)
        with environment(server.environment):
            server.client().create_bucket(Bucket=name)
            yield Place(f"s3://{name}/out", kind)


def started(place: Place, plan: MergePlan, *, fresh: bool = False, options: StorageOptions = OPTIONS) -> Output:
    """A run that has begun. On a folder it gives the lock back, as one does whose driver is killed."""
    output = open_output(Location.parse(place.location), options)
    output.lock()
    output.begin(plan.digest, {}, fresh=fresh)
    return output


def killed_driver(output: Output) -> None:
    """The kernel takes the lock away; actors may live on."""
    if isinstance(output, LocalOutput) and output.journal._lock is not None:
        os.close(output.journal._lock)
        output.journal._lock = None


def do_shard(output: Output, plan: MergePlan, shard: Shard, reader: SourceReader | None = None) -> list[Any]:
    router = router_bytes(plan.gates, {})
    with reader or SourceReader(HubOptions()) as reading:
        return [output.do(job, reading, lambda sent, copied: None, router) for job in output.jobs(shard)]


def finish(output: Output, plan: MergePlan) -> None:
    write_rest(output, plan, write_shards(output, plan))


def write_shards(output: Output, plan: MergePlan) -> list[FileRecord]:
    return [output.complete(shard, do_shard(output, plan, shard)) for shard in plan.shards]


def write_rest(output: Output, plan: MergePlan, shards: list[FileRecord]) -> None:
    records = [*shards]
    records.append(output.write_small("config.json", json.dumps(plan.config).encode()))
    records.append(output.write_index(json.dumps(plan.index).encode()))
    output.end(record_of(plan, records))
    output.release()


def record_of(plan: MergePlan, records: list[FileRecord]) -> bytes:
    files = {each.name: {"size": each.size, "checksum": each.checksum} for each in records}
    return json.dumps({"plan_digest": plan.digest, "files": files}).encode()


_expected: dict[str, dict[str, bytes]] = {}


def expected(plan: MergePlan, tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed merge."""
    if plan.digest not in _expected:
        alone = Place(str(tmp_path / f"alone-{plan.digest[:8]}"))
        finish(started(alone, plan), plan)
        _expected[plan.digest] = alone.files()
    return _expected[plan.digest]


def check_is_alone(place: Place, plan: MergePlan, tmp_path: Path) -> None:
    """The output is this plan's merge, and nothing is left beside it."""
    there, right = place.files(), expected(plan, tmp_path)
    assert there.keys() == right.keys()
    wrong = {name for name in right if there[name] != right[name] and name != RECORD_NAME}
    assert not wrong
    assert json.loads(there[RECORD_NAME])["plan_digest"] == plan.digest
    assert place.open_uploads() == []
