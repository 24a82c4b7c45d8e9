"""Outputs on any file system of fsspec: plain streams with the same journal, whole files or none."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

import raymoe
from raymoe.errors import CheckpointError, MergeFailed, Problem
from raymoe.object_store.options import StorageOptions
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Shard
from raymoe.routers.router_matrices import random_router_rows, router_bytes
from raymoe.sources.resolve import HubOptions
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME, FileRecord
from raymoe.storage.outputs.fsspec import StreamOutput
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.open_output import open_output, output_location
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.source_reader import SourceReader

OPTIONS = StorageOptions(deadline_s=30)


@pytest.fixture
def plan(zoo: Callable[..., Path]) -> MergePlan:
    from tests.pico import merge_config

    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random")
    config["experts"][1]["noise_scale"] = 0.01
    return raymoe.plan(config, MergeOptions(max_shard_bytes=100_000, model_card=False))


@pytest.fixture(params=["memory", "own"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """memory:// lets everybody see a file from its first byte on; the other puts it in place at its end."""
    if request.param == "memory":
        url = f"memory://test-{uuid.uuid4().hex[:8]}/merged"
        yield url
        fsspec.filesystem("memory").rm(url.rsplit("/", 1)[0], recursive=True)
    else:
        fsspec.register_implementation("raymoetest", OwnFileSystem, clobber=True)
        yield f"raymoetest://bucket{tmp_path}/merged"


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


def names(out: str) -> list[str]:
    filesystem, path = fsspec.url_to_fs(out)
    filesystem.invalidate_cache()
    found = filesystem.find(path) if filesystem.exists(path) else []
    return sorted(name.removeprefix(path).strip("/") for name in found)


def visible(out: str) -> list[str]:
    return [name for name in names(out) if not name.startswith(".raymoe/")]


def read(out: str, name: str) -> bytes:
    filesystem, path = fsspec.url_to_fs(f"{out}/{name}")
    content: bytes = filesystem.cat_file(path)
    return content


def put(out: str, name: str, content: bytes) -> None:
    filesystem, path = fsspec.url_to_fs(f"{out}/{name}")
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    filesystem.pipe_file(path, content)


def started(plan: MergePlan, out: str) -> StreamOutput:
    target = open_output(output_location(out), OPTIONS)
    assert isinstance(target, StreamOutput)
    assert target.problems(digest=plan.digest, output_bytes=0, overwrite=False) == []
    target.begin(plan.digest, {}, fresh=False)
    return target


def write_shard(plan: MergePlan, target: Output, shard: Shard, progress: Callable[[int, int], None]) -> FileRecord:
    router = router_bytes(plan.gates, random_router_rows(plan.gates))
    with SourceReader(HubOptions()) as reader:
        return target.complete(shard, [target.do(job, reader, progress, router) for job in target.jobs(shard)])


def finish(plan: MergePlan, target: Output) -> tuple[list[FileRecord], int]:
    """The records of all files, and how many bytes of shards were written for them."""
    written: list[int] = []
    records = [write_shard(plan, target, s, lambda sent, copied: written.append(sent)) for s in plan.shards]
    records.append(target.write_small("chat_templates/a.jinja", b"{{ a }}"))
    records.append(target.write_index(json.dumps(plan.index).encode()))
    target.end(b"{}")
    target.release()
    return records, sum(written)


def test_bytes_are_those_of_a_folder(plan: MergePlan, out: str, tmp_path: Path) -> None:
    records, written = finish(plan, started(plan, out))
    folder = LocalOutput(tmp_path / "local")
    folder.lock()
    folder.begin(plan.digest, {}, fresh=False)
    expected, _ = finish(plan, folder)
    assert records == expected, "the same names, sizes and checksums"
    files = {str(path.relative_to(folder.root)) for path in folder.root.rglob("*") if path.is_file()}
    assert set(names(out)) == files, "and no journal is left"
    for name in files:
        assert read(out, name) == (folder.root / name).read_bytes()
    assert written == sum(shard.nbytes for shard in plan.shards)


def test_a_file_url_is_a_folder(plan: MergePlan, tmp_path: Path) -> None:
    target = open_output(output_location(f"file://{tmp_path}/out"), OPTIONS)
    assert isinstance(target, LocalOutput) and target.root == tmp_path / "out"


