"""A short chaos run: a merge takes over from one of another plan, whose driver is dead and whose actor wakes up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.cases import KINDS, MOMENTS, make_case

ROOT = Path(__file__).resolve().parents[2]
STRUCK = ("actor", "node", "driver", "sigterm")
SERVERS = ("moto", "juicefs")
# Chosen for short merges, without a gate pass.
SEED, FIRST = 48109, 5


def test_cases_depend_on_the_seed_alone_and_see_everything() -> None:
    moments = {}
    for kind in STRUCK:
        cases = [make_case(kind, number, 1, SERVERS) for number in range(20)]
        assert cases == [make_case(kind, number, 1, SERVERS) for number in range(20)]
        assert cases != [make_case(kind, number, 2, SERVERS) for number in range(20)]
        assert {case.merge.server for case in cases} == {None, *SERVERS}
        assert {case.merge.variant.name for case in cases} >= {"ridge", "many shards", "wide"}
        moments[kind] = {moment.at for case in cases for moment in case.moments}
        assert len(moments[kind]) > 3
        if kind in ("driver", "sigterm"):
            assert {case.way for case in cases} >= {"command", "job"}
    assert set().union(*moments.values()) == set(MOMENTS)


def test_takeovers_see_all_outputs_and_ways() -> None:
    cases = [make_case("takeover", number, 1, SERVERS) for number in range(36)]
    assert cases == [make_case("takeover", number, 1, SERVERS) for number in range(36)]
    seen = {(case.merge.direction, case.takeover.way) for case in cases if case.takeover}
    assert len(seen) == 3 * 6
    assert {case.merge.server for case in cases} == {None, *SERVERS}
    assert {case.merge.direction for case in (make_case("takeover", n, 1, ()) for n in range(6))} == {"local to local"}


@pytest.mark.processes
def test_every_merge_of_a_short_chaos_run_ends_right(tmp_path: Path) -> None:
    kinds = ("takeover",)  # for the others: runtime/test_faults.py, test_resume.py and test_stop.py
    words = [sys.executable, "scripts/chaos.py", "--kinds", *kinds, "--count", "1", "--server", "", "--no-examples"]
    words += ["--seed", str(SEED), "--first", str(FIRST)]
    words += ["--logs", str(tmp_path), "--json", str(tmp_path / "counts.json")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr[-2000:] + logs
    cases = json.loads((tmp_path / "counts.json").read_text())["cases"]
    struck = {
        kind: [moment for case in cases if case["kind"] == kind for moment in case["struck_at"]] for kind in KINDS
    }
    assert all(struck[kind] for kind in kinds), struck
    assert all(case["verdict"] == "identical" and not case["left"] for case in cases)
