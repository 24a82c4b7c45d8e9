"""The journal's states, its lock, and writers that outlive the run that they wrote for."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raymoe.errors import MergeFailed, ProblemReport
from raymoe.object_store.options import StorageOptions
from raymoe.sources.facts import SourceFile
from raymoe.sources.local_folder import fingerprints_differ, stat_file
from raymoe.storage.local_journal import Journal, source_fingerprints
from raymoe.storage.outputs.fsspec import StreamOutput
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.protocol import Output


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
    journal.begin("plan A", {"/a": "1"})
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
    journal.begin("plan", {"/same": "1", "/changed": "1", "/gone": "1"})
    assert journal.changed_sources({"/same": "1", "/changed": "2", "/new": "1"}) == ["/changed"]
    journal.release()


def test_source_stamps(tmp_path: Path) -> None:
    """Files that are here; neither those of the Hub nor those of another machine."""
    file = tmp_path / "model.safetensors"
    file.touch()
    os.utime(file, ns=(5, 123_456_789))
    locations = [str(file), "hf://org/name@0123/model.safetensors", str(tmp_path / "none")]
    stamps = source_fingerprints(SourceFile(location=location, size=0) for location in locations)
    assert stamps.keys() == {str(file)}
    older = f"123456789:{stamps[str(file)].rpartition(':')[2]}"  # of an older raymoe, which named no node
    assert "[123456789]" in stamps[str(file)] and not fingerprints_differ(older, stamps[str(file)])


@pytest.mark.parametrize("kind", [LocalOutput, StreamOutput])
def test_a_source_that_is_replaced_by_one_of_the_same_time(
    tmp_path: Path, kind: type[LocalOutput | StreamOutput]
) -> None:
    """As in images, in Nix's store and from `cp -p`: a link that is set to another version, a file written over."""
    for version in ("v1", "v2"):
        (tmp_path / version).write_bytes(version.encode() * 1000)
        os.utime(tmp_path / version, (315_532_800, 315_532_800))
    (tmp_path / "link").symlink_to("v1")

    def stamps() -> dict[str, str]:
        found = stat_file(str(tmp_path / "link"))
        assert found is not None
        return source_fingerprints([found])

    if kind is LocalOutput:
        output: Output = LocalOutput(tmp_path / "out")
    else:
        output = StreamOutput(f"memory://{tmp_path.name}/out", StorageOptions())
    output.lock()
    output.begin("plan", stamps(), fresh=False)
    assert output.changed_sources(stamps()) == []
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("v2")
    assert output.changed_sources(stamps()) == [str(tmp_path / "link")]
    output.release()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"digest": 3}'])
def test_unreadable_plan_is_of_no_plan(tmp_path: Path, text: str) -> None:
    """Half a file (a full disk, another program) is never taken for the plan at hand."""
    (tmp_path / ".raymoe").mkdir()
    (tmp_path / ".raymoe/plan.json").write_text(text)
    journal = Journal(tmp_path, "run")
    assert journal.exists
    assert journal.digest() != "plan A"
    assert not journal.is_of_this_run
    assert journal.changed_sources({"/a": "1"}) == []


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
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.outputs.fsspec import StreamOutput

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


@pytest.mark.processes
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

    with pytest.raises(MergeFailed, match="another run has taken over"):
        late.write("shard", [b"plan A's bytes"])
    assert not (tmp_path / "shard").exists()

    def slow(last: LocalOutput) -> Iterator[bytes]:
        yield b"plan B's "
        last.journal.release()
        begun(tmp_path, "plan C").journal.release()
        yield b"bytes"

    with pytest.raises(MergeFailed, match="another run has taken over"):
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


# --- looking at the lock, and links in the place of the journal


