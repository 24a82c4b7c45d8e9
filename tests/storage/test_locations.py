"""One place under several names is one place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raymoe.sources.facts import SourceFile
from raymoe.storage.locations import Inputs, is_in, is_same_place, overwrite_problem, source_folders


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """data/base, a link to data, and a link to data/base."""
    (tmp_path / "data/base").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "current").symlink_to("data/base")
    return tmp_path


ALIASES = ("data/base", "data/../data/base", "link/base", "link/../data/./base/", "current", "current/../base")


@pytest.mark.parametrize("name", ALIASES)
def test_names_of_a_folder(here: Path, name: str) -> None:
    base = str(here / "data/base")
    assert is_same_place(os.path.join(here, name), base) and is_same_place(f"file://{here}/link/base", base)
    assert is_in(os.path.join(here, name, "out"), base) and not is_in(base, os.path.join(here, name, "out"))
    problem = overwrite_problem(os.path.join(here, name), Inputs(folders=(("base", base),)))
    assert problem is not None and problem.what.startswith("the output is the folder of base, which would be")


def test_a_folder_that_is_not_there_yet(here: Path) -> None:
    assert is_same_place(str(here / "link/base/new/out"), str(here / "current/new/out"))
    assert not is_same_place(str(here / "link/base/new/out"), str(here / "link/base/new/other"))
    assert is_in(str(here / "link/base/new/out"), str(here / "current/new"))


@pytest.mark.processes
def test_a_bind_mount(here: Path) -> None:
    """In a mount namespace of its own, where the system allows one."""
    (here / "mounted").mkdir()
    code = "import sys; from raymoe.storage.locations import is_same_place; print(is_same_place(*sys.argv[1:]))"
    script = 'mount --bind data mounted && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", code]
    places = [str(here / "data/base"), str(here / "mounted/base")]
    try:
        done = subprocess.run([*command, *places], cwd=here, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.stdout == "True\n", done.stderr


def test_every_name_that_leads_to_a_file_is_its_place(here: Path) -> None:
    """model/weights -> data/base/step -> store/blob: without any of them the weights are gone."""
    for name in ("model", "store", "elsewhere"):
        (here / name).mkdir()
    (here / "store/blob").write_text("weights")
    (here / "data/base/step").symlink_to("../../store/blob")
    (here / "model/weights").symlink_to("../link/base/step")
    folders = tuple(source_folders("base", (), [SourceFile(location=str(here / "model/weights"), size=7)]))
    for output in ("model", "current", "store"):
        assert overwrite_problem(str(here / output), Inputs(folders=folders)) is not None
    assert overwrite_problem(str(here / "elsewhere"), Inputs(folders=folders)) is None


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("out", True),
        ("out/chat_templates", True),  # whose *.jinja are removed
        ("out/.raymoe/parts/base", True),  # a journal goes whole
        ("out/base", False),
        (".", False),
    ],
)
def test_what_a_merge_removes_in_its_output(tmp_path: Path, source: str, refused: bool) -> None:
    (tmp_path / source).mkdir(parents=True, exist_ok=True)
    inputs = Inputs(folders=(("expert 0", str(tmp_path / source)),))
    assert (overwrite_problem(str(tmp_path / "out"), inputs) is not None) == refused
    of_url = Inputs(folders=(("expert 0", f"s3://bucket/in/{source}"),))
    assert (overwrite_problem("s3://bucket/in/out", of_url) is not None) == (refused and source != ".")


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("config.json", True),
        ("README.md", True),
        ("merges.txt", True),  # a tokenizer's, removed with the model that is replaced
        ("chat_templates/a.jinja", True),
        (".raymoe/prompts.txt", True),
        ("c.yaml", False),
        ("sub/merges.txt", False),
    ],
)
def test_files_that_are_read_and_lie_in_the_output(tmp_path: Path, name: str, refused: bool) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "out" / name)
    for place in (tmp_path / "out" / name, tmp_path / "link", f"file://{tmp_path}/out/{name}"):
        problem = overwrite_problem(str(tmp_path / "out"), Inputs(files=(("the config", str(place)),)))
        assert (problem is not None) == refused
        assert problem is None or "would remove or replace the config there" in problem.what


def test_files_that_the_record_in_the_output_names(tmp_path: Path) -> None:
    """They are removed, whoever wrote the record."""
    out, base = tmp_path / "out", tmp_path / "out/base"
    base.mkdir(parents=True)
    recorded = ["base/model.safetensors", "c.yaml"]
    assert overwrite_problem(str(out), Inputs(folders=(("base", str(base)),)), recorded) is not None
    config = Inputs(files=(("the config", str(out / "c.yaml")),))
    assert overwrite_problem(str(out), config, recorded) is not None
    assert overwrite_problem(str(out), config, ["d.yaml"]) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("s3://bucket/a/b", "s3a://bucket/a/b", True),
        ("s3://bucket/a/b", "https://bucket.s3.eu-west-1.amazonaws.com/a/b", True),
        ("s3://bucket/a/b", "https://bucket.s3.amazonaws.com/a/b", True),
        ("s3://bucket/a/b", "https://s3.us-east-1.amazonaws.com/bucket/a/b", True),
        ("s3://bucket/a/b", "https://store.test:9000/bucket/a/b", True),
        ("s3://bucket/a/b c", "https://store.test:9000/bucket/a/b%20c", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "s3://other/a", False),
        ("https://Host.test/a", "http://host.test:443/a", True),
        ("memory://x/y", "memory:///x/y", True),
        ("memory://x/y", "s3://x/y", False),
        ("s3://bucket/a/b", "/bucket/a/b", False),
    ],
)
def test_urls(monkeypatch: pytest.MonkeyPatch, one: str, other: str, same: bool) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.test:9000")
    assert is_same_place(one, other) == same
    assert (overwrite_problem(one, Inputs(folders=(("base", other),))) is not None) == same


def test_prefixes(here: Path) -> None:
    assert is_in("s3a://bucket/models/base", "s3://bucket/models") and is_in("s3://bucket/models", "s3://bucket")
    assert not is_in("s3://bucket/models2", "s3://bucket/models")


def test_a_model_of_the_hub_is_its_cache(tmp_path: Path, zoo: Callable[..., Path]) -> None:
    """Whatever snapshot is named, and what its links lead to."""
    from raymoe.config.model_refs import ModelRef, PathRef
    from raymoe.sources.hub import HubOptions
    from raymoe.sources.resolve import folders_of

    cache = tmp_path / "models--org--name"
    for folder in ("blobs", "snapshots/0123", "snapshots/4567"):
        (cache / folder).mkdir(parents=True)
    ref = ModelRef(model=PathRef(path="org/name"), adapter=PathRef(path=str(tmp_path / "adapter")))
    folders = folders_of(ref, HubOptions(cache_dir=str(tmp_path)))
    assert set(folders) == {
        *(str(cache / folder) for folder in ("blobs", "snapshots/0123", "snapshots/4567")),
        str(tmp_path / "adapter"),
    }
