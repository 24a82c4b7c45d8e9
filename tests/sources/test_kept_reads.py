"""What planning has read of objects: found again for the same object only, and never in the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.urls import join_url
from raymoe.sources.facts import ModelFacts, SourceFile
from raymoe.sources.kept_reads import KeptReads
from raymoe.sources.resolve import resolve_model, resolve_models
from raymoe.sources.safetensors_header import PREFIX_BYTES
from tests.object_store.fault_proxy import FaultProxy
from tests.object_store.servers import Server
from tests.sources.checkpoints import write_json, write_sharded
from tests.sources.test_bucket_folder import upload

FILE = SourceFile(location="s3://bucket/m/config.json", size=20, etag="abc")
WEIGHTS = SourceFile(location="s3://bucket/m/model.safetensors", size=10**9, etag="def")


def kept(content: bytes) -> KeptReads:
    return KeptReads(lambda: content)


def written(*reads: tuple[SourceFile, int, int, bytes]) -> bytes:
    """The content that a run keeps that has read this."""
    run = KeptReads()
    for read in reads:
        run.add(*read)
    return run.content()


def test_a_read_is_found_for_the_same_object_only() -> None:
    run = kept(written((FILE, 0, 20, b'{"model_type": "x"} ')))
    assert run.find(FILE, 0, 20) == b'{"model_type": "x"} '
    others = [
        dataclasses.replace(FILE, etag="other"),
        dataclasses.replace(FILE, etag=None),
        dataclasses.replace(FILE, size=21),
        dataclasses.replace(FILE, location="s3://bucket/other/config.json"),
    ]
    assert [run.find(other, 0, 20) for other in others] == [None] * 4
    assert run.find(FILE, 0, 19) is None


def test_only_headers_and_json_of_objects_are_kept() -> None:
    local = SourceFile(location="/m/config.json", size=2)
    on_hub = SourceFile(location="hf://org/name@0123/config.json", size=2)
    pickled = dataclasses.replace(WEIGHTS, location="s3://bucket/m/pytorch_model.bin")
    large = dataclasses.replace(FILE, size=1 << 23)
    others = [(local, 0, 2), (on_hub, 0, 2), (pickled, 0, 2), (large, 0, 1 << 23), (WEIGHTS, 500_000, 500_002)]
    assert written(*((file, start, end, b"{}") for file, start, end in others)) == b""
    header = (1000).to_bytes(8, "little") + b" " * 1000
    run = kept(written((WEIGHTS, 0, PREFIX_BYTES, header + b"tensor bytes" * 100)))
    assert run.find(WEIGHTS, 0, PREFIX_BYTES) == header


def test_entries_that_are_not_used_again_are_dropped() -> None:
    other = dataclasses.replace(FILE, location="s3://bucket/gone/config.json")
    first = kept(written((FILE, 0, 2, b"{}"), (other, 0, 2, b"[]")))
    assert first.find(FILE, 0, 2) == b"{}"
    second = kept(first.content())
    assert second.find(FILE, 0, 2) == b"{}" and second.find(other, 0, 2) is None


def test_a_content_that_is_damaged_counts_as_empty() -> None:
    content = written((FILE, 0, 2, b"{}"), (WEIGHTS, 0, 10, (2).to_bytes(8, "little") + b"{}"))
    damaged = [b"", b"{}", content[:-1], content[:40], content + b"x", b"raymoe reads 9\n" + content[15:]]
    damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content))]
    for each in damaged:
        run = kept(each)
        assert run.find(FILE, 0, 2) is None and run.find(WEIGHTS, 0, 10) is None
    assert kept(content).find(FILE, 0, 2) == b"{}"


def test_an_entry_never_unpacks_to_more_than_was_asked_for() -> None:
    """A content with a right checksum may still come from elsewhere."""
    run = KeptReads()
    run.add(FILE, 0, 10, b" " * 1_000_000)
    assert kept(run.content()).find(FILE, 0, 10) is None


def test_nothing_is_loaded_for_local_models(make_model: Callable[..., Path]) -> None:
    def load() -> bytes:
        raise AssertionError("asked")

    run = KeptReads(load)
    resolve_models([parse_model_ref(str(make_model()))], kept=run)
    assert run.content() == b""


@pytest.fixture
def large(tmp_path: Path, tensors: Any) -> Path:
    """A model in two shards; the header of one is longer than what is read first."""
    folder, many = tmp_path / "large", {f"model.layers.{n}.up.weight": np.ones(2, "float32") for n in range(800)}
    shards = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": many}
    write_sharded(folder, {name: dict(content) for name, content in shards.items()})
    write_json(folder / "config.json", {"model_type": "llama"})
    assert int.from_bytes((folder / "model-00002-of-00002.safetensors").read_bytes()[:8], "little") > PREFIX_BYTES
    return folder


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_a_second_plan_reads_no_headers(server: Server, bucket: str, large: Path) -> None:
    """One listing shows that the objects are the same. A shard that was replaced is read again."""
    url = upload(large, join_url(bucket, "m"))
    with FaultProxy(server.endpoint) as proxy:
        storage = StorageOptions(endpoint=proxy.url)

        def facts(run: KeptReads) -> tuple[ModelFacts, int, int]:
            proxy.reset_stats()
            (found,) = resolve_models([parse_model_ref(url)], storage=storage, kept=run).values()
            requests = proxy.reset_stats().requests
            return found, requests["GetObject"], sum(requests.values())

        first = KeptReads()
        alone, reads, _ = facts(first)
        assert reads == 5, "config, index, two headers, one of them in two requests"
        again = kept(first.content())
        assert facts(again) == (alone, 0, 1)
        assert facts(kept(again.content())) == (alone, 0, 1), "a third run finds what the second one has kept"

        replaced = {name: np.zeros(3, "float32") for name in ("model.embed.weight", "model.norm.weight", "new")}
        save_file(replaced, large / "model-00001-of-00002.safetensors")
        index = {"weight_map": dict.fromkeys(replaced, "model-00001-of-00002.safetensors")}
        index["weight_map"] |= {f"model.layers.{n}.up.weight": "model-00002-of-00002.safetensors" for n in range(800)}
        write_json(large / "model.safetensors.index.json", index)
        upload(large, url)
        changed, reads, _ = facts(kept(first.content()))
        assert reads == 2 and changed == resolve_model(parse_model_ref(url))
        assert changed.index.tensors["new"].shape == (3,)
