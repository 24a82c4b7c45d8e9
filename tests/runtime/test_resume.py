"""A merge that dies at any point is finished by the same command: same bytes, and finished shards are left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raymoe.errors import ProblemReport
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.plan import Shard
from tests.cli.commands import finished_shards, hashes, raymoe, wait_until
from tests.runtime.conftest import FLAGS, OPTIONS, SHARD_BYTES, Merge, expert_actors, kill

Run = Callable[..., Any]


def interrupted(merge: Merge, output: Path, env: dict[str, str], shards: int, *flags: str) -> None:
    """Run the command, and kill it when it has finished that many shards."""
    process = merge.start(output, env, *flags)
    try:
        wait_until(lambda: len(finished_shards(output)) >= shards, f"{shards} shards", [process])
    finally:
        kill(process)
        process.communicate()
    assert not (output / "raymoe.json").exists(), "the merge was over before it was killed"


def file_stamps(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every shard that the journal calls finished."""
    found = {name: os.stat(output / name) for name in finished_shards(output)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_killed_anywhere(
    many_shards: Merge, ray_env: dict[str, str], merge_in_process: Run, tmp_path: Path, seed: int
) -> None:
    """Killed at a random shard, twice; the second run and the third begin at once, while old actors may still write."""
    out, numbers = tmp_path / "out", random.Random(seed)
    first = numbers.randrange(1, len(many_shards.shards) // 2)
    interrupted(many_shards, out, ray_env, first)
    assert not (out / "model.safetensors.index.json").exists()
    interrupted(many_shards, out, ray_env, numbers.randrange(first + 1, len(many_shards.shards) - 5))
    before = file_stamps(out)
    result = merge_in_process(many_shards.config, out, OPTIONS)
    assert hashes(out) == many_shards.files
    assert result.bytes_kept >= sum((out / name).stat().st_size for name in before)


def test_finished_shards_are_kept_and_damaged_ones_are_not(many_shards: Merge, half: Path, without_ray: None) -> None:
    out = half
    before = file_stamps(out)
    flipped, shortened, removed = sorted(before)[:3]
    content = bytearray((out / flipped).read_bytes())
    content[-1] ^= 1
    (out / flipped).write_bytes(content)
    os.truncate(out / shortened, 100)
    (out / removed).unlink()
    done = raymoe("merge", many_shards.config, out, *FLAGS)
    assert done.returncode == 0
    assert "were there from an earlier run)" in done.stderr
    assert hashes(out) == many_shards.files
    for name, stamp in before.items():
        stat = os.stat(out / name)
        assert ((stat.st_ino, stat.st_mtime_ns) == stamp) == (name not in (flipped, shortened, removed)), name


@pytest.fixture(scope="module")
def unfinished(many_shards: Merge, ray_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unfinished") / "out"
    interrupted(many_shards, out, ray_env, 5)
    wait_until(lambda: not expert_actors(), "the end of the killed command's actors")
    return out


@pytest.fixture
def half(unfinished: Path, tmp_path: Path) -> Path:
    """An unfinished merge of its own for a test."""
    return Path(shutil.copytree(unfinished, tmp_path / "out"))


def test_another_plan_is_refused(many_shards: Merge, half: Path, merge_in_process: Run) -> None:
    before = hashes(half)
    other_seed, other_size = MergeOptions(max_shard_bytes=SHARD_BYTES, seed=1), MergeOptions(max_shard_bytes=30_000)
    for options in (other_seed, other_size):
        with pytest.raises(ProblemReport, match=r"unfinished merge of another plan .* is in this folder"):
            merge_in_process(many_shards.config, half, options)
    assert hashes(half) == before


def test_another_plan_with_overwrite(many_shards: Merge, half: Path, merge_in_process: Run, tmp_path: Path) -> None:
    other = MergeOptions(max_shard_bytes=SHARD_BYTES, model_card=False, seed=1)
    result = merge_in_process(many_shards.config, half, other, overwrite=True)
    assert result.bytes_kept == 0
    merge_in_process(many_shards.config, tmp_path / "fresh", other)
    assert hashes(half) == hashes(tmp_path / "fresh")
    assert hashes(half).keys() == many_shards.files.keys()
    assert hashes(half) != many_shards.files


def test_same_plan_with_overwrite_goes_on(many_shards: Merge, half: Path, merge_in_process: Run) -> None:
    result = merge_in_process(many_shards.config, half, OPTIONS, overwrite=True)
    assert result.bytes_kept > 0
    assert hashes(half) == many_shards.files


def test_changed_source(many_shards: Merge, zoo: Callable[..., Path], merge_in_process: Run, tmp_path: Path) -> None:
    """Sources of the same sizes and other weights: refused, and with --overwrite nothing of the old ones is left."""
    from tests.pico import merge_config

    models = [Path(shutil.copytree(zoo("llama", seed=n, dtype="bfloat16"), tmp_path / str(n))) for n in range(3)]
    config, out = merge_config(models[0], models[1:], mode="random"), tmp_path / "out"
    stop_after_two_shards(config, out, merge_in_process)
    shutil.copy(zoo("llama", seed=3, dtype="bfloat16") / "model.safetensors", models[0])
    with pytest.raises(ProblemReport, match=r"source files changed since .* interrupted: .*/0/model.safetensors"):
        merge_in_process(config, out, OPTIONS)
    result = merge_in_process(config, out, OPTIONS, overwrite=True)
    assert result.bytes_kept == 0
    merge_in_process(config, tmp_path / "fresh", OPTIONS)
    assert hashes(out) == hashes(tmp_path / "fresh")


def stop_after_two_shards(config: Any, out: Path, merge_in_process: Run) -> None:
    """An unfinished merge: the first two shards of the plan."""
    import raymoe

    plan = raymoe.plan(config, OPTIONS, allow_all_same=True)
    leave_shards(plan, plan.shards[:2], out)


def leave_shards(plan: MergePlan, shards: Sequence[Shard], out: Path) -> None:
    """What a run of a merge leaves that has finished these shards, made by the storage layer itself."""
    from raymoe.sources.hub import HubOptions
    from raymoe.storage.local_journal import source_fingerprints
    from raymoe.storage.outputs.local import LocalOutput
    from raymoe.storage.shard_stream import shard_chunks
    from raymoe.storage.source_reader import SourceReader

    output = LocalOutput(out)
    output.journal.lock()
    output.journal.begin(plan.digest, source_fingerprints(file for source in plan.sources for file in source.files))
    with SourceReader(HubOptions()) as reader:
        for shard in shards:
            output.write(shard.file_name, shard_chunks(shard, reader))
    output.journal.release()


def test_killed_before_anything_was_written(many_shards: Merge, merge_in_process: Run, tmp_path: Path) -> None:
    """What a merge leaves that dies in its very first steps does not need --overwrite."""
    (tmp_path / "out/.raymoe/parts").mkdir(parents=True)
    (tmp_path / "out/.raymoe/lock").touch()
    merge_in_process(many_shards.config, tmp_path / "out", OPTIONS)
    assert hashes(tmp_path / "out") == many_shards.files


def test_killed_in_the_last_steps(many_shards: Merge, half: Path, merge_in_process: Run, tmp_path: Path) -> None:
    """The record is written and the journal not yet removed, or only in part: nothing is left to do but that."""
    journal = tmp_path / "journal"
    shutil.copytree(half / ".raymoe", journal)
    merge_in_process(many_shards.config, half, OPTIONS)
    for gone in ((), ("plan.json",), ("plan.json", "lock")):
        shutil.copytree(journal, half / ".raymoe")
        for name in gone:
            (half / ".raymoe" / name).unlink()
        result = merge_in_process(many_shards.config, half, OPTIONS)
        assert result.was_complete and result.bytes_written == 0
        assert {file.name for file in result.files} | {"raymoe.json"} == many_shards.files.keys()
        assert hashes(half) == many_shards.files
        assert not (half / ".raymoe").exists()


def test_two_at_once(many_shards: Merge, ray_env: dict[str, str], merge_in_process: Run, tmp_path: Path) -> None:
    """The second is refused, --overwrite or not, and the first does not notice."""
    out = tmp_path / "out"
    first = many_shards.start(out, ray_env)
    try:
        wait_until(lambda: finished_shards(out), "the first shard", [first])
        os.kill(first.pid, signal.SIGSTOP)
        for options, overwrite in ((OPTIONS, False), (OPTIONS, True), (MergeOptions(seed=5), True)):
            with pytest.raises(ProblemReport, match="another merge is writing to this folder"):
                merge_in_process(many_shards.config, out, options, overwrite=overwrite)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert hashes(out) == many_shards.files


def test_a_merge_leaves_no_lock_where_it_was_refused(many_shards: Merge, merge_in_process: Run, tmp_path: Path) -> None:
    merge_in_process(many_shards.config, tmp_path / "out", OPTIONS)
    with pytest.raises(ProblemReport, match="holds a finished merge"):
        merge_in_process(many_shards.config, tmp_path / "out", MergeOptions(max_shard_bytes=30_000))
    assert not (tmp_path / "out/.raymoe").exists()
    assert json.loads((tmp_path / "out/raymoe.json").read_text())["files"].keys() | {"raymoe.json"} == set(
        os.listdir(tmp_path / "out")
    )
