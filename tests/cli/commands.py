"""Running `raymoe` as a user does, and looking at what a merge left."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["command", "files_below", "finished_shards", "hashes", "raymoe", "start", "wait_until", "write_config"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "raymoe", *map(str, arguments)]


def raymoe(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Fails on a traceback, which no user should see."""
    done = subprocess.run(
        command(*arguments), env=env, cwd=cwd, capture_output=True, text=True, timeout=180, check=False, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def start(*arguments: object, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for what tells of one run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "result.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def files_below(folder: Path) -> list[Path]:
    """Its files, links left out, where a process may be at work in it: what goes while this looks is passed over."""
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def finished_shards(output: Path) -> list[str]:
    """Names of the files that the journal of a running (or interrupted) merge calls finished."""
    try:
        return [name.removesuffix(".json") for name in os.listdir(output / ".raymoe/done") if name.endswith(".json")]
    except FileNotFoundError:
        return []


def wait_until(condition: Callable[[], Any], what: str, processes: Sequence[subprocess.Popen[str]] = ()) -> Any:
    """Poll a condition. Fails after two minutes, and at once when a process ends that should make it true."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ended = [process for process in processes if process.poll() is not None]
        if value := condition():
            return value
        assert not ended, f"the command ended before {what}: {ended[0].communicate()}"
        time.sleep(0.002)
    raise AssertionError(f"not in two minutes: {what}")
