"""Models in object stores: the same facts as from local folders, few bytes read, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.object_store.urls import join_url, s3_location
from raymoe.sources.bucket_folder import read_range
from raymoe.sources.facts import ModelFacts, SourceFile
from raymoe.sources.resolve import fetch_file, fetch_side_files, resolve_model, resolve_models
from tests.object_store.fault_proxy import FaultProxy
from tests.object_store.servers import Server
from tests.sources.checkpoints import write_json, write_sharded

Make = Callable[..., Path]


def upload(folder: Path, url: str) -> str:
    """All files of a folder as objects below `url`."""
    store = open_store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(join_url(url, path.relative_to(folder).as_posix()), path.read_bytes())
    return url


def relative_facts(facts: ModelFacts, place: str, adapter_place: str = "\0") -> Any:
    """The facts as data, with places cut out of all texts, and without what only object stores have."""

    def plain(value: Any) -> Any:
        if isinstance(value, SourceFile):
            return plain(value.location), value.size
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value.replace(place, "MODEL").replace(adapter_place, "ADAPTER") if isinstance(value, str) else value

    return plain(facts)


@pytest.fixture
def sharded(tmp_path: Path, tensors: Any) -> Path:
    folder = tmp_path / "sharded"
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:2]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[2:]},
    }
    write_sharded(folder, shards)
    write_json(folder / "tokenizer_config.json", {"a": 1})
    write_json(folder / "generation_config.json", {"b": 1})
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").write_text("{{ x }}")
    (folder / "modeling.py").write_text("never")
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"], "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter_config.json", config)
    prefix = "base_model.model.model.layers.0.up"
    factors = {
        f"{prefix}.lora_A.weight": np.ones((2, 4), "float32"),
        f"{prefix}.lora_B.weight": np.ones((6, 2), "float32"),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_sharded_models_give_the_facts_of_a_local_folder(bucket: str, sharded: Path) -> None:
    url = upload(sharded, join_url(bucket, "models/sharded"))
    remote, local = resolve_model(parse_model_ref(url + "/")), resolve_model(parse_model_ref(str(sharded)))
    assert relative_facts(remote, url) == relative_facts(local, str(sharded))
    assert remote.label == url
    files = [*remote.index.files, *(side.file for side in remote.side_files)]
    assert len(files) == 5
    for file in files:
        info = open_store(url).stat(file.location)
        assert info is not None and file.etag == info.etag and file.size == info.size
    assert {file.etag for file in local.index.files} == {None}


def test_the_bytes_are_those_of_the_file(bucket: str, sharded: Path) -> None:
    facts = resolve_model(parse_model_ref(upload(sharded, join_url(bucket, "m"))))
    for entry in facts.index.tensors.values():
        expected = (sharded / entry.file.name).read_bytes()[entry.start : entry.end]
        assert read_range(entry.file, entry.start, entry.end) == expected
    paths = fetch_side_files(facts)
    assert sorted(paths) == ["chat_templates/tool.jinja", "generation_config.json", "tokenizer_config.json"]
    for name, path in paths.items():
        assert path.read_bytes() == (sharded / name).read_bytes()
        assert path.name == name.rsplit("/", 1)[-1]
    assert fetch_side_files(facts) == paths  # copied once


@pytest.mark.parametrize("places", ["remote+remote", "local+remote", "remote+local"])
def test_adapters_and_mixtures(bucket: str, sharded: Path, lora: Path, places: str) -> None:
    model, adapter = (
        upload(folder, join_url(bucket, folder.name)) if place == "remote" else str(folder)
        for folder, place in zip((sharded, lora), places.split("+"))
    )
    facts = resolve_model(parse_model_ref(f"{model}+{adapter}"))
    local = resolve_model(parse_model_ref(f"{sharded}+{lora}"))
    assert relative_facts(facts, model, adapter) == relative_facts(local, str(sharded), str(lora))
    assert facts.adapter is not None
    assert facts.adapter.pairs["model.layers.0.up.weight"].scaling == 2.0


def test_shards_in_subfolders(bucket: str, tmp_path: Path, tensors: Any) -> None:
    folder = tmp_path / "m"
    (folder / "weights").mkdir(parents=True)
    write_sharded(folder, {"weights/model-00001-of-00001.safetensors": tensors})
    facts = resolve_model(parse_model_ref(upload(folder, join_url(bucket, "m"))))
    assert set(facts.index.tensors) == set(tensors)


def test_planning_reads_headers_only(server: Server, bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    rng = np.random.default_rng(0)
    big = {f"model.layers.{n}.up.weight": rng.standard_normal((1024, 1024)).astype("float32") for n in range(14)}
    names = list(big)
    write_sharded(
        folder, {f"model-0000{i}-of-00002.safetensors": {n: big[n] for n in names[i - 1 :: 2]} for i in (1, 2)}
    )
    (folder / "tokenizer.json").write_bytes(os.urandom(2_000_000))
    url = upload(folder, join_url(bucket, "large"))
    assert sum(path.stat().st_size for path in folder.iterdir()) > 55_000_000
    with FaultProxy(server.endpoint) as proxy:
        storage = StorageOptions(endpoint=proxy.url)
        facts = resolve_model(parse_model_ref(url), None, storage)
        assert len(facts.index.tensors) == 14
        stats = proxy.stats()
        assert 0 < stats.total_body_bytes < 200_000
        assert sum(stats.requests.values()) <= 6
        entry = facts.index.tensors[names[3]]
        assert read_range(entry.file, entry.start, entry.start + 1000, storage) == big[names[3]].tobytes()[:1000]


def test_a_source_that_changes_after_planning(bucket: str, make_model: Make, sharded: Path) -> None:
    url = upload(make_model(), join_url(bucket, "m"))
    facts = resolve_model(parse_model_ref(url))
    (file,) = facts.index.files
    store = open_store(url)
    content = store.read_all(file.location)
    store.put(file.location, content[:-4] + b"abcd")
    for read in (lambda: read_range(file, 0, 8), lambda: fetch_file(file)):
        with pytest.raises(CheckpointError, match="no longer what the merge was planned with: its ETag is another"):
            read()
    store.delete(file.location)
    with pytest.raises(CheckpointError, match="there is no such object"):
        read_range(file, 0, 8)


def test_refusals_name_the_place(bucket: str, make_model: Make, lora: Path) -> None:
    name, folder = s3_location(bucket).bucket, make_model()
    url = upload(folder, join_url(bucket, "good"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5])
    cut = upload(folder, join_url(bucket, "cut"))
    (folder / "model.safetensors").unlink()
    empty = upload(folder, join_url(bucket, "empty"))
    adapter = upload(lora, join_url(bucket, "lora"))
    cases = {
        "s3://no-such-bucket-here/m": "there is no bucket no-such-bucket-here",
        join_url(bucket, "nothing"): f"s3://{name}/nothing: there are no files under this URL",
        join_url(bucket, "goo"): "there are no files under this URL",
        join_url(url, "model.safetensors"): "this is a file; a model is named by its folder",
        cut: rf"s3://{name}/cut/model\.safetensors: .*truncated",
        empty: rf"s3://{name}/empty: no weights found(.|\n)*upload the model again",
        adapter: "this is a LoRA adapter, not a whole model",
        f"{url}+{join_url(bucket, 'no-lora')}": "no-lora: there are no files under this URL",
    }
    for ref, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            resolve_model(parse_model_ref(ref))
    with pytest.raises(CheckpointError) as caught:  # all together
        resolve_models([parse_model_ref(ref) for ref in cases])
    assert len(caught.value.problems) >= len(cases)


def test_refused_access_is_told(server: Server, bucket: str, make_model: Make) -> None:
    if server.kind != "moto":
        pytest.skip("the gateway's owner may do everything")
    url, name = upload(make_model(), join_url(bucket, "m")), s3_location(bucket).bucket
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{name}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    server.client().put_bucket_policy(Bucket=name, Policy=policy)
    with pytest.raises(CheckpointError, match=rf"s3:GetObject on {name}/m/config.json is needed"):
        resolve_model(parse_model_ref(url))


def test_bin_weights_are_copied_with_a_warning(bucket: str, tmp_path: Path, tensors: Any) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "bin"
    write_json(folder / "config.json", {"model_type": "llama"})
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "pytorch_model.bin")
    url = upload(folder, join_url(bucket, "bin"))
    facts, local = (resolve_model(parse_model_ref(place)) for place in (url, str(folder)))
    assert relative_facts(dataclasses.replace(facts, warnings=()), url) == relative_facts(local, str(folder))
    assert "has .bin weights only" in facts.warnings[0]


def test_any_other_file_system(tmp_path: Path, sharded: Path) -> None:
    url = upload(sharded, f"memory://{uuid.uuid4().hex}/m")
    local = relative_facts(resolve_model(parse_model_ref(str(sharded))), str(sharded))
    assert relative_facts(resolve_model(parse_model_ref(url)), url) == local
    facts = resolve_model(parse_model_ref(f"file://{sharded}"))  # a local path in other words
    assert facts.label == str(sharded)
    assert facts.index == resolve_model(parse_model_ref(str(sharded))).index
    with pytest.raises(CheckpointError, match=r"there is no folder .*/nowhere here"):
        resolve_model(parse_model_ref(f"file://{tmp_path}/nowhere"))


def test_how_urls_are_written() -> None:
    def parts(text: Any) -> tuple[str, str | None]:
        ref = parse_model_ref(text)
        return ref.model.path, ref.adapter.path if ref.adapter else None

    assert parts("s3://b-1/base/+s3://b-2/adapter") == ("s3://b-1/base", "s3://b-2/adapter")
    assert parts("org/name@main+s3://b-1/a") == ("org/name", "s3://b-1/a")
    assert parts("s3a://b-1/base+./adapter") == ("s3://b-1/base", "./adapter")
    assert parts("s3://b-1/run@2/model") == ("s3://b-1/run@2/model", None)
    plus = {"model": {"path": "s3://b-1/a+b@c"}, "lora": {"path": "gs://b/x/"}}
    assert parts(plus) == ("s3://b-1/a+b@c", "gs://b/x")
    for bad, message in {
        "s3://b-1/m@main": r"asks for revision 'main', but a URL has none.*path: s3://b-1/m@main",
        "s3://b-1/a+b+s3://b-1/c": r"a URL with '\+' is written as",
        "s3://b-1//m": "segment ''",
        "s3://": "bucket",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_model_ref(bad)
    with pytest.raises(ValueError, match="a URL has no revisions"):
        parse_model_ref({"model": {"path": "s3://b-1/m", "revision": "main"}})


@pytest.mark.processes
def test_local_models_need_no_s3(sharded: Path) -> None:
    code = (
        "import sys; from raymoe.config.model_refs import parse_model_ref as p; from raymoe.sources.resolve import *; "
        f"facts = resolve_model(p({str(sharded)!r})); [fetch_file(f) for f in facts.index.files]; "
        "import raymoe.object_store.protocol, raymoe.object_store.s3_store, raymoe.object_store.fsspec_store; "
        "print(*({'s3fs', 'fsspec', 'aiobotocore', 'botocore', 'aiohttp', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_facts_travel(bucket: str, make_model: Make) -> None:
    import pickle

    facts = resolve_model(parse_model_ref(upload(make_model(), join_url(bucket, "m"))))
    assert pickle.loads(pickle.dumps(facts)) == facts
