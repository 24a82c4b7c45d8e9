"""S3 as output, on both servers: the same bytes as in a folder, by any number of workers, after any interruption."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.errors import MergeFailed, ProblemReport
from raymoe.object_store.errors import StorageError
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import ObjectInfo
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.multipart import server_side_bytes, upload_parts
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Copy, Shard
from raymoe.routers.router_matrices import router_bytes
from raymoe.runtime.expert_actor import ExpertWorker
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.hub import HubOptions
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME, FileRecord
from raymoe.storage.object_journal import ObjectJournal
from raymoe.storage.outputs import base
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.protocol import Output, ShardJob
from raymoe.storage.outputs.s3 import S3Output
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transfer_summary import bytes_by_method
from tests.object_store.fault_proxy import FaultProxy, FaultRates
from tests.object_store.fixtures import bucket, server
from tests.object_store.servers import Server, environment, running_server

__all__ = ["bucket", "server"]

OPTIONS = StorageOptions(deadline_s=60)
# Runs of 6.3 MB: long enough to be copied, so that a shard has parts of both kinds.
SHAPE = {"hidden_size": 256, "intermediate_size": 4096, "dtype": "bfloat16"}
MERGE = MergeOptions(model_card=False)


@pytest.fixture(scope="module")
def uploaded(zoo: Callable[..., Path]) -> Callable[[Server], list[str]]:
    """uploaded(server): the URLs of two models, put there once."""

    @functools.cache
    def models(kind: str) -> list[str]:
        client, name = running_server(kind).client(), f"models-{uuid.uuid4().hex[:8]}"
        client.create_bucket(Bucket=name)
        urls = []
        for seed in (1, 2):
            for path in zoo("llama", seed=seed, **SHAPE).iterdir():
                client.put_object(Bucket=name, Key=f"m{seed}/{path.name}", Body=path.read_bytes())
            urls.append(f"s3://{name}/m{seed}")
        return urls

    return lambda server: models(server.kind)


@pytest.fixture
def sources(server: Server, uploaded: Callable[[Server], list[str]]) -> list[str]:
    return uploaded(server)


@pytest.fixture
def plan(sources: list[str]) -> MergePlan:
    return plan_of(*sources)


def plan_of(one: str, two: str, **keys: Any) -> MergePlan:
    """Expert 0 is copied as it is, expert 1 is computed."""
    experts = [{"source_model": one}, {"source_model": two, "noise_scale": 0.01}]
    return raymoe.plan({"base_model": one, "gate_mode": "random", "experts": experts, **keys}, MERGE)


@pytest.fixture
def out(bucket: str) -> str:
    return f"{bucket}/merged/model"


# --- a coordinator and its workers, without Ray


def ignore(sent: int, copied: int) -> None:
    pass


def do_all(plan: MergePlan, target: Output, jobs: Sequence[ShardJob]) -> list[Any]:
    router = router_bytes(plan.gates, {})
    with SourceReader(HubOptions(), OPTIONS) as reader:
        return [target.do(job, reader, ignore, router) for job in jobs]


def write_shard(plan: MergePlan, target: Output, shard: Shard) -> FileRecord:
    return base.write_shard(target, shard, lambda job: do_all(plan, target, [job])[0])


def finish(plan: MergePlan, target: Output) -> list[FileRecord]:
    """What is left to do of a merge that has begun."""
    records = [write_shard(plan, target, shard) for shard in plan.shards]
    records.append(target.write_small("config.json", json.dumps(plan.config).encode()))
    records.append(target.write_index(json.dumps(plan.index).encode()))
    target.end(json.dumps({"files": {record.name: record.checksum for record in records}}).encode())
    return records


def started(plan: MergePlan, out: str, options: StorageOptions = OPTIONS) -> S3Output:
    target = S3Output(out, options)
    assert target.problems(digest=plan.digest, output_bytes=0, overwrite=False) == []
    target.begin(plan.digest, {}, fresh=False)
    return target


def merge(plan: MergePlan, out: str) -> list[FileRecord]:
    return finish(plan, started(plan, out))


_references: dict[str, dict[str, bytes]] = {}


def local_files(plan: MergePlan, folder: Path) -> dict[str, bytes]:
    """The same merge into a folder; made once a plan."""
    if plan.digest not in _references:
        target = LocalOutput(folder)
        target.lock()
        target.begin(plan.digest, {}, fresh=False)
        finish(plan, target)
        target.release()
        _references[plan.digest] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return _references[plan.digest]


# --- the other party: a plain client


class Place:
    """A prefix as anybody sees it."""

    def __init__(self, server: Server, url: str) -> None:
        self.client = server.client()
        self.bucket, self.prefix = url.removeprefix("s3://").split("/", 1)

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/").get("Contents", [])
        return sorted(item["Key"].removeprefix(f"{self.prefix}/") for item in found)

    def visible(self) -> list[str]:
        return [name for name in self.names() if not name.startswith(".raymoe/")]

    def files(self) -> dict[str, bytes]:
        return {name: self.read(name) for name in self.names()}

    def read(self, name: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=self.bucket, Key=self.key(name))["Body"].read()
        return content

    def etag(self, name: str) -> str:
        return str(self.client.head_object(Bucket=self.bucket, Key=self.key(name))["ETag"]).strip('"')

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.key(name), Body=content)

    def open_upload(self, name: str) -> str:
        return str(self.client.create_multipart_upload(Bucket=self.bucket, Key=self.key(name))["UploadId"])

    def uploads(self, name: str) -> set[str]:
        """Ids of the open uploads of one object (the gateway lists those of exactly one key)."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.key(name)).get("Uploads", [])
        return {item["UploadId"] for item in found if item["Key"] == self.key(name)}

    def all_uploads(self, plan: MergePlan) -> set[str]:
        return {upload for shard in plan.shards for upload in self.uploads(shard.file_name)}


