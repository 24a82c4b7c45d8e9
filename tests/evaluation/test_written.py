"""Files of an evaluation: what can't be written is said before the work, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from raymoe.errors import ProblemReport
from raymoe.evaluation.written import check_writable, write_evaluation


def test_asking_leaves_no_file_and_no_change(tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "new.html"
    there.write_text("kept")
    check_writable({"--json": there, "--html": new})
    assert there.read_text() == "kept" and not new.exists()


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
