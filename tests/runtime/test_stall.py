"""Processes that stand still without being dead: it is said, their jobs are given to others, or the merge ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymoe.formatting import human_time
from raymoe.runtime.actor_status import Working, WorkKind
from raymoe.runtime.job_activity import ActiveJobs
from raymoe.runtime.stall import StallClock, Verdict
from tests.cli.commands import finished_shards, hashes, wait_until
from tests.processes import send
from tests.runtime.conftest import Merge, expert_actors


def test_moves_are_counted_by_job() -> None:
    work = ActiveJobs()
    shard, routers = Working(WorkKind.SHARD, ("model-00001",)), Working(WorkKind.ROUTERS)
    with (
        work.track(shard, "model-00001 from part 4") as one,
        work.track(routers),
        work.track(routers) as other,
    ):
        assert work.busy_with == (shard, routers, routers)
        one.heartbeat()
        one.heartbeat()
        other.heartbeat()
        assert work.heartbeats == {"model-00001 from part 4": 2, "routers": 1}
    assert work.busy_with == () and work.heartbeats == {}


def test_said_once_after_half_of_the_time_and_given_away_after_all_of_it() -> None:
    stall = StallClock(100)
    moves = stall.begin()

    def after(seconds: float, seen: object) -> Verdict:
        stall.now += seconds
        return stall.judge(moves, seen)

    assert after(49, None) is Verdict.FINE
    assert after(2, None) is Verdict.WARN
    assert after(2, None) is Verdict.FINE
    assert after(1, 7) is Verdict.FINE  # it has moved: all begins anew
    assert after(51, 7) is Verdict.WARN
    assert after(48, 7) is Verdict.FINE
    assert after(1, 7) is Verdict.REASSIGN


def test_no_time_passes_while_the_coordinator_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    stall = StallClock(100)
    moves, began = stall.begin(), stall.now
    monkeypatch.setattr("time.monotonic", lambda began=stall._looked_at: began + 3600)
    stall.look()
    assert 0 < stall.now - began <= 2
    assert stall.judge(moves, None) is Verdict.FINE


def test_times_for_people() -> None:
    assert [human_time(s) for s in (1.5, 3, 45.2, 600, 1200, 5400)] == [
        "1.5 s",
        "3 s",
        "45 s",
        "10 min",
        "20 min",
        "1 h 30 min",
    ]


def test_a_stopped_actor(many_shards: Merge, ray_env: dict[str, str], tmp_path: Path) -> None:
    """Its node is well and Ray does not miss it. The other actor does its work, and the bytes are the same."""
    out = tmp_path / "out"
    process = many_shards.start(out, ray_env, "--actors", "2", "--stall-timeout", "0.05")
    wait_until(lambda: len(finished_shards(out)) > 3, "the fourth shard", [process])
    stopped = expert_actors()[0]
    assert send(stopped.pid, signal.SIGSTOP)
    try:
        _, said = process.communicate(timeout=120)
    finally:
        send(stopped.pid, signal.SIGCONT)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert hashes(out) == many_shards.files
    lines = [line for line in said.splitlines() if "no progress for" in line]
    where = f"process {stopped.pid} on node "
    assert "no progress for 1.5 s (actor " in lines[0] and where in lines[0]
    assert "in 1.5 s that process is ended and another actor takes the job" in lines[0]
    assert any("no progress for 3 s" in line and where in line for line in lines)


@pytest.mark.parametrize("mode", ["hidden", "ridge"])
def test_reading_and_fitting_are_seen_to_move(zoo: Callable[..., Path], mode: str) -> None:
    """Each batch of prompts, each layer that is loaded, each system that is solved."""
    import raymoe
    from raymoe.gate_modes import MODES
    from raymoe.routers.activations import capture_layers
    from raymoe.sources.hub import HubOptions
    from raymoe.storage.source_reader import SourceReader
    from tests.pico import merge_config

    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode=mode, prompt_model="base")
    gates = raymoe.plan(config).gates
    work, reading = ActiveJobs(), Working(WorkKind.PROMPTS, ("expert 0",))
    seen = []
    with work.track(reading) as job, SourceReader(HubOptions(), heartbeat=job.heartbeat) as reader:
        layers = capture_layers(gates, gates.experts, reader, members=2, device="cpu")
        for left in layers:
            seen.append((job.heartbeats, left))
        counts = [count for count, _ in seen]
        assert counts == sorted(counts) and counts[0] > len(seen)
    if mode == "ridge":
        solved = SimpleNamespace(count=0)

        def moved() -> None:
            solved.count += 1

        MODES[mode].fit_layer(seen[0][1], [], "cpu", moved)
        assert solved.count > 5


def test_bytes_are_seen_to_move(tmp_path: Path) -> None:
    from raymoe.sources.facts import SourceFile
    from raymoe.sources.hub import HubOptions
    from raymoe.storage.source_reader import SourceReader

    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    file, moved = SourceFile(location=str(path), size=1 << 20), threading.Semaphore(0)
    with SourceReader(HubOptions(), heartbeat=moved.release) as reader:
        for number, _ in enumerate(reader.chunks(file, 0, 1 << 20)):
            assert moved.acquire(blocking=False), number


def test_the_check_of_a_finished_shard_is_seen_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor, and the writer of another node's shards, read what an earlier run left: each chunk counts."""
    import numpy as np

    from raymoe.runtime.job_activity import TrackedJob
    from raymoe.runtime.shard_transfer import ShardWriter
    from raymoe.sources.hub import HubOptions
    from raymoe.storage.outputs.local import LocalOutput
    from raymoe.storage.outputs.protocol import ShardJob
    from raymoe.storage.source_reader import SourceReader
    from tests.storage.plans import one_shard, save, tensor

    entry = save(tmp_path / "source", {"w": np.zeros(1 << 20, np.uint8)})["w"]
    job, output = ShardJob(shard=one_shard([tensor(entry)])), LocalOutput(tmp_path / "out")
    output.root.mkdir()
    output.journal.lock()
    output.journal.begin("plan", {})
    moves: list[object] = []
    monkeypatch.setattr(TrackedJob, "heartbeat", lambda job: moves.append(job))
    try:
        with SourceReader(HubOptions()) as reader:
            assert output.do(job, reader, lambda *moved: None) is not None
            assert output.do(job, reader, lambda *moved: moves.append(moved)) is None
        assert moves == [(0, 0)] * 5
        writer = ShardWriter.__new__(ShardWriter)
        writer._output, writer._active_jobs, writer._lock, writer._bytes_kept = (
            output,
            ActiveJobs(),
            threading.Lock(),
            0,
        )
        assert writer.receive(None, job) is None
        assert writer._bytes_kept == job.shard.nbytes and len(moves) == 10
    finally:
        output.journal.release()
