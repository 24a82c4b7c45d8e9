"""How many requests a shard costs on S3, by kind: in a new merge, in one that is resumed, and after an actor was lost.

Requests are counted on the wire. The server is moto: like S3, it lists all uploads below a folder.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymoe.planning import MergePlan
from raymoe.planning.multipart import upload_parts
from raymoe.planning.owner import Owner
from raymoe.storage.file_names import RECORD_NAME
from raymoe.storage.output_files import StoreFiles
from raymoe.storage.outputs.protocol import ShardJob
from tests.object_store.fault_proxy import FaultProxy
from tests.object_store.fixtures import bucket, server
from tests.storage.outputs.test_s3 import (
    OPTIONS,
    SHAPE,
    Place,
    do_all,
    expert_shards,
    finish,
    local_files,
    out,
    part_jobs,
    place,
    plan,
    plan_of,
    proxy,
    sources,
    started,
    uploaded,
    write_shard,
)

__all__ = ["bucket", "out", "place", "plan", "proxy", "server", "sources", "uploaded"]

pytestmark = pytest.mark.parametrize("server", ["moto"], indirect=True)


def counted(proxy: FaultProxy) -> Counter[str]:
    """The requests since the last count."""
    return Counter({kind: count for kind, count in proxy.reset_stats().requests.items() if count})


def slim(jobs: Sequence[ShardJob]) -> list[ShardJob]:
    """Jobs as actors get them."""
    return [pickle.loads(pickle.dumps(job.slim(scans_copies=False))) for job in jobs]


def check_bytes(plan: MergePlan, place: Place, folder: Path) -> None:
    expected = local_files(plan, folder)
    assert {name for name, content in place.files().items() if content != expected.get(name)} <= {RECORD_NAME}
    assert place.all_uploads(plan) == set()


def test_a_new_shard(plan: MergePlan, place: Place, proxy: FaultProxy, out: str, tmp_path: Path) -> None:
    copied, computed = expert_shards(plan)
    target = started(plan, out)
    write_shard(plan, target, computed)  # the first shard shows what kind of server it is
    counted(proxy)
    jobs = slim(target.jobs(copied))
    assert counted(proxy) == {"CreateMultipartUpload": 1, "PutObject": 1, "GetObject": 1}
    results = do_all(plan, target, jobs)
    done = counted(proxy)
    assert {kind: done[kind] for kind in done if kind != "GetObject"} == {
        "UploadPart": 1,
        "UploadPartCopy": 2,
    }
    target.complete(copied, results)
    assert counted(proxy) == {"GetObject": 1, "CompleteMultipartUpload": 1, "PutObject": 1}
    finish(plan, target)
    check_bytes(plan, place, tmp_path / "out")


def test_the_end_does_not_look_at_each_file(plan: MergePlan, proxy: FaultProxy, out: str) -> None:
    target = started(plan, out)
    for shard in plan.shards:
        write_shard(plan, target, shard)
    counted(proxy)
    target.write_index(b"{}")
    target.end(b"{}")
    end = counted(proxy)
    assert end["DeleteObjects"] == 1 and end["DeleteObject"] == 1, "plan.json goes by itself"
    assert end["AbortMultipartUpload"] == 0
    # Index and record: each is put only if it is not there, and the index is looked at.
    assert end["HeadObject"] <= 4 and end["PutObject"] == 2


def test_a_resumed_merge(
    plan: MergePlan, place: Place, proxy: FaultProxy, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request for a shard that is finished, and its note is not read; a begun one costs a list of its parts. Nothing
    is noted of parts."""
    copied, computed = expert_shards(plan)
    dead = started(plan, out)
    write_shard(plan, dead, computed)
    do_all(plan, dead, part_jobs(dead.jobs(copied))[1:])
    assert not [name for name in place.names() if "/sent/" in name]
    read = list[str]()
    see = StoreFiles.read

    def seen(files: StoreFiles, name: str) -> bytes | None:
        read.extend(name.split("/")[1:2] if name.count("/") > 1 else ())
        return see(files, name)

    monkeypatch.setattr(StoreFiles, "read", seen)
    counted(proxy)
    target = started(plan, out)
    begun = counted(proxy)
    assert begun["ListMultipartUploads"] == 1 and begun["AbortMultipartUpload"] == 0
    assert begun["ListObjectsV2"] == 2, "the journal, and the finished shards"
    assert read == ["known"], "of all notes, the one of what was open before"
    assert list(target.jobs(computed)) == []
    target.complete(computed, ())
    assert counted(proxy) == {}
    (job,) = target.jobs(copied)
    assert counted(proxy) == {"ListParts": 1}
    assert [part.number for part in job.parts] == [1]
    finish(plan, target)
    rest = counted(proxy)
    assert rest["UploadPartCopy"] == 0 and rest["AbortMultipartUpload"] == 0
    check_bytes(plan, place, tmp_path / "out")


def test_checks_about_one_moment_ask_once(plan: MergePlan, proxy: FaultProxy, out: str) -> None:
    target = started(plan, out)

    def check() -> None:
        assert target.problems(digest=plan.digest, output_bytes=0, overwrite=False) == []

    counted(proxy)
    with target.one_look():
        check()
        assert counted(proxy)["GetObject"] == 2, "plan.json and raymoe.json"
        check()
        assert counted(proxy) == {}
    check()
    assert counted(proxy)["GetObject"] > 2, "later checks are about another moment"