class Failing(SourceReader):
    """Sources that can be read up to some byte."""

    left = 0

    def read_into(self, file: Any, start: int, buffer: memoryview) -> None:
        self._spend(len(buffer))
        super().read_into(file, start, buffer)

    def chunks(self, file: Any, start: int, end: int) -> Iterator[memoryview]:
        for chunk in super().chunks(file, start, end):
            yield chunk[: len(chunk) // 2]
            self._spend(len(chunk))
            yield chunk[len(chunk) // 2 :]

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise CheckpointError([Problem(where="source", what="gone")])


@pytest.mark.parametrize("readable", [0, 30_000, 60_000])
def test_a_stream_that_breaks_off_leaves_nothing(plan: MergePlan, out: str, readable: int) -> None:
    target = started(plan, out)
    shard = next(shard for shard in plan.shards if shard.owner == Owner.expert(0) and shard.nbytes > 70_000)
    (job,) = target.jobs(shard)
    with Failing(HubOptions()) as reader:
        reader.left = readable
        with pytest.raises(CheckpointError):
            target.do(job, reader, lambda sent, copied: None)
    assert visible(out) == []
    finish(plan, target)
    content = read(out, shard.file_name)
    assert content[: len(shard.header)] == shard.header and len(content) == shard.nbytes
    assert not [name for name in names(out) if name.startswith(".raymoe")]


def test_finished_shards_are_kept_unless_they_changed(plan: MergePlan, out: str) -> None:
    """By their content: these stores have no checksum that could be asked for."""
    dead = started(plan, out)
    one, two, *_ = plan.shards
    for shard in (one, two):
        write_shard(plan, dead, shard, lambda sent, copied: None)
    content = read(out, two.file_name)
    put(out, two.file_name, content[:-1] + bytes([content[-1] ^ 1]))
    target = started(plan, out)
    assert target.jobs(one) == ()
    assert len(target.jobs(two)) == 1
    records, written = finish(plan, target)
    assert written == sum(shard.nbytes for shard in plan.shards) - one.nbytes
    assert read(out, two.file_name) == content
    for record in records:
        assert record.checksum == f"xxh3-128:{xxhash.xxh3_128(read(out, record.name)).hexdigest()}"


def test_whose_output_it_is(plan: MergePlan, out: str) -> None:
    first = started(plan, out)
    write_shard(plan, first, plan.shards[0], lambda sent, copied: None)
    (problem,) = StreamOutput(out, OPTIONS).problems(digest="other", output_bytes=0, overwrite=False)
    assert "an unfinished merge of another plan" in problem.what
    second = started(plan, out)
    assert not first.is_reachable() and second.is_reachable()
    for step in (
        lambda: first.write_small("config.json", b"{}"),
        lambda: first.write_index(b"{}"),
        lambda: first.end(b"{}"),
    ):
        with pytest.raises(MergeFailed, match="another run of this merge has taken over"):
            step()
    finish(plan, second)
    (problem,) = StreamOutput(out, OPTIONS).problems(digest=plan.digest, output_bytes=0, overwrite=False)
    assert "holds a finished merge" in problem.what


def test_index_of_somebody_else(plan: MergePlan, out: str) -> None:
    target = started(plan, out)
    put(out, INDEX_NAME, b'{"weight_map": {}}')
    with pytest.raises(MergeFailed, match=r"this file belongs to another model.*--overwrite"):
        finish(plan, target)
    assert read(out, INDEX_NAME) == b'{"weight_map": {}}' and RECORD_NAME not in names(out)


def test_overwriting_removes_a_checkpoint_and_nothing_else(plan: MergePlan, out: str) -> None:
    finish(plan, started(plan, out))
    foreign = ["notes.txt", "model-notes.md", "modeling_moe.py", "runs/model-00001-of-00001.safetensors"]
    for name in (*foreign, "pytorch_model-1.bin", "model-x.safetensors"):
        put(out, name, b"old")
    put(out, RECORD_NAME, b'{"files": {"chat_templates/a.jinja": {}}}')
    StreamOutput(out, OPTIONS).begin("another plan", {}, fresh=True)
    assert names(out) == sorted([*foreign, ".raymoe/plan.json"])