@pytest.fixture
def place(server: Server, out: str) -> Place:
    return Place(server, out)


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What is sent from now on is counted."""
    with FaultProxy(server.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.mark.s3
@pytest.mark.soak  # in short: test_most_bytes_stay_in_the_store
def test_smollm2_on_the_wire() -> None:
    """Four full checkpoints of the shape of SmolLM2-135M, S3 to S3: a tenth of the output passes the workers.

    Each of those bytes is read once and sent once. Random gates read nothing; gates from token embeddings read at most
    the rows of the prompts' tokens, other modes the whole layers.
    """
    from tests.planning.test_multipart import SMOLLM2, tensor_shapes

    server, bucket = running_server("juicefs"), f"wire-{uuid.uuid4().hex[:8]}"
    client = server.client()
    client.create_bucket(Bucket=bucket)
    with FaultProxy(server.endpoint) as proxy, environment(server.environment | {"AWS_ENDPOINT_URL": proxy.url}):
        bodies = []
        for number in range(4):
            bodies.append(checkpoint(tensor_shapes(SMOLLM2), seed=number))
            client.put_object(Bucket=bucket, Key=f"m{number}/model.safetensors", Body=bodies[-1])
            client.put_object(Bucket=bucket, Key=f"m{number}/config.json", Body=json.dumps(SMOLLM2).encode())
        models = [f"s3://{bucket}/m{number}" for number in range(4)]
        experts = [{"source_model": model} for model in models]
        config = {"base_model": models[0], "gate_mode": "random", "architecture": "mixtral", "experts": experts}
        plan = raymoe.plan(config, MERGE)
        planning = proxy.reset_stats().total_body_bytes
        assert planning < 0.01 * sum(map(len, bodies))
        merge(plan, f"s3://{bucket}/out")
        stats, total = proxy.stats(), plan.totals.output_bytes
        sent = stats.request_body_bytes["UploadPart"] + stats.request_body_bytes["PutObject"]
        read = stats.response_body_bytes["GetObject"]
        print(f"sent {sent / total:.4f}, read {read / total:.4f} of {total:,} bytes")
        assert 0 < sent <= 0.10 * total
        assert 0 < read <= sent
        for shard in plan.shards:
            body = client.get_object(Bucket=bucket, Key=f"out/{shard.file_name}")["Body"].read()
            assert body[: len(shard.header)] == shard.header and len(body) == shard.nbytes
            for part in shard.parts:
                if isinstance(part.what, Copy):
                    source = part.what.source
                    number = int(source.file.location.split("/")[-2].removeprefix("m"))
                    assert body[part.start : part.end] == bodies[number][source.start : source.end], part.name


def checkpoint(shapes: Mapping[str, Sequence[int]], seed: int) -> bytes:
    """A safetensors file of random bytes."""
    header, end = {}, 0
    for name, dims in shapes.items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + np.random.default_rng(seed).bytes(end)


def expert_shards(plan: MergePlan) -> tuple[Shard, Shard]:
    """That of copies and that of computed tensors."""
    copied, computed = (next(s for s in plan.shards if s.owner == Owner.expert(n)) for n in (0, 1))
    parts = upload_parts(copied, lambda file: True)
    assert [part.copy is None for part in parts] == [True, False, False]
    assert [part.copy is None for part in upload_parts(computed, lambda file: True)] == [True, True]
    return copied, computed


def part_jobs(jobs: Sequence[ShardJob]) -> list[ShardJob]:
    """The jobs cut into jobs of a part each: what a shard of many gigabytes is given out as."""
    return [dataclasses.replace(job, parts=(part,)) for job in jobs for part in job.parts]


# --- the bytes


def test_bytes_are_those_of_a_folder(plan: MergePlan, place: Place, out: str, tmp_path: Path) -> None:
    expert_shards(plan)
    records = merge(plan, out)
    found, expected = place.files(), local_files(plan, tmp_path / "out")
    assert found.keys() == expected.keys(), "and no journal is left"
    assert {name: content for name, content in found.items() if content != expected[name]}.keys() <= {RECORD_NAME}
    assert {record.name: (record.size, record.checksum) for record in records} == {
        name: (len(content), f"etag:{place.etag(name)}") for name, content in found.items() if name != RECORD_NAME
    }
    assert place.all_uploads(plan) == set()


def test_most_bytes_stay_in_the_store(plan: MergePlan, proxy: FaultProxy, out: str) -> None:
    """On the wire as in the plan: what is copied is neither read nor sent."""
    proxy.reset_stats()
    copied, computed = expert_shards(plan)
    parts = upload_parts(copied, lambda file: True)
    target = started(plan, out)
    write_shard(plan, target, copied)
    stats = proxy.stats()
    assert stats.requests["UploadPartCopy"] == 2
    assert stats.request_body_bytes["UploadPart"] == parts[0].nbytes
    data = parts[0].nbytes - len(copied.header)
    # The journal is read too.
    assert data <= stats.response_body_bytes["GetObject"] <= data + 10_000
    write_shard(plan, target, computed)
    assert proxy.stats().request_body_bytes["UploadPart"] == parts[0].nbytes + computed.nbytes
    target.release()


def test_several_workers_feed_one_shard(plan: MergePlan, place: Place, out: str, tmp_path: Path) -> None:
    """A part each, in threads with outputs of their own and one in another process, in any order."""
    coordinator = started(plan, out)
    for shard in expert_shards(plan):
        first, *others = reversed(part_jobs(coordinator.jobs(shard)))

        def work(job: ShardJob) -> Any:
            worker = S3Output(out, OPTIONS, coordinator.run)
            assert worker.is_reachable()
            return do_all(plan, worker, [job])[0]

        with ThreadPoolExecutor() as pool:
            theirs = pool.submit(in_another_process, out, coordinator.run, first, tmp_path)
            mine = list(pool.map(work, others))
        assert place.visible() == sorted(set(place.visible()) - {shard.file_name}), "nothing is seen before it is whole"
        coordinator.complete(shard, [theirs.result(), *mine])
    finish(plan, coordinator)
    expected = local_files(plan, tmp_path / "out")
    assert all(place.read(name) == content for name, content in expected.items() if name != RECORD_NAME)


WORKER = """
import pickle, sys
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.expert_actor import ExpertWorker
from raymoe.sources.hub import HubOptions
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.source_reader import SourceReader
out, run, path = sys.argv[1:]
with open(path, "rb") as file:
    job = pickle.load(file)
