"""The journal's states, its lock, and writers that outlive the run that they wrote for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymoe.errors import MergeFailed, ProblemReport
from raymoe.sources.types import SourceFile
from raymoe.storage.journal import Journal, source_stamps
from raymoe.storage.local import LocalOutput


def begun(root: Path, digest: str = "plan A") -> LocalOutput:
    """An output whose coordinator is at work."""
    root.mkdir(exist_ok=True)
    output = LocalOutput(root)
    output.journal.lock()
    output.journal.begin(digest, {})
    return output


def test_states(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert (journal.exists, journal.digest()) == (False, None)
    journal.lock()
    assert not journal.exists, "a lock alone is no unfinished merge"
    journal.begin("plan A", {"/a": 1})
    assert (journal.exists, journal.digest(), journal.is_of_this_run) == (True, "plan A", True)
    seen = Journal(tmp_path)
    assert (seen.exists, seen.digest(), seen.is_of_this_run) == (True, "plan A", False)
    assert Journal(tmp_path, journal.run).is_of_this_run
    journal.release()
    assert journal.exists, "an unfinished merge stays one"
    journal.lock()
    journal.begin("plan A", {})
    journal.end()
    assert not journal.exists
    assert not (tmp_path / ".raymoe").exists()


def test_changed_sources(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.lock()
    journal.begin("plan", {"/same": 1, "/changed": 1, "/gone": 1})
    assert journal.changed_sources({"/same": 1, "/changed": 2, "/new": 1}) == ["/changed"]
    journal.release()


def test_source_stamps(tmp_path: Path) -> None:
    """Files that are here; neither those of the Hub nor those of another machine."""
    file = tmp_path / "model.safetensors"
    file.touch()
    os.utime(file, ns=(5, 123_456_789))
    locations = [str(file), "hf://org/name@0123/model.safetensors", str(tmp_path / "none")]
    stamps = source_stamps(SourceFile(location=location, size=0) for location in locations)
    assert stamps == {str(file): 123_456_789}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"digest": 3}'])
def test_unreadable_plan_is_of_no_plan(tmp_path: Path, text: str) -> None:
    """Half a file (a full disk, another program) is never taken for the plan at hand."""
    (tmp_path / ".raymoe").mkdir()
    (tmp_path / ".raymoe/plan.json").write_text(text)
    journal = Journal(tmp_path, "run")
    assert journal.exists
    assert journal.digest() != "plan A"
    assert not journal.is_of_this_run
    assert journal.changed_sources({"/a": 1}) == []


def test_lock_is_for_one(tmp_path: Path) -> None:
    first = begun(tmp_path)
    with pytest.raises(ProblemReport, match="another merge is writing to this folder"):
        Journal(tmp_path).lock()
    assert first.journal.is_of_this_run, "the second one's try has changed nothing"
    assert Journal(tmp_path).is_taken and not first.journal.is_taken
    (problem,) = LocalOutput(tmp_path).problems(digest="plan A", output_bytes=0, overwrite=True)
    assert problem.what == "another merge is writing to this folder"
    first.journal.release()
    second = Journal(tmp_path)
    assert not second.is_taken
    second.lock()
    second.release()


_HOLDER = """
import sys, time
from pathlib import Path
from raymoe.storage.local import LocalOutput

output = LocalOutput(Path(sys.argv[1]))
output.journal.lock()
output.journal.begin("plan A", {})
output.write("whole.bin", [b"whole"])
output.journal.new_part("model.safetensors").write_bytes(b"half")
print("at work", flush=True)
time.sleep(100)
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun a merge, finished one file and half of another."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"at work\n"
    yield process
    process.kill()
    process.communicate()


def test_a_killed_process(other_process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Its lock goes with it, the next run removes its half-written file, and the finished one is kept."""
    journal = Journal(tmp_path)
    with pytest.raises(ProblemReport, match="another merge"):
        journal.lock()
    other_process.kill()
    other_process.wait()
    journal.lock()
    (half,) = (tmp_path / ".raymoe/parts").rglob("model.safetensors.*")
    journal.begin("plan A", {})
    assert not half.exists()
    assert LocalOutput(tmp_path).finished("whole.bin", 5) is not None
    journal.release()


def test_lock_file_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge ends, and removes its lock file, between another's opening of that file and its taking of the lock."""
    import fcntl

    first = begun(tmp_path)
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.journal.end()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Journal(tmp_path)
    (tmp_path / ".raymoe").mkdir(exist_ok=True)
    try:
        second.lock()
    except FileNotFoundError:
        pytest.fail("the folder went together with the lock of the merge that ended")
    with pytest.raises(ProblemReport, match="another merge"):
        Journal(tmp_path).lock()
    second.release()


def test_begin_needs_the_lock(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="under its lock"):
        Journal(tmp_path).begin("plan", {})


def test_two_attempts_at_a_file_do_not_meet(tmp_path: Path) -> None:
    """An actor is lost and not dead: it still writes the shard that its replacement has begun."""
    output = begun(tmp_path)
    lost, replacement = (LocalOutput(tmp_path, output.journal.run) for _ in range(2))

    def slow() -> Iterator[bytes]:
        yield b"first half, "
        # Now the replacement writes the whole file, and the lost actor goes on.
        assert replacement.write("shard", [b"first half, ", b"second half"]) is not None
        yield b"second half"

    record = lost.write("shard", slow())
    assert (tmp_path / "shard").read_bytes() == b"first half, second half"
    assert output.finished("shard", record.size) == record
    output.journal.end()


def test_late_writer_of_another_run(tmp_path: Path) -> None:
    """The driver was killed and its actor lives on, while the next run has begun, perhaps with another plan."""
    first = begun(tmp_path)
    late = LocalOutput(tmp_path, first.journal.run)
    first.journal.release()
    second = begun(tmp_path, "plan B")

    with pytest.raises(MergeFailed, match="another run of this merge has taken over"):
        late.write("shard", [b"plan A's bytes"])
    assert not (tmp_path / "shard").exists()

    def slow(last: LocalOutput) -> Iterator[bytes]:
        yield b"plan B's "
        last.journal.release()
        begun(tmp_path, "plan C").journal.release()
        yield b"bytes"

    with pytest.raises(MergeFailed, match="another run of this merge has taken over"):
        LocalOutput(tmp_path, second.journal.run).write("shard", slow(second))
    assert not (tmp_path / "shard").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".raymoe"]


def test_killed_while_it_ends(tmp_path: Path) -> None:
    """`plan.json` goes first: what is left of a journal after that is none."""
    output = begun(tmp_path)
    output.write("shard", [b"bytes"])
    output.journal.release()
    (tmp_path / ".raymoe/plan.json").unlink()
    assert not Journal(tmp_path).exists
