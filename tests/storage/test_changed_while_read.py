"""A source that is written while a shard is made of it: nothing of the shard is kept, even if it is put back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raymoe.errors import CheckpointError
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.sources.hub import HubOptions
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.source_reader import SourceReader
from tests.storage.outputs.places import Place, made_place
from tests.storage.plans import one_shard, save, tensor

OPTIONS = StorageOptions(deadline_s=30)


@pytest.fixture(params=["folder", "memory", pytest.param("moto", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from made_place(request.param, tmp_path)


def started(place: Place, *, fresh: bool = False) -> Output:
    output = open_output(Location.parse(place.location), OPTIONS)
    output.lock()
    output.begin("plan", {}, fresh=fresh)
    return output


def test_torn_shard_is_not_kept(place: Place, tmp_path: Path) -> None:
    """The source is put back with its old time, so that no stamp tells of it."""
    entries = save(tmp_path / "m", {"a": np.zeros(1 << 18, np.float32)})
    source, backup = tmp_path / "m/model.safetensors", tmp_path / "backup"
    shutil.copy2(source, backup)
    shard = one_shard([tensor(entry) for entry in entries.values()])

    def rewrite(sent: int, copied: int) -> None:
        if sent > 1000:  # not the header, which is made before the source is opened
            with source.open("r+b") as file:
                file.seek(-1000, 2)
                file.write(b"\x01" * 1000)

    output = started(place)
    (job,) = output.jobs(shard)
    with (
        pytest.raises(CheckpointError, match="written while it was read"),
        SourceReader(HubOptions()) as reader,
    ):
        output.do(job, reader, rewrite)
    notes = [name for name in place.files() if name.startswith((".raymoe/done/", ".raymoe/sent/", ".raymoe/parts/"))]
    assert notes == [] and shard.file_name not in place.files()
    output.release()
    shutil.copy2(backup, source)

    output = started(place)
    with SourceReader(HubOptions()) as reader:
        results = [output.do(job, reader, lambda sent, copied: None) for job in output.jobs(shard)]
    output.complete(shard, results)
    output.release()
    assert place.files()[shard.file_name].endswith(bytes(1 << 20))


def test_a_merge_of_changed_sources_begins_again(place: Place, tmp_path: Path) -> None:
    """Shards that were whole before the change are removed too, also where --overwrite would go on."""
    entries = save(tmp_path / "m", {"a": np.ones(1000, np.float32)})
    shard = one_shard([tensor(entry) for entry in entries.values()])
    output = started(place)
    with SourceReader(HubOptions()) as reader:
        output.complete(shard, [output.do(job, reader, lambda sent, copied: None) for job in output.jobs(shard)])
    output.invalidate()
    output.release()
    output = started(place)
    assert shard.file_name not in place.files()
    assert len(output.jobs(shard)) == 1
    output.release()
