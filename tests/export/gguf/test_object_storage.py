"""A checkpoint in a bucket is converted where it lies, to the bytes of the local one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raymoe.errors import ProblemReport
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url
from tests.object_store.fixtures import bucket, server, store

__all__ = ["bucket", "server", "store"]


def test_same_bytes(bucket: str, merged: Callable[..., Path], tmp_path: Path) -> None:
    folder, url = merged("llama", "mixtral"), f"{bucket}/merged"
    objects = open_store(url)
    for path in folder.iterdir():
        objects.put(join_url(url, path.name), path.read_bytes())
    asked = GgufOptions(type="q8_0", name="same")
    of_bucket = write_gguf(url, tmp_path / "bucket.gguf", asked)
    of_folder = write_gguf(folder, tmp_path / "folder.gguf", asked)
    assert of_bucket.path.read_bytes() == of_folder.path.read_bytes()


def test_nothing_there(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemReport, match=r"merged-nowhere: there are no files under this URL"):
        write_gguf(f"{bucket}/merged-nowhere", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
