"""Files of an evaluation: what can't be written is said before the work, and leaves nothing behind."""

from __future__ import annotations

import json
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raymoe.errors import ProblemReport
from raymoe.evaluation.output_files import check_writable, evaluation_input_paths, write_evaluation


def test_asking_leaves_no_file_and_no_change(tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "new.html"
    there.write_text("kept")
    check_writable({"--json": there, "--html": new})
    assert there.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [there]


def test_all_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProblemReport) as caught:
        check_writable({"--json": tmp_path, "--html": tmp_path / "gone" / "page.html"})
    assert f"--json {tmp_path}: this is a folder" in str(caught.value)
    assert "page.html: there is no such folder" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses new files even to root, /dev/full all bytes")
def test_what_permission_bits_do_not_tell() -> None:
    with pytest.raises(ProblemReport, match=r"--html /proc/page\.html: it can't be written"):
        check_writable({"--html": Path("/proc/page.html")})
    with pytest.raises(ProblemReport, match="/dev/full: it can't be written: No space left on device"):
        write_evaluation({"loss": {}}, Path("/dev/full"), None)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """As on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_there_is_no_room_for_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    write_evaluation({"loss": {}}, file, None)
    before = file.read_bytes()
    with (
        files_of_at_most(1 << 20),
        pytest.raises(ProblemReport, match=r"eval\.json: it can't be written: File too large"),
    ):
        write_evaluation({"text": "a" * (2 << 20)}, file, None)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_replaced_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    file, link = tmp_path / "real.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to("real.json")
    write_evaluation({"loss": {}}, link, None)
    assert link.is_symlink() and json.loads(file.read_text()) == {"loss": {}}
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(tmp_path.iterdir()) == [link, file]


def test_two_results_for_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (tmp_path / "a.json", tmp_path / "link" / "a.json"):
        with pytest.raises(ProblemReport, match=r"--html .*a\.json: --json would be written to this file too"):
            check_writable({"--json": tmp_path / "a.json", "--html": other})
    check_writable({"--json": Path("/dev/null"), "--html": Path("/dev/null")})


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    """The texts, task files, files of the merge and its sources' files, through links too; other files are."""
    out, base = tmp_path / "out", tmp_path / "base"
    for name in ("out/chat_templates", "base/weights"):
        (tmp_path / name).mkdir(parents=True)
    record = {
        "files": {"config.json": {}, "chat_templates/a.jinja": {}, "notes.md": {}},
        "sources": [{"owner": "base", "model": str(base), "adapter": None}, "nothing", {"owner": 1}],
    }
    (out / "raymoe.json").write_text(json.dumps(record))
    files = [
        "out/config.json",
        "out/chat_templates/a.jinja",
        "out/notes.md",
        "out/vocab.txt",
        "texts.jsonl",
        "own.yaml",
    ]
    files += ["base/weights/one.safetensors", "base/anything"]
    for name in files:
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    inputs = evaluation_input_paths(
        str(tmp_path / "link/out"), tmp_path / "texts.jsonl", f"arc_easy,{tmp_path}/own.yaml"
    )
    for number, name in enumerate([*files, "out/raymoe.json"]):
        (tmp_path / f"link{number}").symlink_to(name)
        for place in (tmp_path / name, tmp_path / "link" / name, tmp_path / f"link{number}"):
            with pytest.raises(ProblemReport, match=r"--json .*: this is .*, which would be replaced"):
                check_writable({"--json": place}, inputs)
    for name in ("out/eval.json", "out/page.html", "base/new.json", "other.json"):
        check_writable({"--json": tmp_path / name}, inputs)
    (out / "eval.json").write_text("an older one")
    check_writable({"--json": out / "eval.json"}, inputs)
    (out / "raymoe.json").write_text("[[")
    assert evaluation_input_paths(str(out), None, "arc_easy").folders == ()


@pytest.mark.parametrize("place", ["s3:/bucket/eval.json", "s3:eval.json", "http:/host/eval.json"])
def test_places_that_look_like_urls(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProblemReport, match="looks like a URL"):
        check_writable({"--json": Path(place)})
