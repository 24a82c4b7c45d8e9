"""A short soak: every direction and server once, half of them killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.soak.cases import DIRECTIONS, make_cases

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("moto", "juicefs")


def test_cases_depend_on_the_seed_alone_and_see_everything() -> None:
    cases = make_cases(60, 1, 0.05, SERVERS)
    assert make_cases(90, 1, 0.05, SERVERS)[:60] == cases
    assert make_cases(60, 2, 0.05, SERVERS) != cases
    assert len({(case.direction, case.server) for case in cases}) == len(DIRECTIONS) * len(SERVERS)
    killed = {(case.direction, case.server) for case in cases if case.kills}
    assert len(killed) == len(DIRECTIONS) * len(SERVERS)
    assert sum(1 for case in cases if case.kills) == 30


def test_every_merge_of_a_short_soak_ends_right(tmp_path: Path) -> None:
    words = [sys.executable, "scripts/soak_storage.py", "--merges", "6", "--example-merges", "0"]
    words += ["--logs", str(tmp_path), "--json", str(tmp_path / "counts.json"), "--jobs", "2"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr[-2000:] + logs
    counts = json.loads((tmp_path / "counts.json").read_text())["counts"]["all"]
    assert counts["merges"] == 6
    assert counts["identical"] + counts["clean error"] == 6
    assert counts["kills"] > 0 and counts["faults"] > 0