def test_a_job_of_a_lost_actor(plan: MergePlan, place: Place, proxy: FaultProxy, out: str, tmp_path: Path) -> None:
    """Only what is missing is done again."""
    copied, _ = expert_shards(plan)
    target = started(plan, out)
    (job,) = target.jobs(copied)
    do_all(plan, target, part_jobs([job])[:2])  # and then the actor is lost
    counted(proxy)
    again = slim([dataclasses.replace(job, resumes=True)])
    results = do_all(plan, target, again)
    assert counted(proxy) == {"ListParts": 1, "UploadPartCopy": 1}
    target.complete(copied, results)
    finish(plan, target)
    check_bytes(plan, place, tmp_path / "out")


def test_a_job_of_a_lost_actor_that_read_local_files(
    zoo: Callable[..., Path], place: Place, proxy: FaultProxy, out: str, tmp_path: Path
) -> None:
    """Parts that it has noted are kept. Any other may be of another state of the file."""
    plan = plan_of(*(str(zoo("llama", seed=seed, **SHAPE)) for seed in (1, 2)))
    shard = next(shard for shard in plan.shards if shard.owner == Owner.expert(0))
    target = started(plan, out)
    (job,) = target.jobs(shard)
    noted, unnoted = job.parts[:2]
    do_all(plan, target, [dataclasses.replace(job, parts=(noted,))])
    place.client.upload_part(
        Bucket=place.bucket,
        Key=place.key(shard.file_name),
        UploadId=job.upload_id,
        PartNumber=unnoted.number,
        Body=bytes(unnoted.nbytes),
    )
    counted(proxy)
    results = do_all(plan, target, slim([dataclasses.replace(job, resumes=True)]))
    assert counted(proxy)["UploadPart"] == len(job.parts) - 1
    target.complete(shard, results)
    finish(plan, target)
    check_bytes(plan, place, tmp_path / "out")


def test_a_checksum_is_read_back_once(plan: MergePlan, proxy: FaultProxy, out: str) -> None:
    """By a job of its own; a resumed run sees by the ETag that the bytes are the same."""
    options, (shard, _) = dataclasses.replace(OPTIONS, checksum="sha256"), expert_shards(plan)
    dead = started(plan, out, options)
    read_back = dead.complete(shard, do_all(plan, dead, dead.jobs(shard)))
    assert isinstance(read_back, ShardJob)
    (job,) = slim([read_back])
    record = dead.complete(shard, do_all(plan, dead, [job]))
    target = started(plan, out, options)
    counted(proxy)
    assert list(target.jobs(shard)) == [] and target.complete(shard, ()) == record
    assert counted(proxy) == {}


def test_an_upload_that_a_dead_run_did_not_note(plan: MergePlan, place: Place, out: str) -> None:
    """It is found by the run's note of what was open before. What was open then stays."""
    one, two = expert_shards(plan)
    theirs = place.open_upload(two.file_name)
    dead = started(plan, out)
    noted = dead.jobs(one)[0].upload_id
    lost = place.open_upload(two.file_name)
    other = place.open_upload("other.safetensors")
    target = started(plan, out)
    assert place.uploads(two.file_name) == {theirs} and lost != theirs
    assert place.uploads(one.file_name) == {noted} and place.uploads("other.safetensors") == {other}
    finish(plan, target)
    assert place.all_uploads(plan) == {theirs}


def test_uploads_are_kept_for_the_next_run(plan: MergePlan, place: Place, out: str) -> None:
    shard, _ = expert_shards(plan)
    stopped = started(plan, out)
    do_all(plan, stopped, part_jobs(stopped.jobs(shard))[:2])
    uploads = place.all_uploads(plan)
    stopped.release(keep_uploads=True)
    assert place.all_uploads(plan) == uploads != set()
    target = started(plan, out)
    assert [part.number for job in target.jobs(shard) for part in job.parts] == [3]
    target.release()
    assert place.all_uploads(plan) == set()


def test_shards_are_begun_and_completed_at_once(plan: MergePlan, place: Place, out: str, tmp_path: Path) -> None:
    target = started(plan, out)
    with ThreadPoolExecutor(len(plan.shards)) as pool:
        records = list(pool.map(lambda shard: write_shard(plan, target, shard), plan.shards))
    assert [record.name for record in records] == [shard.file_name for shard in plan.shards]
    finish(plan, target)
    check_bytes(plan, place, tmp_path / "out")


def test_a_job_carries_what_it_needs(plan: MergePlan, out: str) -> None:
    """The parts of the shard that it sends, and the header if it sends that."""
    copied, computed = expert_shards(plan)
    target = started(plan, out)
    first, *others = (job.slim(scans_copies=False) for job in part_jobs(target.jobs(copied)))
    assert first.shard.header == copied.header and first.shard.parts
    assert all(not job.shard.header and not job.shard.parts for job in others), "the store copies those"
    assert all(job.slim(scans_copies=True).shard.parts for job in part_jobs(target.jobs(copied)))
    sent = upload_parts(computed, target.same_store)
    for job, part in zip(part_jobs(target.jobs(computed)), sent, strict=True):
        assert job.slim(scans_copies=False).shard.parts == tuple(p for p in computed.parts if part.overlaps(p))
    target.release()
