"""The simulated S3 server, and merges that are measured against it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from bench_scale import Store, started_store  # noqa: E402
from simulated_s3 import Pace  # noqa: E402

pytestmark = pytest.mark.processes


def send(store: Store, path: str, method: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"{store.url}/{path}", method=method, headers=headers or {}, data=b"")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def copy_parts(store: Store, count: int, *, at_once: int) -> list[int]:
    """The statuses of copies of one range."""
    answer = send(store, "out/object?uploads", "POST")[1]
    upload = answer.partition("<UploadId>")[2].partition("<")[0]
    source = {
        "x-amz-copy-source": "models/0/model-00001-of-00001.safetensors",
        "x-amz-copy-source-range": f"bytes=0-{(5 << 20) - 1}",
    }

    def copy(number: int) -> int:
        return send(store, f"out/object?partNumber={number + 1}&uploadId={upload}", "PUT", source)[0]

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(copy, range(count)))


def test_the_server_asks_to_slow_down_above_a_rate_and_a_number_of_copies() -> None:
    with started_store("tiny", Pace(copies_per_second=5)) as store:
        statuses = copy_parts(store, 20, at_once=1)
        assert statuses[:5] == [200] * 5 and set(statuses) == {200, 503}
        assert store.ask("stats")["errors"] == {"UploadPartCopy 503": statuses.count(503)}
    with started_store("tiny", Pace(copies_at_once=4, copy_seconds=0.5)) as store:
        statuses = copy_parts(store, 16, at_once=16)  # where threads start late, the last may find room
        assert set(statuses) == {200, 503} and statuses.count(200) >= 4
        assert copy_parts(store, 4, at_once=4) == [200] * 4
        stats = store.ask("stats")
        assert stats["most_copies_in_flight"] == 4
        assert stats["copy_seconds"] >= 0.5 * (statuses.count(200) + 4)


def measure(results: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The entry of a run of the script, and what it printed."""
    command = [sys.executable, "scripts/bench_scale.py", "--shape", "tiny", "--shard-size", "50M", "--cpus", "1"]
    run = subprocess.run(
        [*command, "--json", str(results), *words], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    (entry,) = json.loads(results.read_text())
    return entry, run.stdout


def test_a_merge_is_measured_and_audited(tmp_path: Path) -> None:
    entry, said = measure(tmp_path / "scale.json", "--pace", "0.1", "--set", "max_requests=8")
    audit, operations = entry["audit"], entry["by_operation"]
    assert audit["problems"] == [] and audit["tensors"] == entry["output_tensors"] == 60
    assert audit["bytes_copied"] == entry["copied_bytes"] and audit["shards"] == operations["CompleteUpload"]
    assert operations["UploadPartCopy"] == entry["copies"] > 10
    assert sum(entry["by_object"].values()) == entry["requests"]
    assert 0 < entry["mean_copies_in_flight"] <= entry["most_copies_in_flight"] <= 16
    assert entry["phases"]["shards"] > entry["ideal_shards_s"] > 0
    assert 50e6 < entry["driver_bytes"] < 400e6 and len(entry["actor_bytes"]) >= 1
    assert "| tiny | 0 GB | 1 | max_requests: 8 (delays x0.1) |" in said


@pytest.mark.soak  # tests/runtime/test_resume.py has what a resumed merge keeps
def test_a_merge_is_killed_and_resumed(tmp_path: Path) -> None:
    entry, _ = measure(tmp_path / "scale.json", "--pace", "0.5", "--kill-at", "0.5")
    killed = entry["killed"]
    assert killed["audit"]["problems"] == [] and killed["copies_before"] >= entry["copies"] / 2
    assert killed["first_copy_s"] > 0 and killed["requests"] > entry["requests"]
