"""The commands with object stores, from end to end, on a Ray cluster whose processes have credentials.

Everything goes through a proxy that counts. The server is the juicefs gateway: it checks credentials.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import files_below, raymoe, write_config
from tests.object_store.canned import Answer, canned
from tests.object_store.fault_proxy import FaultProxy
from tests.object_store.servers import Server, running_server
from tests.runtime.in_process import in_this_process

pytestmark = [pytest.mark.s3, pytest.mark.ray]

SHARD = ("--out-shard-size", "200000", "--random-seed", "3")


@dataclass(frozen=True)
class Store:
    """A bucket with models in it, and the same models here."""

    server: Server
    proxy: FaultProxy
    env: dict[str, str]
    bucket: str
    here: list[Path]
    session: Path  # Ray's files

    @property
    def there(self) -> list[str]:
        return [f"s3://{self.bucket}/models/m{number}" for number in range(len(self.here))]

    @property
    def places(self) -> tuple[list[Any], list[Any]]:
        return self.here, self.there

    def url(self) -> str:
        return f"s3://{self.bucket}/out/{uuid.uuid4().hex[:8]}"

    def files(self, url: str) -> dict[str, bytes]:
        client, prefix = self.server.client(), url.removeprefix(f"s3://{self.bucket}/") + "/"
        found = client.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        names = [item["Key"] for item in found if not item["Key"].endswith("/result.json")]  # of one run
        return {
            name.removeprefix(prefix): client.get_object(Bucket=self.bucket, Key=name)["Body"].read() for name in names
        }

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return raymoe(*arguments, env={**self.env, **variables})


@pytest.fixture(scope="module")
def store(
    zoo: Callable[..., Path], ray_env: dict[str, str], ray_has_access: Callable[[Mapping[str, str]], None]
) -> Iterator[Store]:
    import ray

    server = running_server("juicefs")
    here = [zoo("llama", seed=seed, dtype="bfloat16") for seed in (0, 1, 2)]
    bucket, client = f"cli-{uuid.uuid4().hex[:8]}", server.client()
    client.create_bucket(Bucket=bucket)
    for number, folder in enumerate(here):
        for path in folder.iterdir():
            client.put_object(Bucket=bucket, Key=f"models/m{number}/{path.name}", Body=path.read_bytes())
    with FaultProxy(server.endpoint) as proxy:
        access = server.environment | {"AWS_ENDPOINT_URL": proxy.url}
        ray_has_access(access)
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        yield Store(server=server, proxy=proxy, env=ray_env | access, bucket=bucket, here=here, session=session)


def config_of(models: list[Any], path: Path, mode: str = "random", **keys: Any) -> Path:
    from tests.pico import merge_config

    base, *experts = models
    content = merge_config(base, experts, mode=mode, expert_options={"noise_scale": 0.01}) | keys
    content["experts"][0].pop("noise_scale")
    return write_config(path, content)


def merged(store: Store, config: Path, output: object, *flags: str) -> subprocess.CompletedProcess[str]:
    done = store.run("merge", config, output, *SHARD, *flags)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A config, and the URL of the merge that was made of it. Read-only."""
    config, url = config_of(store.there, tmp_path_factory.mktemp("finished") / "config.yaml"), store.url()
    merged(store, config, url)
    return config, url


# What names the sources, by their places.
OF_PLACES = {"README.md", "raymoe.json"}


def test_from_and_to_everywhere(store: Store, tmp_path: Path) -> None:
    """S3 to S3 on Ray; S3 to local, local to S3 in this process: the same files. Then record, verify and inspect."""
    here, there = (config_of(m, tmp_path / f"{n}.yaml", mode="cheap_embed") for n, m in enumerate(store.places))
    urls = [store.url(), store.url()]
    with in_this_process():
        said = merged(store, there, tmp_path / "out").stderr
        said += merged(store, here, urls[0]).stderr
    said += merged(store, there, urls[1] + "/").stderr  # a trailing slash is no other place
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "result.json"}
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3
    for url in urls:
        found = store.files(url)
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} <= OF_PLACES
    record = json.loads(store.files(url)["raymoe.json"])
    assert record["files"].keys() == expected.keys() - {"raymoe.json"}
    assert all(file["checksum"].startswith("etag:") and file["size"] > 0 for file in record["files"].values())
    with in_this_process():
        done = store.run("verify", url)
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    assert "equal to what the sources give, byte for byte" in done.stdout
    done = store.run("inspect", url, "--json")
    local = store.run("inspect", tmp_path / "out", "--json")
    remote_summary, local_summary = json.loads(done.stdout), json.loads(local.stdout)
    assert remote_summary.pop("folder") == url and local_summary.pop("folder") == str(tmp_path / "out")
    # The record's sources are the same: both were merged from the bucket.
    assert remote_summary == local_summary
    check_no_secrets(store, said + done.stdout, tmp_path, store.files(url))