with SourceReader(HubOptions()) as reader:
    result = open_output(Location.parse(out), StorageOptions(), run).do(job, reader, lambda sent, copied: None)
with open(path, "wb") as file:
    pickle.dump(result, file)
"""


def in_another_process(out: str, run: str, job: ShardJob, folder: Path) -> Any:
    path = folder / f"{job.shard.file_name}.{job.parts[0].number}"
    path.write_bytes(pickle.dumps(job))
    subprocess.run([sys.executable, "-c", WORKER, out, run, str(path)], check=True, timeout=120)
    return pickle.loads(path.read_bytes())


# --- after an interruption


def test_parts_that_were_sent_are_not_sent_again(
    plan: MergePlan, place: Place, proxy: FaultProxy, out: str, tmp_path: Path
) -> None:
    copied, computed = expert_shards(plan)
    dead = started(plan, out)
    for shard in (copied, computed):
        do_all(plan, dead, part_jobs(dead.jobs(shard))[1:])  # all but the first, and then it dies
    uploads = place.all_uploads(plan)
    assert len(uploads) == 2
    proxy.reset_stats()
    target = started(plan, out)
    left = [target.jobs(shard) for shard in (copied, computed)]
    assert [[part.number for job in jobs for part in job.parts] for jobs in left] == [[1], [1]]
    assert place.all_uploads(plan) == uploads, "they are taken up"
    finish(plan, target)
    stats = proxy.stats()
    sent = sum(upload_parts(shard, lambda file: True)[0].nbytes for shard in (copied, computed))
    small = sum(shard.nbytes for shard in plan.shards if shard not in (copied, computed))
    assert stats.requests["UploadPartCopy"] == 0
    assert stats.request_body_bytes["UploadPart"] == sent + small
    expected = local_files(plan, tmp_path / "out")
    assert {n for n, content in place.files().items() if content != expected.get(n)} <= {RECORD_NAME}


def test_parts_of_local_files_are_known_again_by_their_etag(
    zoo: Callable[..., Path], place: Place, out: str, tmp_path: Path
) -> None:
    """A part of the right number and size that no actor of this merge has noted is sent again: nothing but the note
    tells which state of a local file it is made of."""
    plan = plan_of(*(str(zoo("llama", seed=seed, **SHAPE)) for seed in (1, 2)))
    computed = next(shard for shard in plan.shards if shard.owner == Owner.expert(1))
    dead = started(plan, out)
    jobs = part_jobs(dead.jobs(computed))
    do_all(plan, dead, jobs)
    first = jobs[0].parts[0]
    place.client.upload_part(
        Bucket=place.bucket,
        Key=place.key(computed.file_name),
        UploadId=jobs[0].upload_id,
        PartNumber=first.number,
        Body=bytes(first.nbytes),
    )
    target = started(plan, out)
    left = target.jobs(computed)
    assert [part.number for job in left for part in job.parts] == [first.number]
    finish(plan, target)
    expected = local_files(plan, tmp_path / "out")
    assert {n for n, content in place.files().items() if content != expected.get(n)} <= {RECORD_NAME}


def test_all_parts_were_sent(plan: MergePlan, place: Place, out: str) -> None:
    """Death just before completing: nothing is left for workers, and the shard is completed."""
    shard, _ = expert_shards(plan)
    dead = started(plan, out)
    do_all(plan, dead, dead.jobs(shard))
    target = started(plan, out)
    assert list(target.jobs(shard)) == []
    assert target.complete(shard, []).size == shard.nbytes
    assert place.visible() == [shard.file_name]


def test_death_before_the_upload_id_was_noted(plan: MergePlan, place: Place, out: str) -> None:
    """The upload that nobody knows is found and aborted. One that was open before is somebody else's, and stays."""
    shard = expert_shards(plan)[0]
    theirs = place.open_upload(shard.file_name)
    lost = begun_and_lost(plan, place, out, shard, known=[theirs])
    target = started(plan, out)
    jobs = target.jobs(shard)
    mine = jobs[0].upload_id
    assert place.uploads(shard.file_name) == {theirs, mine}
    assert lost not in place.uploads(shard.file_name)
    target.complete(shard, do_all(plan, target, jobs))
    assert place.uploads(shard.file_name) == {theirs}


