"""What lines of running work say: a share, a total, a rate, the time that is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.formatting import human_rate
from raymoe.progress_line import ProgressLine, _broken, token_layers
from raymoe.runtime.actor_status import Status
from raymoe.runtime.progress import Progress
from raymoe.runtime.scheduler import Outcome
from raymoe.storage.value_checks import WeightFindings
from tests.pico import merge_config

NOTHING = Status(
    bytes_written=0,
    bytes_copied_by_store=0,
    bytes_kept=0,
    gate_tokens=0,
    gate_tokens_planned=0,
    readings_counted=0,
    store_retries=0,
    store_requests=0,
    heartbeats={},
    peak_rss_bytes=0,
    peak_gpu_bytes=0,
    busy_with=(),
)


@pytest.fixture
def progress(zoo: Callable[..., Path]) -> Progress:
    config: dict[str, Any] = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="hidden")
    return Progress(raymoe.plan(config), verbosity=0)


def said(progress: Progress, now: float, *statuses: Status) -> str:
    progress._latest = dict(enumerate(statuses))
    return progress._reading_progress(Outcome(readings=3), now)


def test_before_prompts_are_counted(progress: Progress) -> None:
    assert said(progress, 0.0) == said(progress, 0.0, NOTHING) == "prompts of 3 experts: 0% read"


def test_share_rate_and_time_left(progress: Progress) -> None:
    at = replace(NOTHING, gate_tokens_planned=12_000, readings_counted=3)
    assert said(progress, 100.0, at) == "prompts: 0% read (0 of 12,000 tokens x layers)"
    read = replace(at, gate_tokens=3_000)
    assert said(progress, 110.0, read) == "prompts: 25% read (3,000 of 12,000 tokens x layers, 300/s, 30 s left)"
    read = replace(at, gate_tokens=12_000)
    assert said(progress, 140.0, read) == "prompts: 100% read (12,000 of 12,000 tokens x layers, 300/s, 0 s left)"


def test_a_total_that_is_not_known_yet(progress: Progress) -> None:
    """Two of three members' prompts have been counted, by two actors."""
    one = replace(NOTHING, gate_tokens_planned=5_000, readings_counted=1, gate_tokens=1_000)
    other = replace(NOTHING, gate_tokens_planned=3_000, readings_counted=1)
    assert said(progress, 0.0, one, other) == "prompts: 8% read (1,000 of about 12,000 tokens x layers)"


def test_an_actor_that_died_counts_from_zero(progress: Progress) -> None:
    at = replace(NOTHING, gate_tokens_planned=12_000, readings_counted=3, gate_tokens=6_000)
    said(progress, 0.0, at)
    assert said(progress, 10.0, NOTHING) == "prompts of 3 experts: 0% read"
    assert "(1,000 of 12,000 tokens x layers)" in said(progress, 20.0, replace(at, gate_tokens=1_000))
    assert "100/s, 1 min" not in said(progress, 30.0, replace(at, gate_tokens=2_000))
    assert "100/s" in said(progress, 30.0, replace(at, gate_tokens=2_000))