def check_no_secrets(store: Store, said: str, folder: Path, objects: Mapping[str, bytes]) -> None:
    """Neither key nor secret in what was said and written, in Ray's files included."""
    for secret in (store.server.key, store.server.secret):
        assert secret not in said
        assert not [name for name, content in objects.items() if secret.encode() in content]
        for place in (folder, store.session):
            files = files_below(place)
            assert files
            assert not [str(path) for path in files if secret.encode() in content_of(path)]


def content_of(path: Path) -> bytes:
    """What is in a file; nothing if Ray, which is at work, has taken it away."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def test_verify_finds_what_was_changed(store: Store, without_ray: None, tmp_path: Path) -> None:
    """With a checksum of the bytes: a weight and a small file, each replaced by another of its size."""
    config = config_of(store.there, tmp_path / "config.yaml", storage={"checksum": "sha256"})
    url = store.url()
    merged(store, config, url)
    files, client = store.files(url), store.server.client()
    record = json.loads(files["raymoe.json"])["files"]

    assert {name: file["checksum"] for name, file in record.items()} == {
        name: f"sha256:{sha256(content).hexdigest()}" for name, content in files.items() if name != "raymoe.json"
    }
    key = url.removeprefix(f"s3://{store.bucket}/")
    shard = next(name for name in files if name.endswith("-00001.safetensors") or name.startswith("model-00002"))
    for name in (shard, "tokenizer.json", "README.md"):
        content = files[name]
        changed = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        client.put_object(Bucket=store.bucket, Key=f"{key}/{name}", Body=changed)
    done = store.run("verify", url)
    assert done.returncode == 1
    assert "note: README.md: changed since the merge (a card may be edited)" in done.stdout
    assert "weight: differs" in done.stdout and "NOT verified: 2 differences" in done.stdout


def test_verify_of_a_copy(store: Store, finished: tuple[Path, str], without_ray: None, tmp_path: Path) -> None:
    """A copy has no ETags, by which the record knows the objects: the MD5s among them, and tensors, decide."""
    (_, url), copy = finished, tmp_path / "copy"
    copy.mkdir()
    for name, content in store.files(url).items():
        (copy / name).write_bytes(content)
    done = store.run("verify", copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("verified: ") and done.stdout.count("\n") == 1
    for name in ("config.json", next(path.name for path in sorted(copy.glob("model-00002-of-*.safetensors")))):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    done = store.run("verify", copy)
    assert done.returncode == 1
    assert "note: config.json: the record has an object's ETag, which does not tell whether a copy" in done.stdout
    assert "weight: differs" in done.stdout and "NOT verified: 1 difference" in done.stdout
    assert "changed since the merge" not in done.stdout


def test_planning_reads_headers_only(store: Store, tmp_path: Path) -> None:
    """Under 1% of the sources, of which a pico model's tokenizer is the most: weights are counted by themselves."""
    from tests.planning.test_multipart import SMOLLM2, tensor_shapes

    client, names = store.server.client(), []
    header, end = {}, 0
    for name, dims in tensor_shapes(SMOLLM2 | {"num_hidden_layers": 6}).items():
        start, end = end, end + 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + bytes(end)
    for number in range(2):
        key = f"plan/m{number}"
        client.put_object(Bucket=store.bucket, Key=f"{key}/model.safetensors", Body=body)
        config = json.dumps(SMOLLM2 | {"num_hidden_layers": 6}).encode()
        client.put_object(Bucket=store.bucket, Key=f"{key}/config.json", Body=config)
        names.append(f"s3://{store.bucket}/{key}")
    path = config_of([names[0], *names], tmp_path / "config.yaml")
    store.proxy.reset_stats()
    done = store.run("plan", path, f"s3://{store.bucket}/out/planned", "--json")
    assert done.returncode == 0, done.stderr
    stats = store.proxy.stats()
    assert 2 * len(text) <= stats.total_body_bytes < 0.01 * 2 * len(body)
    # A small object is put and deleted, to find out whether the output can be written to.
    assert stats.requests["PutObject"] == stats.requests["DeleteObject"] == 1
    assert stats.requests["CreateMultipartUpload"] == 0
    ways = json.loads(done.stdout)["bytes_by_way"]
    assert sum(ways.values()) == json.loads(done.stdout)["output_bytes"]
    assert ways["store_copy"] > 0 and "local" not in ways
    output = json.loads(done.stdout)["output"]
    assert output == {
        "location": f"s3://{store.bucket}/out/planned",
        "problems": [],
        "is_complete": False,
        "unfinished_merge_goes_on": False,
    }


