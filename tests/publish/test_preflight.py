"""What a push finds out before it makes or sends anything, and what it makes then: nothing where it is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import raymoe
from raymoe.object_store.options import StorageOptions
from raymoe.publish.errors import PushFailed
from raymoe.publish.manifest import open_manifest
from raymoe.publish.repository import PushTarget, Repository, source_problem
from raymoe.publish.upload import Comparison, upload
from tests.cli.commands import write_config
from tests.cli.conftest import Answer
from tests.pico import copy_model, merge_config
from tests.publish.hub import WritableHub

Cli = Callable[..., Answer]


@pytest.fixture
def copied(merged: Path, tmp_path: Path) -> Path:
    """A merge that a test may change."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.mark.parametrize("options", [(), ("--branch", "v2"), ("--dry-run",), ("--dry-run", "--branch", "v2")])
def test_files_that_the_repository_ignores(hub: WritableHub, merged: Path, cli: Cli, options: tuple[str, ...]) -> None:
    """The library leaves them out of the commit and says nothing."""
    hub.create("org/name")
    hub.commit("org/name", "main", "no weights here", {".gitignore": b"*.safetensors\nrecord.txt\n"}, {}, [])
    refused = cli("push", merged, "org/name", *options)
    assert (refused.code, refused.out) == (2, "")
    branch = "v2" if options == ("--branch", "v2") else "main"
    said = f"the .gitignore of its branch {branch} keeps files out of a commit: model-00001-of-00006.safetensors, "
    assert said in refused.err and "and 3 more\n    -> remove the lines that match them" in refused.err
    assert not hub.uploads and len(hub.history("org/name")) == 2
    hub.commit("org/name", "main", "weights after all", {".gitignore": b"*.bin\n"}, {}, [])
    assert cli("push", merged, "org/name").code == 0
    assert len(hub.files("org/name")) == 14 + 2  # .gitignore and .gitattributes stay


def test_a_dry_run_of_a_branch_to_be_made(hub: WritableHub, merged: Path, cli: Cli) -> None:
    looked = cli("push", merged, "org/name", "--dry-run", "--branch", "v2")
    assert looked.code == 0, looked.err
    assert f"{hub.url}/org/name would be created\nits branch v2 would be created from main\n" in looked.err
    assert hub.written == {}
    raymoe.push(merged, "org/name")
    looked = cli("push", merged, "org/name", "--dry-run", "--branch", "v2")
    assert looked.code == 0, looked.err
    assert looked.err.startswith("its branch v2 would be created from main\n")
    assert "(branch v2): no file to send; 14 are there already" in looked.err
    assert hub.written["org/name"].heads.keys() == {"main"}
    assert raymoe.push(merged, "org/name", revision="v2").sent == ()  # as was said
    looked = cli("push", merged, "org/name", "--dry-run", "--branch", "v2")
    assert looked.code == 0 and "would be created" not in looked.err


@pytest.mark.parametrize("options", [("--branch", "v2"), ("--dry-run",)])
def test_a_refused_card_makes_no_repository(hub: WritableHub, copied: Path, cli: Cli, options: tuple[str, ...]) -> None:
    card = copied / "README.md"
    card.write_text(card.read_text().replace("library_name", "license: mine\nlibrary_name", 1))
    refused = cli("push", copied, "org/name", *options)
    assert refused.code == 2 and "README.md: the Hub refuses its metadata" in refused.err
    assert hub.written == {}


def test_a_card_to_be_is_refused_before_the_merge(
    hub: WritableHub, zoo: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """Its metadata come from the models' cards, and are known before the routers are."""
    models = [copy_model(zoo("llama", seed=seed), tmp_path / f"model-{seed}") for seed in (0, 1, 2)]
    for model in models:
        (model / "README.md").write_text("---\nlicense: openrail\n---\n")
    config = write_config(tmp_path / "config.yaml", merge_config(models[0], models[1:], mode="random"))
    refused = cli("merge", config, tmp_path / "out", "--push-to-hub", "org/name")
    assert refused.code == 2 and "README.md: the Hub refuses its metadata" in refused.err
    assert hub.written == {} and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": ["a model"]}, "its sources are not a list of objects"),
        ({"sources": {"owner": "base"}}, "its sources are not a list of objects"),
        ({"prompt_files": ["prompts.txt"]}, "its prompt_files are not a list of objects"),
        ({"files": {"config.json": 5}}, "it names no files with their sizes and checksums"),
    ],
)
def test_records_of_another_shape(
    hub: WritableHub, copied: Path, cli: Cli, change: dict[str, object], said: str
) -> None:
    record = copied / "raymoe.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    refused = cli("push", copied, "org/name")
    assert refused.code == 2
    assert f"raymoe.json: this record can't be read: {said}" in refused.err
    assert hub.written == {}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>\n<b>Bad\tRequest</b></html>" + b" " * 999, "its metadata: <html> <b>Bad Request</b></html>\n"),
        (b'["errors"]', 'its metadata: ["errors"]\n'),
        (b'{"errors": "many"}', 'its metadata: {"errors": "many"}\n'),
        (b"", "its metadata: it does not say why\n"),
    ],
)
def test_a_refused_card_in_words_of_another_server(
    hub: WritableHub, merged: Path, cli: Cli, answer: bytes, said: str
) -> None:
    hub.card_refusal = answer
    refused = cli("push", merged, "org/name")
    assert refused.code == 2 and f"README.md: the Hub refuses {said}" in refused.err
    assert hub.written == {}