def begun_and_lost(plan: MergePlan, place: Place, out: str, shard: Shard, known: Sequence[str]) -> str:
    """What a run leaves that dies while its upload begins: the intention, and an open upload."""
    dead = started(plan, out)
    ObjectJournal(dead.files, dead.run).announce_upload(shard.file_name, known=known)
    return place.open_upload(shard.file_name)


def test_overwriting_aborts_what_the_journal_knows(plan: MergePlan, place: Place, out: str) -> None:
    """Uploads with their id, and those that a run began and did not live to note; not those of others."""
    one, two = expert_shards(plan)
    theirs = place.open_upload(one.file_name)
    begun_and_lost(plan, place, out, one, known=[theirs])
    dead = S3Output(out, OPTIONS)
    dead.begin(plan.digest, {}, fresh=False)
    dead.jobs(two)
    assert len(place.all_uploads(plan)) == 3
    S3Output(out, OPTIONS).begin("another plan", {}, fresh=True)
    assert place.all_uploads(plan) == {theirs}
    assert place.names() == [".raymoe/plan.json"]


def test_a_lost_reply_leaves_no_upload(plan: MergePlan, place: Place, proxy: FaultProxy, out: str) -> None:
    """The store began an upload, the client never heard of it and began another: that one is not forgotten."""
    shard = expert_shards(plan)[0]
    theirs = place.open_upload(shard.file_name)
    target = started(plan, out)
    proxy.max_consecutive = 1
    proxy.rates = FaultRates(lost_reply=1.0)
    jobs = target.jobs(shard)
    proxy.rates = FaultRates()
    assert proxy.stats().faults_by_operation["CreateMultipartUpload"]["lost_reply"] >= 1
    assert place.uploads(shard.file_name) == {theirs, jobs[0].upload_id}
    target.release()
    assert place.uploads(shard.file_name) == {theirs}