def test_a_process_that_looks_stops_no_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`raymoe plan CONFIG OUT` holds the lock for a moment, shared; a merge that starts in that moment tries again."""
    import fcntl

    begun(tmp_path).journal.release()
    looker = os.open(tmp_path / ".raymoe/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looker, fcntl.LOCK_SH)
    flock, tried = fcntl.flock, []

    def counted(descriptor: int, how: int) -> None:
        tried.append(how)
        flock(descriptor, how)
        if how == fcntl.LOCK_UN:  # the merge has seen that a process only looks; now that goes
            flock(looker, fcntl.LOCK_UN)

    monkeypatch.setattr(fcntl, "flock", counted)
    journal = Journal(tmp_path)
    assert not journal.is_taken, "neither does one that looks stop another"
    flock(looker, fcntl.LOCK_SH)
    tried.clear()
    journal.lock()
    assert tried.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 2
    journal.release()
    os.close(looker)


def test_lock_is_not_tried_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    begun(tmp_path).journal.release()
    looker = os.open(tmp_path / ".raymoe/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looker, fcntl.LOCK_SH)
    monkeypatch.setattr("raymoe.storage.local_journal._LOCK_PROBE_TIMEOUT_S", 0.0)
    with pytest.raises(ProblemReport, match="another merge is writing to this folder"):
        Journal(tmp_path).lock()
    os.close(looker)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
@pytest.mark.parametrize("name", ["", "lock", "plan.json", "parts", "done"])
def test_links_are_refused(tmp_path: Path, name: str, target: str) -> None:
    """What is done to the journal would be done elsewhere. A link to nothing is no reason to try again and again."""
    root, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (root / ".raymoe").mkdir(parents=True)
    (elsewhere / "done").mkdir(parents=True)
    (elsewhere / "done/precious").write_text("mine")
    if not name:
        (root / ".raymoe").rmdir()
    link = root / ".raymoe" / name if name else root / ".raymoe"
    link.symlink_to(tmp_path / target)
    output = LocalOutput(root)
    (problem,) = output.problems(digest="plan A", output_bytes=0, overwrite=True)
    assert (problem.where, problem.what) == (str(link), "this is a link")
    with pytest.raises(ProblemReport, match="this is a link"):
        output.lock()
    output.release()
    assert (elsewhere / "done/precious").read_text() == "mine"
    assert sorted(os.listdir(elsewhere)) == ["done"]


# --- what fails, or dies, at the calls of the journal


RECORD = b'{"plan_digest": "plan A", "files": {"model.safetensors.index.json": {"size": 2}}}'


class Died(BaseException):
    """Nothing catches it, as nothing runs any more after SIGKILL."""


def each_call(
    names: tuple[str, ...],
    error: BaseException,
    prepare: Callable[[int], LocalOutput],
    step: Callable[[LocalOutput], None],
) -> int:
    """`step(prepare(n))` with call number n of these functions of `os` raising `error` in the step, for each n that
    there is. After a death no call goes through any more."""
    number = 0
    while True:
        calls = 0

        def failing(real: Callable[..., object], number: int = number) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal calls
                calls += 1
                if calls > number and (isinstance(error, Died) or calls == number + 1):
                    raise error
                return real(*arguments, **named)

            return call

        output = prepare(number)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Died):
            for name in names:
                patch.setattr(os, name, failing(getattr(os, name)))
            step(output)
        if calls <= number:
            return number
        number += 1


def test_killed_at_any_call_of_its_beginning(tmp_path: Path) -> None:
    """Also between writing `plan.json` and moving it to its place: the next run leaves nothing of it."""

    def prepare(number: int) -> LocalOutput:
        (tmp_path / f"{number}").mkdir()
        return LocalOutput(tmp_path / f"{number}")

    def begin(output: LocalOutput) -> None:
        try:
            output.lock()
            output.begin("plan A", {}, fresh=False)
        finally:
            descriptor, output.journal._lock = output.journal._lock, None
            if descriptor is not None:
                os.close(descriptor)

    count = each_call(("replace", "fsync", "mkdir", "unlink", "rename", "rmdir"), Died(), prepare, begin)
    assert count > 4
    for number in range(count):
        output = LocalOutput(tmp_path / f"{number}")
        assert output.problems(digest="plan A", output_bytes=0, overwrite=False) == []
        output.lock()
        output.begin("plan A", {}, fresh=False)
        output.write("shard", [b"bytes"])
        output.journal.end()
        assert os.listdir(output.root) == ["shard"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_end_that_fails(tmp_path: Path, code: int) -> None:
    """The merge is whole, and its journal can't be removed: one message, and the same command removes the rest."""
    said: list[str] = []

    def prepare(number: int) -> LocalOutput:
        output = begun(tmp_path / f"{number}")
        output.write("model.safetensors.index.json", [b"{}"])
        output.write("raymoe.json", [RECORD])
        return output

    def end(output: LocalOutput) -> None:
        try:
            output.end(RECORD)
        except MergeFailed as error:
            said.append(str(error))
        output.release()

    count = each_call(("unlink", "rename", "rmdir"), OSError(code, os.strerror(code)), prepare, end)
    assert said and all("the merge is whole, but its journal could not be removed: " in text for text in said)
    for number in range(count):
        output = LocalOutput(tmp_path / f"{number}")
        assert output.problems(digest="plan A", output_bytes=0, overwrite=False) == []
        output.clean_up()
        assert sorted(os.listdir(output.root)) == ["model.safetensors.index.json", "raymoe.json"]


def test_release_that_fails(tmp_path: Path) -> None:
    """What ended the merge is what the user is to hear of; the lock is free in any case."""

    def prepare(number: int) -> LocalOutput:
        output = begun(tmp_path / f"{number}")
        output.journal.new_part("shard").write_bytes(b"half")
        return output

    def release(output: LocalOutput) -> None:
        output.release()
        assert not LocalOutput(output.root).journal.is_taken

    names = ("unlink", "rename", "rmdir")
    assert each_call(names, OSError(errno.EIO, "Input/output error"), prepare, release) > 1
    for path in tmp_path.iterdir():
        LocalOutput(path).lock()


@pytest.mark.parametrize("older", [False, True], ids=["of today", "of an older raymoe"])
def test_a_source_that_is_replaced_while_the_machine_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """As containers do. Its samples may be the same, so its time decides, whatever the name is."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1 << 20))
    file = SourceFile(location=str(path), size=1 << 20)
    (before,) = source_fingerprints([file]).values()
    if older:
        before = f"{path.stat().st_mtime_ns}:{before.rpartition(':')[2]}"
    monkeypatch.setattr("socket.gethostname", lambda: "another-pod")
    (now,) = source_fingerprints([file]).values()
    assert not fingerprints_differ(before, now)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    (now,) = source_fingerprints([file]).values()
    assert fingerprints_differ(before, now)