def test_share_rate_and_time_left_of_shards(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run has written counts for the share, not for the rate. The end has no share."""
    progress._total, progress._display._started = 10_000_000, 0.0

    def said(now: float, written: int, kept: int = 0, shards: int = 0) -> str:
        monkeypatch.setattr("raymoe.progress_line.time.monotonic", lambda: now)
        progress._latest = {0: replace(NOTHING, bytes_written=written)}
        outcome = Outcome(readings=3, bytes_kept=kept, shard_results=[None] * shards)
        return progress._line(outcome).split(" | ")[1]

    assert said(1.0, 0) == "written 0 B of 10 MB (0%)"
    assert said(11.0, 1_000_000) == "written 1 MB of 10 MB (10%, 100 kB/s, 2 min left)"
    assert said(21.0, 2_000_000, kept=4_000_000) == "written 6 MB of 10 MB (60%, 100 kB/s, 40 s left)"
    assert said(31.0, 6_000_000, kept=4_000_000) == "written 10 MB"
    assert said(31.0, 9_999_000, shards=progress._shards) == "written 10 MB"


def test_share_rate_and_time_left_of_routers(progress: Progress) -> None:
    progress._plan = replace(progress._plan, gates=replace(progress._plan.gates, layers=30))
    assert progress._fitting_progress(Outcome(layers_done=0), 0.0) == "routers: 0% computed (0 of 30 layers)"
    said = progress._fitting_progress(Outcome(layers_done=3), 6.0)
    assert said == "routers: 10% computed (3 of 30 layers, 0.5/s, 54 s left)"
    assert progress._fitting_progress(Outcome(layers_done=30), 60.0) == "routers: 100% computed (30 of 30 layers)"


def test_stages_of_one_total(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The share grows over all stages. A stage that has more work than was estimated does not pass its end."""
    clock = [0.0]
    monkeypatch.setattr("raymoe.progress_line.time.monotonic", lambda: clock[0])
    with ProgressLine("{:.0f} tokens".format, total=1000) as progress:
        for now, name, work, done in ((0, "read", 200, 300), (10, "hidden", 800, 100), (20, "renamed", None, 60)):
            clock[0] += now
            progress.stage(name, work)
            clock[0] += 10
            progress.add(done)
    assert capsys.readouterr().err.splitlines() == [
        "   10 s | read | 20% (200 tokens of 1000 tokens, 20 tokens/s, 40 s left)",
        "   20 s | hidden | 20% (200 tokens of 1000 tokens, 10 tokens/s, 80 s left)",
        "   30 s | hidden | 30% (300 tokens of 1000 tokens, 10 tokens/s, 70 s left)",
        "   50 s | renamed | 30% (300 tokens of 1000 tokens, 6 tokens/s, 2 min left)",
        "   60 s | renamed | 36% (360 tokens of 1000 tokens, 6 tokens/s, 2 min left)",
    ]


def test_a_unit_of_several_words_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("raymoe.progress_line.time.monotonic", lambda: clock[0])
    with ProgressLine(token_layers, total=4000) as progress:
        progress.stage("base", 4000)
        clock[0] = 10
        progress.add(1000)
    said = "   10 s | base | 25% (1,000 of 4,000 tokens x layers, 100/s, 30 s left)\n"
    assert capsys.readouterr().err == said


def test_rates_have_no_exponent() -> None:
    assert [human_rate(rate) for rate in (0.0123, 0.5, 3.14, 120.0, 1234.5)] == ["0.012", "0.5", "3.1", "120", "1,234"]


def test_a_narrow_terminal_breaks_lines_between_parts() -> None:
    line = "   10 s | written 747 MB | routers: 25% (1 of 4 layers, 0.12/s, 4 min left)"
    assert _broken(line, 80) == line
    assert _broken(line, 60).splitlines() == [
        "   10 s | written 747 MB",
        "     routers: 25% (1 of 4 layers, 0.12/s, 4 min left)",
    ]
    assert _broken(line, 30).splitlines()[1:] == [
        "     routers: 25% (1 of 4",
        "     layers, 0.12/s, 4 min",
        "     left)",
    ]


def test_many_findings_in_weights_stay_bounded(progress: Progress) -> None:
    """The warnings name tensors, however often an actor has told how many more there are."""
    found, statuses = WeightFindings(), []
    for number in range(150):
        for _ in range(2):  # a tensor counts once
            found.note(f"model.layers.{number:03}.weight", "NaN or infinity")
        statuses.append(replace(NOTHING, warnings=found.lines, warnings_left_out=found.omitted))
    restarted = replace(NOTHING, warnings=statuses[3].warnings)
    for status in (*statuses, restarted):
        progress._latest = {0: status}
        progress._account([], Outcome())
    *named, more = progress._weight_warnings()
    assert named == [f"model.layers.{number:03}.weight: NaN or infinity" for number in range(20)]
    assert more == "and about 130 more tensors like these"
    assert len(progress._warnings) == 100


def test_few_findings_are_counted_exactly(progress: Progress) -> None:
    progress._latest = {0: replace(NOTHING, warnings=tuple(f"{number:02}: NaN" for number in range(22)))}
    progress._account([], Outcome())
    assert progress._weight_warnings()[20:] == ["and 2 more tensors like these"]