def test_an_upload_that_somebody_aborted_is_begun_again(plan: MergePlan, place: Place, out: str) -> None:
    """A bucket's rule for abandoned uploads, for one."""
    shard = expert_shards(plan)[0]
    dead = started(plan, out)
    (job,) = dead.jobs(shard)
    do_all(plan, dead, part_jobs([job])[:1])
    place.client.abort_multipart_upload(Bucket=place.bucket, Key=place.key(shard.file_name), UploadId=job.upload_id)
    target = started(plan, out)
    jobs = target.jobs(shard)
    assert len(part_jobs(jobs)) == 3 and jobs[0].upload_id != job.upload_id
    target.complete(shard, do_all(plan, target, jobs))
    assert place.visible() == [shard.file_name] and place.all_uploads(plan) == set()


@pytest.mark.parametrize("checksum", [None, pytest.param("sha256", marks=pytest.mark.soak)])
def test_finished_shards_are_kept_unless_they_were_replaced(
    plan: MergePlan, place: Place, proxy: FaultProxy, out: str, checksum: str | None
) -> None:
    options = dataclasses.replace(OPTIONS, checksum=checksum)
    one, two = expert_shards(plan)
    dead = started(plan, out, options)
    records = [write_shard(plan, dead, shard) for shard in (one, two)]
    content = place.read(two.file_name)
    place.put(two.file_name, bytes([content[0]]) + content[1:-1] + bytes([content[-1] ^ 1]))
    proxy.reset_stats()
    target = started(plan, out, options)
    assert list(target.jobs(one)) == []
    assert target.complete(one, ()) == records[0]
    assert proxy.stats().request_body_bytes["UploadPart"] == proxy.stats().requests["UploadPartCopy"] == 0
    assert write_shard(plan, target, two).size == two.nbytes
    assert proxy.stats().request_body_bytes["UploadPart"] == two.nbytes
    assert place.read(two.file_name) == content


def test_sha256_is_that_of_the_bytes(plan: MergePlan, place: Place, out: str) -> None:
    """Of copied parts too, which no worker has seen: the object is read back."""
    target = started(plan, out, dataclasses.replace(OPTIONS, checksum="sha256"))
    for record in finish(plan, target):
        content = place.read(record.name)
        assert record == FileRecord(
            name=record.name, size=len(content), checksum=f"sha256:{hashlib.sha256(content).hexdigest()}"
        )


def test_release_aborts_own_uploads_only(plan: MergePlan, place: Place, out: str) -> None:
    one, two = expert_shards(plan)
    theirs = {place.open_upload(one.file_name), place.open_upload("other.safetensors")}
    target = started(plan, out)
    for shard in (one, two):
        do_all(plan, target, part_jobs(target.jobs(shard))[:1])
    target.release()
    assert place.all_uploads(plan) | place.uploads("other.safetensors") == theirs
    assert place.visible() == []
    target.release()  # again: no harm
    finish(plan, started(plan, out))
    assert place.uploads(one.file_name) <= theirs


