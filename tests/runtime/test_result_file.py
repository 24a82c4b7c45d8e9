"""`--result FILE` replaces nothing but an earlier result, and nothing that a merge reads or writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.errors import MergeFailed, ProblemReport
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.runtime.run_report import RunReport, record_run

Cli = Callable[..., Any]


def test_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    """Also one through a link, an empty file, and one that comes while the run goes on."""
    file, link = tmp_path / "run.json", tmp_path / "link.json"
    link.symlink_to("run.json")
    file.touch(mode=0o640)
    for place in (file, link, file):
        with record_run(str(place)):
            pass
        assert json.loads(file.read_text())["exit_reason"] == "done"
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, file]


@pytest.mark.parametrize("content", ["base_model: x", "{}", "[1]", '{"exit_reason": "done"}', "[" * 100_000, "\0\xff"])
def test_anything_else_stays(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine"
    file.write_text(content, encoding="latin-1")
    (tmp_path / "link").symlink_to("mine")
    os.link(file, tmp_path / "hard")
    for name in ("mine", "link", "hard"):
        with (
            pytest.raises(ProblemReport, match="not the result of a run is there already"),
            record_run(str(tmp_path / name)),
        ):
            raise AssertionError("the run began")
    assert file.read_text(encoding="latin-1") == content


def test_what_comes_while_the_run_goes_on_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with record_run(str(tmp_path / "run.json")):
        (tmp_path / "run.json").write_text("mine")
    assert (tmp_path / "run.json").read_text() == "mine"
    assert "not the result of a run is there already" in capsys.readouterr().err


def test_files_of_the_merge(tmp_path: Path) -> None:
    (tmp_path / "out/.raymoe").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    for name in ("out/config.json", "link/raymoe.json", "out/model.safetensors", "link/.raymoe/run.json"):
        with (
            pytest.raises(ProblemReport, match="the merge writes a file of its own there"),
            record_run(str(tmp_path / name), tmp_path / "link/../out"),
        ):
            raise AssertionError("the run began")
    with (
        pytest.raises(ProblemReport, match="the merge writes a file of its own there"),
        record_run("s3://bucket/out/raymoe.json", "s3a://bucket/out"),
    ):
        raise AssertionError("the run began")
    with record_run(str(tmp_path / "out/result.json"), tmp_path / "out"):
        pass


def test_the_outputs_own_result_follows_no_link(tmp_path: Path) -> None:
    """A link to an earlier result is replaced, a link to anything else is kept; what they lead to stays."""
    out, own = tmp_path / "out", tmp_path / "out/result.json"
    out.mkdir()
    for content in ('{"exit_reason": "failed", "raymoe_version": "1"}', "mine"):
        (tmp_path / "elsewhere").write_text(content)
        own.unlink(missing_ok=True)
        own.symlink_to("../elsewhere")
        with record_run(None) as report:
            report.output = Location.parse(out)
        assert (tmp_path / "elsewhere").read_text() == content
        assert own.is_symlink() == (content == "mine")


def written_as(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced, written to or renamed; not the time of the last read."""
    stat = path.stat()
    return stat.st_ino, stat.st_dev, stat.st_mode, stat.st_nlink, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@pytest.mark.parametrize("content", ["mine", '{"exit_reason": "done"}', "pipe", "folder"])
@pytest.mark.parametrize("was_complete", [False, True])
def test_the_users_own_file_in_the_output_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, was_complete: bool
) -> None:
    """A file of the name `result.json` need not be of raymoe. One line says that it is kept."""
    own = tmp_path / "result.json"
    if content == "pipe":
        os.mkfifo(own)
    elif content == "folder":
        own.mkdir()
    else:
        own.write_text(content)
    before = written_as(own)
    with record_run(None) as report:
        report.output, report.plan_digest, report.was_complete = Location.parse(tmp_path), "plan", was_complete
    assert written_as(own) == before
    assert not own.is_file() or own.read_text() == content
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {own} is not a result of raymoe, so it is kept")


def test_the_users_own_object_in_the_output_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://own-result/out"
    store = open_store(url, StorageOptions())
    store.put(f"{url}/result.json", b"mine")
    with record_run(None) as report:
        report.output = Location.parse(url)
    assert store.read_all(f"{url}/result.json") == b"mine"
    assert "is not a result of raymoe, so it is kept" in capsys.readouterr().err
    store.delete(f"{url}/result.json")
    with record_run(None) as report:
        report.output = Location.parse(url)
    assert json.loads(store.read_all(f"{url}/result.json"))["exit_reason"] == "done"


def test_objects() -> None:
    url = "memory://results/run.json"
    store = open_store(url, StorageOptions())
    with record_run(url) as report:
        report.check_result_location()
    with record_run(url) as report:
        report.check_result_location()
    assert json.loads(store.read_all(url))["exit_reason"] == "done"
    store.put(url, b"mine")
    with pytest.raises(ProblemReport, match="not the result of a run is there already"), record_run(url) as report:
        report.check_result_location()
    with pytest.raises(MergeFailed), record_run(url):
        raise MergeFailed("before the place was looked at")
    assert store.read_all(url) == b"mine"


@pytest.mark.parametrize(
    "place", ["https://host.test/run.json", "hf://org/name/run.json", "s3:/bucket/run.json", "s4://b/r"]
)
def test_places_that_no_result_can_be_at(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProblemReport, match="--result"), record_run(place):
        raise AssertionError("the run began")
    assert not list(tmp_path.iterdir())


def test_a_run_that_knows_no_output_writes_nothing() -> None:
    with record_run(None) as report:
        assert isinstance(report, RunReport)
