"""Sources in object stores: every way to read gives what a local file gives, in bounded memory, or a clear error."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.errors import CheckpointError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url
from raymoe.planning.owner import ROUTER
from raymoe.planning.plan import Transform
from raymoe.routers.in_process import compute_routers_locally
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.hub import HubOptions
from raymoe.storage.shard_stream import shard_chunks
from raymoe.storage.source_reader import CHUNK_BYTES, SourceReader
from tests.cli.commands import wait_until
from tests.object_store.fixtures import bucket, server
from tests.object_store.servers import environment, running_server

__all__ = ["bucket", "server"]

OPTIONS = StorageOptions(deadline_s=60)
SIZE = 5 * CHUNK_BYTES // 2 + 1234


@pytest.fixture
def reader() -> Iterator[SourceReader]:
    with SourceReader(HubOptions(), OPTIONS) as opened:
        yield opened


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("content") / "model.safetensors"
    path.write_bytes(np.random.default_rng(3).bytes(SIZE))
    return path


@pytest.fixture
def pair(bucket: str, content: Path) -> tuple[SourceFile, SourceFile]:
    """The same file here and in the store."""
    return SourceFile(location=str(content), size=SIZE), put(f"{bucket}/m/model.safetensors", content.read_bytes())


def put(url: str, data: bytes) -> SourceFile:
    info = open_store(url, OPTIONS).put(url, data)
    return SourceFile(location=url, size=info.size, etag=info.etag)


def upload(folder: Path, url: str) -> str:
    for path in folder.iterdir():
        put(join_url(url, path.name), path.read_bytes())
    return url


def bytes_read(url: str) -> int:
    return open_store(url, OPTIONS).counters.bytes_read


RANGES = [(0, 1), (7, 7), (0, SIZE), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (5, 2 * CHUNK_BYTES + 5), (SIZE - 1, SIZE)]


@pytest.mark.parametrize("span", RANGES)
def test_chunks(reader: SourceReader, pair: tuple[SourceFile, SourceFile], span: tuple[int, int]) -> None:
    local, remote = (b"".join(bytes(chunk) for chunk in reader.chunks(file, *span)) for file in pair)
    assert remote == local
    assert len(remote) == span[1] - span[0]


def test_ranges(reader: SourceReader, pair: tuple[SourceFile, SourceFile]) -> None:
    """Many short ones: far apart and near, twice the same, in any order, one within another, empty."""
    numbers = np.random.default_rng(1)
    ranges = [(int(at), int(at) + int(numbers.integers(1, 5000))) for at in numbers.integers(0, SIZE - 5000, 60)]
    ranges += [ranges[3], (0, 100), (20, 40), (100, 101), (SIZE - 3, SIZE), (9, 9)]
    local, remote = ([bytes(found) for found in reader.read_ranges(file, ranges)] for file in pair)
    assert remote == local
    for start, end in ranges[:5]:
        buffers = [bytearray(end - start), bytearray(end - start)]
        for file, buffer in zip(pair, buffers, strict=True):
            reader.read_into(file, start, memoryview(buffer))
        assert buffers[0] == buffers[1] != bytes(end - start)


def test_near_ranges_are_one_request(reader: SourceReader, pair: tuple[SourceFile, SourceFile]) -> None:
    """The rows of an embedding that prompts use: read by rows, and not as a whole."""
    store = open_store(pair[1].location, OPTIONS)
    before = store.counters
    near = [(at, at + 1000) for at in range(0, 1_000_000, 50_000)]
    far = [(at, at + 1000) for at in range(8 << 20, 16 << 20, 2 << 20)]
    reader.read_ranges(pair[1], [*far, *near])
    after = store.counters
    assert after.requests - before.requests == 1 + len(far)
    assert after.bytes_read - before.bytes_read == near[-1][1] + 1000 * len(far)


def entry(file: SourceFile, start: int, end: int) -> TensorEntry:
    return TensorEntry(name=f"t{start}", dtype="U8", shape=(end - start,), file=file, start=start, end=end)


def test_views(reader: SourceReader, pair: tuple[SourceFile, SourceFile]) -> None:
    """Of tensors of several chunks, of none, and again after `release`."""
    for start, end in ((11, 11), (3, 2000), (1, SIZE - 1)):
        local, remote = (bytes(reader.view(entry(file, start, end))) for file in pair)
        assert remote == local
    seen = bytes_read(pair[1].location)
    view = reader.view(entry(pair[1], 3, 2000))
    assert bytes_read(pair[1].location) == seen, "kept"
    reader.release()
    assert bytes(reader.view(entry(pair[1], 3, 2000))) == bytes(view)
    assert bytes_read(pair[1].location) == seen + 1997


def test_views_are_not_kept_for_good(reader: SourceReader, pair: tuple[SourceFile, SourceFile]) -> None:
    """A shard may need any number of LoRA factors: the latest are kept, and read once; older ones are forgotten."""
    entries = [entry(pair[1], start, SIZE - start) for start in range(8)]  # 160 MiB
    for number, tensor in enumerate(entries):
        held = bytes_read(pair[1].location)
        for again in entries[max(0, number - 1) : number]:
            reader.view(again)
        assert bytes_read(pair[1].location) == held
        assert len(reader.view(tensor)) == tensor.nbytes
    held = bytes_read(pair[1].location)
    reader.view(entries[0])
    assert bytes_read(pair[1].location) == held + entries[0].nbytes


def test_reading_ahead_is_bounded(reader: SourceReader, bucket: str) -> None:
    """Whoever stops taking chunks stops the reading: two more are under way, whatever the length of the range."""
    file = put(f"{bucket}/large", bytes(10 * CHUNK_BYTES))
    seen = bytes_read(file.location)
    chunks = reader.chunks(file, 0, file.size)
    next(chunks)
    wait_until(lambda: bytes_read(file.location) - seen == 3 * CHUNK_BYTES, "three chunks")
    for _ in range(20):  # a while for the store, which could have sent more
        reader.read_into(file, 0, memoryview(bytearray(1 << 20)))
    assert bytes_read(file.location) - seen == 3 * CHUNK_BYTES + (20 << 20)
    next(chunks)
    wait_until(lambda: bytes_read(file.location) - seen == 4 * CHUNK_BYTES + (20 << 20), "a fourth")


def test_threads_end_with_the_reader(pair: tuple[SourceFile, SourceFile]) -> None:
    before = set(threading.enumerate())
    with SourceReader(HubOptions(), OPTIONS) as reader:
        chunks = reader.chunks(pair[1], 0, SIZE)
        next(chunks)
        assert [t for t in set(threading.enumerate()) - before if t.name.startswith("read")]
    wait_until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("read")], "their end")


@pytest.mark.parametrize("knows_etag", [True, False])
def test_a_shorter_object(reader: SourceReader, bucket: str, knows_etag: bool) -> None:
    """It was replaced since it was planned with: by ETag, or where the store has none, by its length."""
    file = put(f"{bucket}/m/model.safetensors", bytes(100_000))
    file = SourceFile(location=file.location, size=file.size, etag=file.etag if knows_etag else None)
    put(file.location, bytes(60_000))
    reads: list[Callable[[], Any]] = [
        lambda: list(reader.chunks(file, 0, 100_000)),
        lambda: reader.read_into(file, 59_990, memoryview(bytearray(20))),
        lambda: reader.read_into(file, 70_000, memoryview(bytearray(20))),
        lambda: reader.read_ranges(file, [(0, 10), (90_000, 90_010)]),
        lambda: reader.view(entry(file, 10, 90_000)),
    ]
    for read in reads:
        with pytest.raises(CheckpointError, match="no longer what the merge was planned with") as failed:
            read()
        assert file.location in str(failed.value)


def test_an_object_that_is_gone(reader: SourceReader, bucket: str) -> None:
    file = SourceFile(location=f"{bucket}/none.safetensors", size=10, etag="0" * 32)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: there is no such object"):
        list(reader.chunks(file, 0, 10))


# --- what is computed from what was read


@pytest.fixture(scope="module")
def models(
    zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Path], list[str]]]:
    """A base, an expert, and an adapter of the base; here and in moto's server."""
    from tests.pico import save_lora

    base, expert = zoo("llama", dtype="bfloat16"), zoo("llama", seed=1, dtype="bfloat16")
    adapter = save_lora(tmp_path_factory.mktemp("lora") / "adapter", base, ["up_proj", "down_proj", "q_proj"])
    name = f"models-{uuid.uuid4().hex[:8]}"
    running = running_server("moto")
    running.client().create_bucket(Bucket=name)
    with environment(running.environment):
        folders = [base, expert, adapter]
        yield folders, [upload(folder, f"s3://{name}/m{number}") for number, folder in enumerate(folders)]


