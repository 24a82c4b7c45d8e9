"""What every output promises, on each kind of place: a folder, fsspec stores with and without a commit, and S3.

A new back end is done when its kind is in `KINDS` and these tests pass. What only one back end can do has a file of its
own; what happens when two runs meet is in test_takeover.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

import raymoe
from raymoe.errors import CheckpointError, MergeFailed, Problem
from raymoe.object_store.location import Location
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Shard
from raymoe.routers.router_matrices import router_bytes
from raymoe.sources.hub import HubOptions
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME, FileRecord
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.source_reader import SourceReader
from tests.storage.outputs.places import (
    OPTIONS,
    Place,
    check_is_alone,
    do_shard,
    killed_driver,
    made_place,
    record_of,
    started,
    write_rest,
)

STORES = (
    "memory",
    "own",
    pytest.param("moto", marks=pytest.mark.s3),
    pytest.param("juicefs", marks=[pytest.mark.s3, pytest.mark.soak]),
)
KINDS = ("folder", *STORES)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from made_place(request.param, tmp_path)


@pytest.fixture(scope="module")
def plan(zoo: Callable[..., Path]) -> MergePlan:
    """Copied and computed tensors, in several shards for each expert."""
    from tests.pico import merge_config

    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random")
    config["experts"][1]["noise_scale"] = 0.01
    return raymoe.plan(config, MergeOptions(max_shard_bytes=100_000, model_card=False))


def opened(place: Place) -> Output:
    return open_output(Location.parse(place.location), OPTIONS)


def problems(place: Place, digest: str | None, *, overwrite: bool = False) -> list[str]:
    found = opened(place).problems(digest=digest, output_bytes=0, overwrite=overwrite)
    assert all(problem.where == place.location for problem in found)
    return [problem.what for problem in found]


def write_shard(plan: MergePlan, output: Output, shard: Shard, written: list[int]) -> FileRecord:
    """`written` gets the numbers of bytes that are written for it."""
    router = router_bytes(plan.gates, {})
    with SourceReader(HubOptions()) as reader:
        jobs = output.jobs(shard)
        return output.complete(
            shard, [output.do(j, reader, lambda sent, _: written.append(sent), router) for j in jobs]
        )


def finish(plan: MergePlan, output: Output) -> tuple[list[FileRecord], int]:
    """The records of all files, and how many bytes of shards were written for them."""
    written: list[int] = []
    shards = [write_shard(plan, output, shard, written) for shard in plan.shards]
    write_rest(output, plan, shards)
    return shards, sum(written)


def large_shard(plan: MergePlan) -> Shard:
    return next(shard for shard in plan.shards if shard.owner == Owner.expert(0) and shard.nbytes > 70_000)


def checksum(place: Place, record: FileRecord) -> str:
    """What a record is to say of a file, found by other means."""
    if not place.location.startswith("s3://"):
        return f"xxh3-128:{xxhash.xxh3_128(place.files()[record.name]).hexdigest()}"
    return f"etag:{place.etag(record.name)}"


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


def break_off(output: Output, shard: Shard, readable: int) -> None:
    (job,) = output.jobs(shard)
    with Failing(HubOptions()) as reader:
        reader.left = readable
        with pytest.raises(CheckpointError):
            output.do(job, reader, lambda sent, copied: None)


# --- the files


@pytest.mark.soak_on("moto")  # in short: test_s3.py, test_bytes_are_those_of_a_folder
def test_bytes_and_records(plan: MergePlan, place: Place, tmp_path: Path) -> None:
    """The same bytes everywhere, and no journal is left."""
    records, written = finish(plan, started(place, plan))
    check_is_alone(place, plan, tmp_path)
    assert written == sum(shard.nbytes for shard in plan.shards)
    files = place.files()
    for record in records:
        assert (record.size, record.checksum) == (len(files[record.name]), checksum(place, record))


def test_a_shard_is_not_visible_before_it_is_complete(plan: MergePlan, place: Place) -> None:
    output, shard = started(place, plan), plan.shards[0]
    seen: list[list[str]] = []
    with SourceReader(HubOptions()) as reader:
        jobs = output.jobs(shard)
        results = [output.do(job, reader, lambda sent, copied: seen.append(place.visible())) for job in jobs]
    record = output.complete(shard, results)
    assert seen and not any(seen)
    assert place.visible() == [shard.file_name] and record.size == len(place.files()[shard.file_name]) == shard.nbytes
    output.release()


@pytest.mark.soak_on("moto-0")
@pytest.mark.soak_on("moto-60000")
@pytest.mark.parametrize("readable", [0, 30_000, 60_000])
def test_a_source_that_breaks_off_leaves_nothing(plan: MergePlan, place: Place, tmp_path: Path, readable: int) -> None:
    output, shard = started(place, plan), large_shard(plan)
    break_off(output, shard, readable)
    assert place.visible() == []
    finish(plan, output)
    content = place.files()[shard.file_name]
    assert content[: len(shard.header)] == shard.header and len(content) == shard.nbytes
    check_is_alone(place, plan, tmp_path)


def test_index_last_and_then_the_record(plan: MergePlan, place: Place) -> None:
    output = started(place, plan)
    records = [output.complete(shard, do_shard(output, plan, shard)) for shard in plan.shards]
    records.append(output.write_small("config.json", b"{}"))
    assert INDEX_NAME not in place.visible()
    records.append(output.write_index(json.dumps(plan.index).encode()))
    assert INDEX_NAME in place.visible() and RECORD_NAME not in place.visible()
    assert opened(place).digest() == plan.digest and opened(place).finished_merge() is None
    output.end(record_of(plan, records))
    assert RECORD_NAME in place.visible()
    finished = opened(place).finished_merge()
    assert finished is not None and finished.digest == plan.digest and finished.files == tuple(records)
    assert opened(place).digest() is None
    output.release()


@pytest.mark.soak_on("moto-before the index")
@pytest.mark.parametrize("is_late", [False, True], ids=["before the index", "before the record"])
def test_a_shard_that_is_gone_ends_the_merge(plan: MergePlan, place: Place, is_late: bool) -> None:
    output, index, gone = started(place, plan), json.dumps(plan.index).encode(), plan.shards[1].file_name
    records = [output.complete(shard, do_shard(output, plan, shard)) for shard in plan.shards]
    if is_late:
        records.append(output.write_index(index))
    place.remove(gone)
    with pytest.raises(MergeFailed, match=f"{gone}: this file was replaced or removed"):
        output.end(record_of(plan, records)) if is_late else output.write_index(index)
    assert RECORD_NAME not in place.visible() and (INDEX_NAME in place.visible()) == is_late
    output.release()


def test_a_small_file_is_replaced_as_a_whole(plan: MergePlan, place: Place) -> None:
    """Also one in a folder, and one that an earlier run wrote."""
    first = started(place, plan)
    first.write_small("chat_templates/a.jinja", b"{{ older and longer }}")
    killed_driver(first)
    second = started(place, plan)
    for content in (b"{{ a }}", b"{{ b }}"):
        record = second.write_small("chat_templates/a.jinja", content)
        assert place.files()["chat_templates/a.jinja"] == content
        assert (record.name, record.size, record.checksum) == (
            "chat_templates/a.jinja",
            len(content),
            checksum(place, record),
        )
    assert place.visible() == ["chat_templates/a.jinja"]
    second.release()


# --- going on


def test_the_digest_is_found_again(plan: MergePlan, place: Place) -> None:
    assert opened(place).digest() is None and problems(place, plan.digest) == []
    output = opened(place)
    output.lock()
    output.begin(plan.digest, {"/same": "1", "/changed": "1"}, fresh=False)
    output.release()
    again = opened(place)
    assert again.digest() == plan.digest and not again.is_reachable()
    assert again.changed_sources({"/same": "1", "/changed": "2", "/new": "1"}) == ["/changed"]
    assert problems(place, plan.digest) == []
    assert problems(place, None) == [], "the plan's own problems are enough"


@pytest.mark.soak_on("moto")  # in short: test_s3.py, test_finished_shards_are_kept_unless_they_were_replaced
def test_finished_shards_are_kept_unless_they_changed(plan: MergePlan, place: Place, tmp_path: Path) -> None:
    """By their content, also where size and name are right."""
    dead = started(place, plan)
    one, two, *_ = plan.shards
    for shard in (one, two):
        write_shard(plan, dead, shard, [])
    killed_driver(dead)
    content = place.files()[two.file_name]
    place.put(two.file_name, content[:-1] + bytes([content[-1] ^ 1]))
    output = started(place, plan)
    if not isinstance(output, LocalOutput):  # there an actor finds it out
        assert output.jobs(one) == () and len(output.jobs(two)) == 1
    records, written = finish(plan, output)
    assert written == sum(shard.nbytes for shard in plan.shards) - one.nbytes
    assert place.files()[two.file_name] == content
    assert [record.checksum for record in records] == [checksum(place, record) for record in records]
    check_is_alone(place, plan, tmp_path)


def test_an_index_of_this_merge_is_no_obstacle(plan: MergePlan, place: Place, tmp_path: Path) -> None:
    """Death between the index and the record."""
    dead = started(place, plan)
    content = json.dumps(plan.index).encode()
    first = dead.write_index(content)
    killed_driver(dead)
    output = started(place, plan)
    assert output.write_index(content) == first
    finish(plan, output)
    check_is_alone(place, plan, tmp_path)


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_an_index_of_another_program_is_not_replaced(plan: MergePlan, place: Place) -> None:
    """In a folder it is: there nothing of an older run can take its place."""
    output, theirs = started(place, plan), b'{"weight_map": {"theirs": "model.safetensors"}}'
    place.put(INDEX_NAME, theirs)
    with pytest.raises(MergeFailed, match=r"this file belongs to another model.*--overwrite"):
        finish(plan, output)
    assert place.files()[INDEX_NAME] == theirs and RECORD_NAME not in place.files()
    output.release()


# --- whose output it is


def test_another_plan_is_refused(plan: MergePlan, place: Place) -> None:
    first = started(place, plan)
    write_shard(plan, first, plan.shards[0], [])
    first.release()
    (what,) = problems(place, "another plan")
    assert what.startswith("an unfinished merge of another plan")
    assert problems(place, "another plan", overwrite=True) == []
    output = started(place, plan)
    finish(plan, output)
    (what,) = problems(place, "another plan")
    assert what.endswith("holds a finished merge")
    assert problems(place, plan.digest) == [], "it is complete"


def test_files_of_others_are_refused(place: Place) -> None:
    place.put("notes.txt", b"mine")
    (what,) = problems(place, "plan")
    assert what.endswith("is not empty") and problems(place, "plan", overwrite=True) == []
    place.put(RECORD_NAME, b"")
    (what,) = problems(place, "plan")
    assert what.endswith("holds a finished merge")


def test_a_newer_run_has_the_output(plan: MergePlan, place: Place, tmp_path: Path) -> None:
    """Whatever the older one would make visible next fails; it takes nothing away from the newer one."""
    first = started(place, plan)
    write_shard(plan, first, plan.shards[0], [])
    killed_driver(first)
    second = started(place, plan)
    assert not first.is_reachable() and second.is_reachable()
    steps: list[Callable[[], object]] = [
        lambda: first.write_small("config.json", b"{}"),
        lambda: first.write_index(b"{}"),
        lambda: first.end(b"{}"),
        first.invalidate,
        lambda: write_shard(plan, first, plan.shards[1], []),
    ]
    for step in steps:
        with pytest.raises(MergeFailed, match="another run has taken over"):
            step()
    first.release()
    assert second.is_reachable() and place.visible() == [plan.shards[0].file_name]
    finish(plan, second)
    check_is_alone(place, plan, tmp_path)


def test_overwriting_removes_a_checkpoint_and_nothing_else(plan: MergePlan, place: Place) -> None:
    """Weights and what readers take for a part of a model, and what the record names."""
    finish(plan, started(place, plan))
    foreign = ["notes.txt", "model-notes.md", "models.json", "modeling_moe.py", "runs/model-00001-of-00001.safetensors"]
    model = ["pytorch_model-1.bin", "model-x.safetensors", "tokenizer.json", "chat_templates/b.jinja"]
    recorded = ["named/a.txt", "config.json"]
    for name in (*foreign, *model, *recorded):
        place.put(name, b"old")
    place.put(RECORD_NAME, json.dumps({"files": {name: {} for name in (*recorded, "gone.json", "../x.txt")}}).encode())
    output = opened(place)
    output.lock()
    output.begin("another plan", {}, fresh=True)
    assert place.visible() == sorted(foreign)
    journal = {name for name in place.files() if name.startswith(".raymoe/")}
    assert journal - {".raymoe/lock"} == {".raymoe/plan.json"}
    output.release()


@pytest.mark.soak_on("moto")
def test_overwriting_keeps_a_config_that_the_record_does_not_name(
    plan: MergePlan, place: Place, tmp_path: Path
) -> None:
    """It may be the user's own; the merge runs to its end beside such files."""
    finish(plan, started(place, plan))
    place.put(RECORD_NAME, json.dumps({"files": {}}).encode())
    for name in ("config.json", "notes.txt"):
        place.put(name, b"theirs")
    output = opened(place)
    output.lock()
    output.begin(plan.digest, {}, fresh=True)
    assert place.visible() == ["config.json", "notes.txt"]
    finish(plan, output)
    assert place.files()["notes.txt"] == b"theirs" and RECORD_NAME in place.visible()


def test_release_leaves_nothing_open(plan: MergePlan, place: Place, tmp_path: Path) -> None:
    output = started(place, plan)
    break_off(output, large_shard(plan), 30_000)
    output.release()
    output.release()  # again: no harm
    assert place.visible() == [] and place.open_uploads() == []
    assert {name for name in place.files() if not name.endswith("/lock")} == {".raymoe/plan.json"}
    finish(plan, started(place, plan))  # and so the lock was given back
    check_is_alone(place, plan, tmp_path)


def test_a_merge_that_is_spoilt_begins_again(plan: MergePlan, place: Place) -> None:
    output = started(place, plan)
    write_shard(plan, output, plan.shards[0], [])
    output.invalidate()
    output.release()
    output = started(place, plan)
    assert place.visible() == []
    output.release()