# --- what goes wrong


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One message with these words, and no more than a report of problems."""
    assert done.returncode == code, (done.returncode, done.stderr)
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1
    assert len(done.stderr) < 1500


def test_nothing_there(store: Store, tmp_path: Path) -> None:
    missing = f"s3://{store.bucket}/models/none"
    config = config_of([*store.there[:2], missing], tmp_path / "config.yaml")
    refused(store.run("plan", config), 2, missing, "there are no files under this URL")
    config = config_of([*store.there[:2], "s3://no-such-bucket-here/m"], tmp_path / "config.yaml")
    refused(store.run("plan", config), 2, "s3://no-such-bucket-here/m", "there is no bucket no-such-bucket-here")
    config = config_of(store.there, tmp_path / "config.yaml")
    done = store.run("merge", config, "s3://no-such-bucket-here/out")
    refused(done, 2, "s3://no-such-bucket-here/out", "there is no bucket no-such-bucket-here")
    for command in ("inspect", "verify"):
        done = store.run(command, f"s3://{store.bucket}/out/none")
        refused(done, 2, f"s3://{store.bucket}/out/none", "there are no files under this URL")


def test_refused(store: Store, tmp_path: Path) -> None:
    """Wrong keys; and a bucket that may not be listed, with the permission by name."""
    config = config_of(store.there, tmp_path / "config.yaml")
    secret = "WRONGSECRET" + uuid.uuid4().hex
    done = store.run("plan", config, AWS_SECRET_ACCESS_KEY=secret)
    refused(done, 2, store.there[0], "refuses the secret key")
    assert secret not in done.stderr + done.stdout
    with canned(Answer(403, code="AccessDenied")) as denied:
        done = store.run("plan", config, AWS_ENDPOINT_URL=denied.url)
        refused(done, 2, f"s3:ListBucket on {store.bucket} is needed", f"arn:aws:s3:::{store.bucket}")
        local = config_of(store.here, tmp_path / "local.yaml")
        done = store.run("merge", local, f"s3://{store.bucket}/out/denied", AWS_ENDPOINT_URL=denied.url)
        refused(done, 2, f"s3:GetObject on {store.bucket}/out/denied/.raymoe/plan.json is needed")


def test_nobody_listens(store: Store, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = config_of(store.there, tmp_path / "config.yaml")
    done = store.run("plan", config, AWS_ENDPOINT_URL=endpoint)
    refused(done, 2, f"{endpoint} can't be reached", "AWS_ENDPOINT_URL")
    local = config_of(store.here, tmp_path / "local.yaml")
    done = store.run("merge", local, f"s3://{store.bucket}/out/nowhere", AWS_ENDPOINT_URL=endpoint)
    refused(done, 2, f"{endpoint} can't be reached")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("s3://", "no valid bucket name"),
        ("s3://Bucket_/a//b", "segment ''"),
        ("s3://KEYID:SECRETWORD@bucket/out", "credentials"),
        ("s3://bucket/out?X-Amz-Signature=SECRETWORD", "query"),
        ("s3://bucket/../out", "'..'"),
    ],
)
def test_an_output_that_is_no_url(store: Store, tmp_path: Path, output: str, words: str) -> None:
    config = config_of(store.here, tmp_path / "config.yaml")
    for command in ("merge", "plan"):
        done = store.run(command, config, output)
        refused(done, 2, words)
        assert "SECRETWORD" not in done.stderr + done.stdout


def test_the_output_is_a_source(store: Store, tmp_path: Path) -> None:
    config = config_of(store.there, tmp_path / "config.yaml")
    before = store.files(store.there[1])
    for flags in ((), ("--overwrite",)):
        done = store.run("merge", config, store.there[1] + "/", *flags)
        refused(done, 2, store.there[1], "the output is the folder of expert 0")
    assert store.files(store.there[1]) == before


def test_a_finished_merge_is_not_overwritten_by_chance(
    store: Store, finished: tuple[Path, str], without_ray: None
) -> None:
    config, url = finished  # and written again, the same
    before = store.files(url)
    refused(store.run("merge", config, url, "--out-shard-size", "1G"), 2, url, "holds a finished merge", "--overwrite")
    again = store.run("merge", config, url, *SHARD)
    assert again.returncode == 0 and "already complete" in again.stderr
    assert store.files(url) == before
    merged(store, config, url, "--overwrite")
    assert store.files(url) == before


def test_each_byte_is_read_once(store: Store, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """The weights of FFNs that the gate pass reads are those that shards are written from."""
    from tests.pico import merge_config, merge_without_ray

    options = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 1024, "dtype": "bfloat16"}
    here = [zoo("llama", seed=seed, **options) for seed in (0, 1, 2)]
    client = store.server.client()
    there = [f"s3://{store.bucket}/wide/m{number}" for number in range(3)]
    for number, folder in enumerate(here):
        for path in folder.iterdir():
            client.put_object(Bucket=store.bucket, Key=f"wide/m{number}/{path.name}", Body=path.read_bytes())
    content = merge_config(here[0], here[1:], mode="ridge")
    content["base_model"] = there[0]
    for expert, url in zip(content["experts"], there[1:], strict=True):
        expert["source_model"] = url
    config = write_config(tmp_path / "config.yaml", content)
    planned = store.proxy.reset_stats() and store.run("plan", config, "--json")
    headers = store.proxy.reset_stats().response_body_bytes["GetObject"]
    plan = json.loads(planned.stdout)
    done = store.run("merge", config, tmp_path / "out", "--actors", "1")
    assert done.returncode == 0, done.stderr
    read = store.proxy.reset_stats().response_body_bytes["GetObject"] - headers
    output, sources = plan["output_bytes"], plan["bytes_by_source"]
    ffn = sources["expert 0"] + sources["expert 1"]
    print(f"read {read:,} of {output:,} bytes, FFNs {ffn:,}")
    # What is no FFN is read for the base's shards and for each expert's prompts.
    assert ffn > 0.8 * output
    assert output - ffn < read < output + 3 * (output - ffn)
    merge_without_ray(merge_config(here[0], here[1:], mode="ridge"), tmp_path / "same")
    for shard in plan["shards"]:
        if shard["owner"] != "router":  # an actor may have other threads than this process, and so another rounding
            assert (tmp_path / "out" / shard["file"]).read_bytes() == (tmp_path / "same" / shard["file"]).read_bytes()


@pytest.mark.parametrize(
    ("actors", "to_bucket"),
    [
        (0, True),
        pytest.param(1, True, marks=pytest.mark.soak),
        pytest.param(2, True, marks=pytest.mark.soak),
        pytest.param(1, False, marks=pytest.mark.soak),
        pytest.param(2, False, marks=pytest.mark.soak),
    ],
)
def test_eight_adapters_of_one_base_read_it_once(
    actors: int, to_bucket: bool, store: Store, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """By each actor, whether for prompts or for shards, of which each takes the same FFNs and another adapter. Without
    actors, by this process."""
    from raymoe.config import load_config
    from tests.pico import merge_config, merge_without_ray, save_lora

    options = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 1024, "dtype": "bfloat16"}
    base, client, name = zoo("llama", **options), store.server.client(), f"lora/{uuid.uuid4().hex[:8]}"
    adapters = [save_lora(tmp_path / f"a{n}", base, ["up_proj", "gate_proj", "down_proj"], seed=n) for n in range(8)]
    for folder in (base, *adapters):
        for path in folder.iterdir():
            client.put_object(Bucket=store.bucket, Key=f"{name}/{folder.name}/{path.name}", Body=path.read_bytes())
    prompts = [["def f(x):", "return x"], ["The licence", "Work"], ["Two eggs", "Bake it"], ["The river", "Old town"]]

    def config_of(file: str, model: object, sources: list[str]) -> Path:
        content = merge_config(base, sources[:4], mode="ridge")
        content["base_model"] = str(model)
        content["experts"] = [
            {"source_model": source, "positive_prompts": [f"{text} {number}" for text in prompts[number % 4]]}
            for number, source in enumerate(sources)
        ]
        return write_config(tmp_path / file, content)

    there = f"s3://{store.bucket}/{name}"
    remote = config_of(
        "remote.yaml", f"{there}/{base.name}", [f"{there}/{base.name}+{there}/{a.name}" for a in adapters]
    )
    output = store.url() if to_bucket else str(tmp_path / "out")
    planned = store.proxy.reset_stats() and store.run("plan", remote, "--json")
    headers = store.proxy.reset_stats().response_body_bytes["GetObject"]
    with contextlib.nullcontext() if actors else in_this_process():
        done = store.run("merge", remote, output, *(("--actors", str(actors)) if actors else ()))
    assert done.returncode == 0, done.stderr
    read = store.proxy.reset_stats().response_body_bytes["GetObject"] - headers
    model = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    factors = sum(path.stat().st_size for adapter in adapters for path in adapter.glob("*.safetensors"))
    written = json.loads(planned.stdout)["output_bytes"]
    print(f"read {read:,} bytes; the base has {model:,}, the adapters {factors:,}, the output {written:,}")
    assert written > 6 * model
    # The attention is read for prompts and for the base's shard; factors for prompts, and for each matrix of shards.
    assert read < max(1, actors) * 1.3 * model + 3 * factors
    local = config_of("local.yaml", base, [f"{base}+{adapter}" for adapter in adapters])
    merge_without_ray(load_config(local).to_plain(), tmp_path / "same")
    files = store.files(output) if to_bucket else {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for shard in (tmp_path / "same").glob("*.safetensors"):
        assert files[shard.name] == shard.read_bytes()
