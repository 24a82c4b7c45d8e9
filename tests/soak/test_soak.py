"""A short soak: a merge to a bucket whose requests fail now and then, and which is killed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.cases import DIRECTIONS, TAKEOVER_DIRECTIONS, VARIANTS, make_cases

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("moto", "juicefs")
SEED, CHOSEN = 25, (4,)


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


@pytest.mark.processes
def test_every_merge_of_a_short_soak_ends_right(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/soak_storage.py", "--merges", "24", "--example-merges", "0", "--seed", str(SEED)]
    words += [word for number in CHOSEN for word in ("--only", str(number))]
    words += ["--logs", str(tmp_path), "--json", str(tmp_path / "counts.json"), "--jobs", "2"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr[-2000:] + logs
    counts = json.loads((tmp_path / "counts.json").read_text())["counts"]["all"]
    assert counts["merges"] == len(CHOSEN)
    assert counts["identical"] + counts["clean error"] == len(CHOSEN)
    assert counts["kills"] > 0 and counts["faults"] > 0