def config_of(places: list[Any], mode: str) -> dict[str, Any]:
    from tests.pico import merge_config

    base, expert, adapter = map(str, places)
    config = merge_config(Path("base"), [f"{base}+{adapter}", expert], mode=mode, dtype="float16")
    config["base_model"] = base
    config["experts"][0]["residual_scale"] = 0.5
    config["experts"][1]["noise_scale"] = 0.02
    return config


@pytest.mark.s3
def test_transforms(reader: SourceReader, models: tuple[list[Path], list[str]]) -> None:
    """LoRA, scale, noise and cast: the bytes of all shards."""
    kinds = set()
    shards = [raymoe.plan(config_of(places, "random")).shards for places in models]
    for local, remote in zip(*shards, strict=True):
        if local.owner == ROUTER:
            continue
        assert remote.header == local.header
        kinds |= {
            (p.what.lora is None, p.what.noise_scale, p.what.scale)
            for p in remote.parts
            if isinstance(p.what, Transform)
        }
        chunks = [b"".join(map(bytes, shard_chunks(shard, reader))) for shard in (local, remote)]
        assert chunks[0] == chunks[1]
    assert {(False, None, 0.5), (True, 0.02, None), (True, None, None)} <= kinds


@pytest.mark.parametrize("mode", ["hidden", "ridge", "cheap_embed"])
@pytest.mark.s3
def test_gates(reader: SourceReader, models: tuple[list[Path], list[str]], mode: str) -> None:
    """Bit for bit, for a full expert and one that is an adapter's."""
    for prompt_model in ("base",) if mode == "cheap_embed" else ("base", "expert"):
        plans = [raymoe.plan(config_of(places, mode) | {"prompt_model": prompt_model}) for places in models]
        for member in plans[1].gates.experts:
            assert {ref.entry.file.location[:5] for ref in member.weights.values()} == {"s3://"}
        local, remote = (compute_routers_locally(p.gates, reader, device="cpu")[0] for p in plans)
        assert local.keys() == remote.keys()
        for owner, rows in local.items():
            assert rows.dtype == remote[owner].dtype and rows.any()
            assert rows.tobytes() == remote[owner].tobytes()
