"""Pushes that are cut short, and the same command again; merges that are pushed, cut short in either half."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import raymoe
from tests.cli.commands import hashes, start
from tests.cli.commands import raymoe as command
from tests.cli.conftest import Answer
from tests.publish.hub import WritableHub

Cli = Callable[..., Answer]
LAST = "model-00006-of-00006.safetensors"
FLAGS = ("--push-to-hub", "org/name", "--out-shard-size", "300K")


class Gate:
    """Lets `count` uploads through and holds the next one until it is opened."""

    def __init__(self, hub: WritableHub, count: int) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._hub, self._count = hub, count
        hub.before_upload = self._wait

    def _wait(self, count: int) -> None:
        if count >= self._count and not self.opened.is_set():
            self.reached.set()
            self.opened.wait(60)
            raise ConnectionError("who sent this is dead")

    def open(self) -> None:
        self.opened.set()
        self._hub.before_upload = lambda count: None


def kill_at(gate: Gate, *arguments: object, env: dict[str, str], how: int = signal.SIGKILL) -> str:
    """Run a command, kill it when the gate is reached, and return what it said."""
    process = start(*arguments, env=env)
    try:
        reached = gate.reached.wait(120)
        os.kill(process.pid, how)
        _, said = process.communicate(timeout=60)
        assert reached, said
    finally:
        gate.open()
    return said


def whole_objects(hub: WritableHub) -> set[str]:
    return {path.name for path in (hub.root / "storage/org/name").iterdir() if "." not in path.name}


def test_killed_in_the_upload(hub: WritableHub, merged: Path, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "home")
    kill_at(Gate(hub, 11), "push", merged, "org/name", env=env)
    assert hub.files("org/name").keys() == {".gitattributes"}  # nothing is seen of a push that has not ended
    there, before = whole_objects(hub), len(hub.uploads)
    assert there
    done = command("push", merged, "org/name", env=env)
    assert done.returncode == 0
    again = {upload.oid for upload in hub.uploads[before:]}
    assert again and not again & there
    files = hub.files("org/name")
    assert all(files[name] == path.read_bytes() for path in merged.iterdir() if (name := path.name).startswith("model"))


def test_stopped_by_hand(hub: WritableHub, merged: Path, tmp_path: Path) -> None:
    said = kill_at(Gate(hub, 3), "push", merged, "org/name", env=hub.environment(tmp_path / "home"), how=signal.SIGINT)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped; ")


def test_somebody_else_commits_meanwhile(hub: WritableHub, merged: Path, cli: Cli) -> None:
    hub.create("org/name")

    def commit() -> None:
        hub.before_commit = lambda: None
        hub.commit("org/name", "main", "a card of theirs", {"NOTES.md": b"theirs"}, {}, [])

    hub.before_commit = commit
    lost = cli("push", merged, "org/name")
    assert lost.code == 1
    assert "error: push to org/name: another commit changed the repository meanwhile; 6 of 6 shards are on" in lost.err
    before = len(hub.uploads)
    assert cli("push", merged, "org/name").code == 0
    assert len(hub.uploads) == before
    assert hub.files("org/name")["NOTES.md"] == b"theirs"


def when_first_uploaded(hub: WritableHub, do: Callable[[], object]) -> None:
    """Call `do` once, in the middle of a push."""

    def once(count: int) -> None:
        hub.before_upload = lambda count: None
        do()

    hub.before_upload = once


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is gone, and was not sent"),
        (b"short", "has 5 bytes, and had "),
        (b"same size", "is not the file that was merged: its SHA-256 is not that in raymoe.json"),
    ],
)
def test_a_shard_that_changes_meanwhile(
    hub: WritableHub, merged: Path, cli: Cli, tmp_path: Path, content: bytes | None, said: str
) -> None:
    """Another model's weights under this one's record would be told by nobody."""
    out = shutil.copytree(merged, tmp_path / "out")
    record, path = json.loads((out / "raymoe.json").read_text()), out / LAST
    for file, entry in record["files"].items():
        entry["checksum"] = f"sha256:{hashlib.sha256((out / file).read_bytes()).hexdigest()}"
    (out / "raymoe.json").write_text(json.dumps(record))
    whole = path.read_bytes()
    other = whole[:-1] + bytes([whole[-1] ^ 1]) if content == b"same size" else content
    when_first_uploaded(hub, lambda: path.unlink() if other is None else path.write_bytes(other))
    stopped = cli("push", out, "org/name")
    assert stopped.code == 1
    assert f"error: push to org/name: {path} {said}" in stopped.err
    assert "; 5 of 6 shards are on the Hub, and will not be sent again\n    -> let no merge write there" in stopped.err
    assert hub.files("org/name").keys() == {".gitattributes"}
    path.write_bytes(whole)
    assert cli("push", out, "org/name").code == 0


def test_a_small_file_that_goes_meanwhile(hub: WritableHub, merged: Path, cli: Cli, tmp_path: Path) -> None:
    out = shutil.copytree(merged, tmp_path / "out")
    assert cli("push", out, "org/name").code == 0
    hub.commit("org/name", "main", "another index", {"model.safetensors.index.json": b"{}"}, {}, [])
    index = out / "model.safetensors.index.json"
    hub.before_preupload = index.unlink
    stopped = cli("push", out, "org/name")
    assert stopped.code == 1
    assert f"error: push to org/name: {index} is gone, and was not sent; " in stopped.err
    assert "\n    -> let no merge write there during a push; put the file back" in stopped.err


def test_a_lost_answer_to_the_commit(hub: WritableHub, merged: Path, cli: Cli) -> None:
    """The commit is there, and the same command finds it."""
    hub.drop_commit_answers = True
    lost = cli("push", merged, "org/name")
    assert lost.code == 1
    assert "error: push to org/name: the Hub can't be reached" in lost.err
    hub.drop_commit_answers = False
    assert cli("push", merged, "org/name").err.splitlines()[-1].startswith("nothing to push")
    assert len(hub.history("org/name")) == 2


def test_merge_and_push_in_one(
    hub: WritableHub, config: Callable[..., Path], ray_env: dict[str, str], tmp_path: Path
) -> None:
    """Killed while it pushes: the same command goes straight to the push; then there is nothing left to do."""
    path, out, env = config(), tmp_path / "out", {**ray_env, **hub.environment(tmp_path / "home")}
    said = kill_at(Gate(hub, 2), "merge", path, out, *FLAGS, "--private", env=env)
    assert "done: " in said
    before = hashes(out)
    result = tmp_path / "result.json"
    again = command("merge", path, out, *FLAGS, "--private", "--result", result, env=env)
    assert again.returncode == 0
    assert again.stderr.splitlines()[0] == f"{out} holds this merge, finished: going on with the push"
    assert again.stderr.splitlines()[-1].startswith(f"pushed: {hub.url}/org/name/commit/")
    assert hashes(out) == before
    assert hub.written["org/name"].private
    report = json.loads(result.read_text())
    assert report["exit_reason"] == "done" and report["phases"]["push"]["end_s"] is not None
    last = command("merge", path, out, *FLAGS, env=env)
    assert last.returncode == 0
    assert last.stderr.splitlines()[-1].startswith("nothing to push")
    # Sources that were written since are not what is there.
    base = Path(yaml.safe_load(path.read_text())["base_model"]) / "model.safetensors"
    times, content = base.stat(), base.read_bytes()
    base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    newer = command("merge", path, out, *FLAGS, env=env)
    base.write_bytes(content)
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert newer.returncode == 2 and "made of other sources than are there now" in newer.stderr
    # Another merge's output is no reason to push it under this one's name.
    other = command("merge", config(experts_per_token=1), out, *FLAGS, env=env)
    assert other.returncode == 2 and "holds a finished merge" in other.stderr


def test_the_hub_is_asked_before_the_merge(
    hub: WritableHub, config: Callable[..., Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for arguments, said in (
        (("--push-to-hub", "other/name"), "is not a member of 'other'"),
        (("--push-to-hub", "name"), "'name' is not a repository name"),
        (("--private",), "--private: nothing is pushed"),
    ):
        refused = cli("merge", config(), out, *arguments)
        assert refused.code == 2 and said in refused.err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refuses the token" in cli("merge", config(), out, *FLAGS).err
    assert not out.exists()


def test_a_merge_that_can_t_be_done_makes_no_repository(
    hub: WritableHub, merged: Path, config: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "out")
    refused = cli("merge", config(), tmp_path / "out", *FLAGS)
    assert refused.code == 2 and "holds a finished merge" in refused.err
    refused = cli("merge", config(architecture="qwen3_moe"), tmp_path / "new", *FLAGS)
    assert refused.code == 2
    assert hub.written == {}


def test_from_python(hub: WritableHub, config: Callable[..., Path], without_ray: None, tmp_path: Path) -> None:
    from raymoe.api import merge_and_push
    from raymoe.publish.repository import PushTarget

    seen = []
    target = PushTarget(repo="org/name", message="From Python")
    pushed = merge_and_push(config(), tmp_path / "out", target, on_merged=seen.append)
    assert pushed.commit == hub.written["org/name"].heads["main"]
    assert [result.output for result in seen] == [str(tmp_path / "out")]
    assert raymoe.push(tmp_path / "out", "org/name").sent == ()
