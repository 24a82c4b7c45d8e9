"""A short soak: a merge to a bucket whose requests fail now and then, and which is killed."""

from __future__ import annotations

import itertools
import json
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.soak.cases import DIRECTIONS, TAKEOVER_DIRECTIONS, VARIANTS, make_cases

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("moto", "juicefs")
SEED, CHOSEN = 25, (19,)


def test_cases_depend_on_the_seed_alone_and_see_everything() -> None:
    cases = make_cases(90, 1, 0.05, SERVERS)
    assert make_cases(120, 1, 0.05, SERVERS)[:90] == cases
    assert make_cases(90, 2, 0.05, SERVERS) != cases
    plain = [case for case in cases if not case.takeover]
    assert len({(case.direction, case.server) for case in plain}) == len(DIRECTIONS) * len(SERVERS)
    killed = {(case.direction, case.server) for case in plain if case.kills}
    assert len(killed) == len(DIRECTIONS) * len(SERVERS)
    assert sum(1 for case in plain if case.kills) == 30


def test_a_third_of_the_cases_are_takeovers_in_all_ways() -> None:
    cases = make_cases(144, 1, 0.05, SERVERS)
    found = [(case.direction, case.server, case.takeover.way) for case in cases if case.takeover]
    assert len(found) == 48
    assert not any(case.kills for case in cases if case.takeover)
    by_requests = {"stopped", "held", "killed", "beside"}
    for direction, server in itertools.product(TAKEOVER_DIRECTIONS, SERVERS):
        ways = {way for *where, way in found if where == [direction, server]}
        assert ways == (by_requests - {"held"} if direction.endswith("local") else by_requests)


def test_the_other_plan_has_the_same_shards() -> None:
    """Of the same names and sizes: otherwise a run could not take one for the other."""
    for variant in VARIANTS:
        other = variant.with_other_experts
        assert sorted(other.experts) == sorted(variant.experts)
        assert all(mine != others for mine, others in zip(variant.experts, other.experts, strict=True))


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """soak(*words) runs the script in this process, which has imported what makes models, and returns its status."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["soak_storage.py", *words])
        status: int = runpy.run_path(str(ROOT / "scripts/soak_storage.py"))["main"]()
        return status

    yield run
    signal.signal(signal.SIGTERM, on_sigterm)


@pytest.mark.processes
def test_every_merge_of_a_short_soak_ends_right(
    soak: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--merges", "24", "--example-merges", "0", "--seed", str(SEED), "--jobs", "1"]
    words += [word for number in CHOSEN for word in ("--only", str(number))]
    status = soak(*words, "--logs", str(tmp_path), "--json", str(tmp_path / "counts.json"))
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert status == 0, capsys.readouterr().out + logs
    counts = json.loads((tmp_path / "counts.json").read_text())["counts"]["all"]
    assert counts["merges"] == len(CHOSEN)
    assert counts["identical"] + counts["clean error"] == len(CHOSEN)
    assert counts["kills"] > 0 and counts["faults"] > 0
