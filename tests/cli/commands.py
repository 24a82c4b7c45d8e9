"""Running `raymoe` as a user does, and looking at what a merge left.

raymoe("plan", config)                       to its end; in this process where that makes no difference
start("merge", config, out, env=...)         a process of its own, which a test may stop or kill
"""

from __future__ import annotations

import contextlib
import hashlib
import io
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
    """Run a command to its end. Fails on a traceback, which no user should see.

    A process of its own takes seconds to start. It is done without one where the command needs no Ray, or would use the
    cluster that this process is connected to, or merges run in this process (tests/runtime/in_process.py). On the
    cluster it works with one actor, unless the arguments say otherwise: each takes seconds to import what computes.
    """
    if str(arguments[0]) in ("merge", "verify") and _is_this_cluster(env) and "--actors" not in arguments:
        arguments = (*arguments, "--actors", "1")
    is_here = str(arguments[0]) in _WITHOUT_RAY or _merges_run_here() or _is_this_cluster(env)
    if not options and is_here:
        return _run_here([str(argument) for argument in arguments], os.environ if env is None else env, cwd)
    done = subprocess.run(
        command(*arguments), env=env, cwd=cwd, capture_output=True, text=True, timeout=180, check=False, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


_WITHOUT_RAY = frozenset({"plan", "inspect", "archs", "eval", "submit", "try"})


def _merges_run_here() -> bool:
    in_process: Any = sys.modules.get("tests.runtime.in_process")
    return in_process is not None and bool(in_process.is_in_this_process())


def _is_this_cluster(env: Mapping[str, str] | None) -> bool:
    import ray

    if env is None or not ray.is_initialized() or env.get("RAY_ADDRESS") != ray.get_runtime_context().gcs_address:
        return False
    return _of_ray(env) == _of_ray(os.environ)


def _of_ray(env: Mapping[str, str]) -> dict[str, str]:
    """What Ray reads of an environment, but for where its cluster is."""
    return {name: value for name, value in env.items() if name.startswith("RAY_") and name != "RAY_ADDRESS"}


def _run_here(arguments: list[str], env: Mapping[str, str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
    from raymoe.cli import run_command

    before, folder, argv = dict(os.environ), os.getcwd(), sys.argv
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or folder)
    sys.argv = ["raymoe", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    finally:
        sys.argv = argv
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(before)
    said, told = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(arguments, code, said, told)


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
    """Poll a condition. Fails after four minutes, and at once when a process ends that should make it true.

    A look takes at most a quarter of a core, so that what is waited for has the rest.
    """
    deadline = time.monotonic() + 240
    while (began := time.monotonic()) < deadline:
        ended = [process for process in processes if process.poll() is not None]
        if value := condition():
            return value
        assert not ended, f"the command ended before {what}: {ended[0].communicate()}"
        time.sleep(max(0.002, 3 * (time.monotonic() - began)))
    raise AssertionError(f"not in four minutes: {what}")