def test_how_a_store_was_reached_is_not_published(hub: WritableHub, copied: Path) -> None:
    record = copied / "raymoe.json"
    content = json.loads(record.read_text())
    content["config"]["storage"] = {"endpoint": "http://minio.internal:9000", "profile": "admin", "checksum": "sha256"}
    record.write_text(json.dumps(content))
    raymoe.push(copied, "org/name")
    published = json.loads(hub.files("org/name")["raymoe.json"])
    assert published["config"] == content["config"] | {"storage": {"checksum": "sha256"}}
    assert raymoe.push(copied, "org/name").sent == ()


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-00006.safetensors", "README.md", "raymoe.json"])
def test_links_out_of_the_folder(hub: WritableHub, copied: Path, cli: Cli, tmp_path: Path, name: str) -> None:
    """A folder that somebody sent must not name files of this machine for publication."""
    shutil.move(copied / name, tmp_path / "elsewhere")
    (copied / name).symlink_to("../elsewhere")
    refused = cli("push", copied, "org/name")
    assert refused.code == 2 and f"{name} is a link to a file outside of the folder" in refused.err
    assert hub.written == {}


def test_links_within_the_folder_and_to_it(hub: WritableHub, copied: Path, cli: Cli, tmp_path: Path) -> None:
    (copied / "blobs").mkdir()
    shutil.move(copied / "tokenizer.json", copied / "blobs/1")
    (copied / "tokenizer.json").symlink_to("blobs/1")
    (tmp_path / "link").symlink_to(copied)
    assert cli("push", tmp_path / "link", "org/name").code == 0
    assert "tokenizer.json" in hub.files("org/name")


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_repository_that_the_merge_is_made_of(
    hub: WritableHub, copied: Path, cli: Cli, options: tuple[str, ...]
) -> None:
    """Told by its name, in any case, and where it was renamed by the commit that is there. Its branches are free."""
    hub.create("org/name")
    head = str(hub.written["org/name"].heads["main"])
    for source in (f"Org/Name@{'0' * 40}", f"org/base@{'0' * 40}+org/NAME@{'1' * 40}", f"org/formerly@{head}"):
        record = json.loads((copied / "raymoe.json").read_text())
        record["sources"][1]["model"] = source
        (copied / "raymoe.json").write_text(json.dumps(record))
        refused = cli("push", copied, "org/name", *options)
        assert refused.code == 2 and "which the merge is made of: its files would be replaced" in refused.err
        assert len(hub.history("org/name")) == 1
        assert cli("push", copied, "org/name", "--branch", "moe", "--dry-run").code == 0
        assert cli("push", copied, "org/other", "--dry-run").code == 0


def test_files_that_another_merge_replaces_during_the_push(tmp_path: Path) -> None:
    """Experts of the same shapes: sizes and names tell nothing. Nothing is committed, whichever file was replaced."""
    copied, files = tmp_path, {"model.safetensors.index.json": {"size": 2, "checksum": "x"}}
    (copied / "model.safetensors.index.json").write_text("{}")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (copied / name).write_bytes(bytes(100))
        files[name] = {"size": 100, "checksum": "x"}
    (copied / "raymoe.json").write_text(json.dumps({"plan_digest": "plan", "files": files}))
    published = open_manifest(copied, "org/name", StorageOptions())
    shards = [file for file in published.files if file.is_shard]
    committed: list[str] = []

    class Api:
        def preupload_lfs_files(self, repo: str, operations: Any, revision: str) -> None:
            if operations[0].path_in_repo == shards[-1].name:  # all are hashed by now
                (copied / "new").write_bytes((copied / shards[0].name).read_bytes())
                os.replace(copied / "new", copied / shards[0].name)

        def create_commit(self, repo: str, *_: Any, **__: Any) -> None:
            committed.append(repo)

    target = PushTarget(repo="org/name")
    repository = Repository(target=target, api=cast(Any, Api()), url="", is_new=False, base="main")
    for there in ((), tuple(shards[:1])):
        missing = tuple(file for file in published.files if file not in there)
        comparison = Comparison(head="", unchanged=there, missing=missing, removed=(), others=())
        with pytest.raises(PushFailed, match=f"{shards[0].name} has changed since the push began"):
            upload(published, repository, comparison, lambda said: None)
        published = open_manifest(copied, "org/name", StorageOptions())
    assert committed == []


def test_main_by_its_whole_name() -> None:
    target = PushTarget(repo="org/name", revision="refs/heads/main")
    assert target.branch == "main"
    assert source_problem(target, [f"org/name@{'0' * 40}"]) is not None