def test_release_with_a_store_that_is_gone(
    plan: MergePlan, place: Place, out: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended the merge is what the user is to hear of; the next run finds the uploads in the journal."""
    shard = expert_shards(plan)[0]
    with FaultProxy(server.endpoint) as proxy, monkeypatch.context() as here:
        here.setenv("AWS_ENDPOINT_URL", proxy.url)
        target = started(plan, out, dataclasses.replace(OPTIONS, deadline_s=600))
        target.jobs(shard)
        uploads = place.uploads(shard.file_name)
        proxy.stop()
        target.release()
    assert place.uploads(shard.file_name) == uploads
    (job,) = started(plan, out).jobs(shard)
    assert {job.upload_id} == uploads


# --- whose output it is


def test_index_only_if_absent(plan: MergePlan, place: Place, out: str) -> None:
    target = started(plan, out)
    theirs = b'{"weight_map": {"theirs": "model.safetensors"}}'
    place.put(INDEX_NAME, theirs)
    with pytest.raises(MergeFailed, match=r"model\.safetensors\.index\.json: this file belongs to another model"):
        finish(plan, target)
    assert place.read(INDEX_NAME) == theirs
    assert RECORD_NAME not in place.names()


def test_a_small_file_that_is_replaced_at_once(plan: MergePlan, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another run, between the answer to the put and the look after it; also by a file of the same size."""
    target = S3Output(out, OPTIONS)
    target.begin(plan.digest, {}, fresh=False)
    put = target._put_small

    def replaced(name: str, content: bytes) -> ObjectInfo:
        info = put(name, content)
        put(name, content.replace(b"own", b"not"))
        return info

    monkeypatch.setattr(target, "_put_small", replaced)
    with pytest.raises(StorageError, match="replaced as soon as it had been written"):
        target.write_small("config.json", b'"own"')


def test_a_second_run_takes_over(plan: MergePlan, place: Place, out: str, tmp_path: Path) -> None:
    """Whatever the first would make visible next fails; it takes nothing away from the second, which finishes."""
    one, two = expert_shards(plan)
    first = started(plan, out)
    done = do_all(plan, first, first.jobs(one))
    first.jobs(two)
    second = started(plan, out)
    assert not first.is_reachable() and second.is_reachable()
    steps: Mapping[str, Callable[[], object]] = {
        "complete": lambda: first.complete(one, done),
        "small file": lambda: first.write_small("config.json", b"{}"),
        "index": lambda: first.write_index(b"{}"),
        "record": lambda: first.end(b"{}"),
    }
    for step in steps.values():
        with pytest.raises(MergeFailed, match="another run has taken over"):
            step()
    first.release()
    assert place.visible() == []
    assert len(place.all_uploads(plan)) == 2, "they are the second run's now"
    finish(plan, second)
    expected = local_files(plan, tmp_path / "out")
    assert {n for n, content in place.files().items() if content != expected.get(n)} <= {RECORD_NAME}
    assert place.all_uploads(plan) == set()


@pytest.mark.parametrize("number", [0, 1])
def test_a_source_that_is_replaced(server: Server, sources: list[str], bucket: str, out: str, number: int) -> None:
    """By one of the same size: neither copied nor streamed bytes of it get into a checkpoint. Where a server ignores
    the condition of a copy, the index is not written."""
    client, copies = server.client(), Place(server, f"{bucket}/sources")
    for url in sources:
        model = Place(server, url)
        for name in model.names():
            source = {"Bucket": model.bucket, "Key": model.key(name)}
            client.copy_object(Bucket=copies.bucket, Key=copies.key(f"{url[-2:]}/{name}"), CopySource=source)
    plan = plan_of(f"{bucket}/sources/m1", f"{bucket}/sources/m2")
    shard = next(shard for shard in plan.shards if shard.owner == Owner.expert(number))
    target = started(plan, out)
    jobs = part_jobs(target.jobs(shard))
    name = f"m{number + 1}/model.safetensors"
    content = copies.read(name)
    copies.put(name, content[:-1] + bytes([content[-1] ^ 1]))
    steps: list[Callable[[], object]] = [lambda job=job: do_all(plan, target, [job]) for job in jobs]  # type: ignore[misc]
    if server.kind == "moto" and any(part.copy is not None for job in jobs for part in job.parts):
        steps = [step for step, job in zip(steps, jobs, strict=True) if job.parts[0].copy is None]
        do_all(plan, target, [job for job in jobs if job.parts[0].copy is not None])
        steps.append(lambda: target.write_index(b"{}"))
    for step in steps:
        with pytest.raises(ProblemReport, match=r"no longer what the merge was planned with|ETag") as failed:
            step()
        assert f"{bucket}/sources/{name}" in str(failed.value)
        assert "when the object no longer changes" in str(failed.value)
    target.release()
    assert Place(server, out).visible() == [] and Place(server, out).uploads(shard.file_name) == set()


def test_what_the_store_copies_is_looked_at_where_a_merge_is_strict(
    server: Server, sources: list[str], bucket: str, out: str
) -> None:
    """Its bytes pass no worker; a strict one reads them, and finds the NaN in the middle of them."""
    model, place = Place(server, sources[0]), Place(server, f"{bucket}/broken")
    for name in model.names():
        content = bytearray(model.read(name))
        if name == "model.safetensors":
            length = int.from_bytes(content[:8], "little")
            entry = json.loads(content[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]
            at = 8 + length + (entry["data_offsets"][0] + entry["data_offsets"][1]) // 4 * 2
            content[at : at + 2] = b"\xc0\x7f"  # NaN in bfloat16
        place.put(name, bytes(content))
    experts = [{"source_model": f"{bucket}/broken"}, {"source_model": sources[1]}]
    config = {"base_model": sources[1], "gate_mode": "random", "experts": experts}
    plan = raymoe.plan(config, dataclasses.replace(MERGE, strict=True))
    assert plan.digest != raymoe.plan(config, MERGE).digest
    target = started(plan, out)
    try:
        worker = ExpertWorker(Location.parse(out), RuntimeSettings(storage=OPTIONS, strict=True), target.run)
        of_expert = [shard for shard in plan.shards if shard.owner == Owner.expert(0)]
        jobs = [job for shard in of_expert for job in target.jobs(shard)]
        assert any(part.copy for job in jobs for part in job.parts)
        said = r"experts\.0\.w3\.weight: NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight of s3://"
        # In a thread, as in an actor: it makes itself less urgent.
        with ThreadPoolExecutor(1) as writer:
            with pytest.raises(MergeFailed, match=said):
                list(writer.map(worker.write_shard, jobs))
            of_other = next(shard for shard in plan.shards if shard.owner == Owner.expert(1))
            list(writer.map(worker.write_shard, target.jobs(of_other)))
    finally:
        target.release()


@pytest.mark.soak_on("moto-linear")
@pytest.mark.parametrize("backbone", ["linear", {"method": "ties", "density": 0.2, "include": ["attention"]}], ids=str)
def test_a_merged_backbone_is_computed_and_the_rest_is_copied(
    sources: list[str], place: Place, out: str, tmp_path: Path, backbone: Any
) -> None:
    """`plan` says which bytes are which, and the files are those of a merge into a folder."""
    one, two = sources
    experts = [{"source_model": one}, {"source_model": two}]
    config = {"base_model": one, "gate_mode": "random", "experts": experts}
    plan = raymoe.plan({**config, "backbone": backbone}, MERGE)
    target = S3Output(out, OPTIONS)
    ways = bytes_by_method(plan, target)
    assert sum(ways.values()) == plan.totals.output_bytes
    assert ways["computed"] >= plan.totals.bytes_by_kind["combine"] > 0
    shards = [shard for shard in plan.shards if shard.owner.index is not None]
    of_experts = sum(server_side_bytes(upload_parts(shard, target.same_store)) for shard in shards)
    assert 0 < of_experts <= ways["store_copy"]
    merge(plan, out)
    assert {name: place.read(name) for name in place.visible() if name.startswith("model")} == {
        name: content for name, content in local_files(plan, tmp_path / "out").items() if name.startswith("model")
    }
