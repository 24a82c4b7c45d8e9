"""What `plan CONFIG OUT` says of an output that `merge` would refuse, and that `merge` says it before it starts Ray."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.storage.object_journal import ObjectJournal
from raymoe.storage.output_files import StoreFiles
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.output_checks import write_problems
from tests.object_store.servers import Server, environment, running_server
from tests.pico import merge_without_ray

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started for an error that can be seen before")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    server = running_server("moto")
    with environment(server.environment):
        yield server


def refused(cli: Cli, config: Path, out: object, said: str) -> None:
    """Both commands refuse the output in these words, plan after it has printed the plan."""
    plan = cli("plan", config, out)
    assert plan.code == 2 and said in plan.out and "No problems found" not in plan.out
    assert "parameters in all" in plan.out
    as_json = cli("plan", config, out, "--json")
    assert as_json.code == 2 and said in json.loads(as_json.out)["output"]["problems"][0]
    merge = cli("merge", config, out)
    assert merge.code == 2 and said in merge.err


def test_folders(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(cli, config(), out, "the output folder is not empty")
    (tmp_path / "file").write_text("mine")
    refused(cli, config(), tmp_path / "file", "the output is a file")
    assert cli("plan", config(), tmp_path / "new").code == 0 and not (tmp_path / "new").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/sys"), reason="/proc takes no new folders, even of root")
def test_a_folder_that_takes_no_files(cli: Cli, config: Callable[..., Path]) -> None:
    refused(cli, config(), "/proc/sys/out", "no permission to write in /proc/sys")


def test_finished_merges(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    """This very one is no problem: there is nothing left to do. Another is."""
    import yaml

    out = tmp_path / "out"
    merge_without_ray(yaml.safe_load(config().read_text()), out)
    digest = json.loads(cli("plan", config(), "--json").out)["digest"]
    files = {path.name: {"size": path.stat().st_size, "checksum": "xxh3-128:0"} for path in out.iterdir()}
    files["README.md"] = {"size": 0, "checksum": "xxh3-128:0"}
    (out / "README.md").touch()
    (out / "raymoe.json").write_text(json.dumps({"plan_digest": digest, "files": files}))
    same = cli("plan", config(), out)
    assert same.code == 0 and f"{out} holds this finished merge: `raymoe merge` has nothing to do." in same.out
    assert json.loads(cli("plan", config(), out, "--json").out)["output"]["is_complete"] is True
    refused(cli, config("hidden"), out, "the output folder holds a finished merge")


def test_sources_that_changed_since_the_merge_was_interrupted(
    cli: Cli, config: Callable[..., Path], tmp_path: Path
) -> None:
    import yaml

    import raymoe
    from raymoe.runtime.source_files import SourceFiles

    out = tmp_path / "out"
    content = yaml.safe_load(config().read_text())
    base = Path(shutil.copytree(content["base_model"], tmp_path / "own-base"))
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**content, "base_model": str(base)}))
    digest = json.loads(cli("plan", path, "--json").out)["digest"]
    plan = raymoe.plan(path)
    target = open_output(Location.parse(str(out)), StorageOptions())
    target.lock()
    target.begin(digest, SourceFiles(plan, None).fingerprints(), fresh=False)
    target.release()
    goes_on = cli("plan", path, out)
    assert goes_on.code == 0 and "`raymoe merge` resumes it" in goes_on.out
    os.utime(base / "model.safetensors", (1, 1))
    refused(cli, path, out, "source files changed since the merge in this folder was interrupted")


@pytest.mark.s3
def test_buckets(cli: Cli, config: Callable[..., Path], moto: Server) -> None:
    client = moto.client()
    client.create_bucket(Bucket="plan-output")
    assert cli("plan", config(), "s3://plan-output/new").code == 0
    assert "Contents" not in client.list_objects_v2(Bucket="plan-output")  # the probe is gone
    refused(cli, config(), "s3://no-such-bucket-here/out", "there is no bucket")
    for action in ("s3:PutObject", "s3:DeleteObject"):
        statement = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": "arn:aws:s3:::plan-output/*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        client.put_bucket_policy(Bucket="plan-output", Policy=policy)
        refused(cli, config(), "s3://plan-output/out", f"{action} on plan-output/out/* is needed")
    client.delete_bucket_policy(Bucket="plan-output")


def test_a_probe_of_another_process_is_no_output() -> None:
    url = "memory://probes/out"
    store = open_store(url, StorageOptions())
    store.put(f"{url}/.raymoe/probe-0123", b"")
    files = StoreFiles(store, url)
    journal = ObjectJournal(files)
    assert files.problems(journal, files.finished_merge(journal), "digest") == []
    assert write_problems(open_output(Location.parse(url), StorageOptions()), StorageOptions()) == []
    assert [entry.name for entry in store.list(url)] == [".raymoe/probe-0123"]
