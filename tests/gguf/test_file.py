"""The file is at its place when it is whole, and not before, however the run ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raymoe.errors import ProblemReport
from raymoe.gguf import GgufOptions, write_gguf
from raymoe.gguf.file import new_file, output_without_room
from raymoe.gguf.model import _PlannedParts
from tests.cli.commands import write_config
from tests.pico import merge_config


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_killed_while_writing(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Only the part is left, and the next run writes it anew."""
    file = tmp_path / "model.gguf"
    code = (
        "import os, pathlib, signal, sys\n"
        "from raymoe.gguf.file import new_file\n"
        "with new_file(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.append(bytes(100))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run(code, file).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.part"]
    written = write_gguf(zoo("llama"), file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert file.read_bytes()[:4] == b"GGUF" and written.size == file.stat().st_size


def test_stopped_while_writing(tmp_path: Path) -> None:
    def write() -> None:
        with new_file(tmp_path / "model.gguf") as file:
            file.append(bytes(100))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_write_one_file(zoo: Callable[..., Path], tmp_path: Path) -> None:
    with new_file(tmp_path / "model.gguf") as file:
        file.append(b"first")
        with pytest.raises(ProblemReport, match="another run is writing this file"):
            write_gguf(zoo("llama"), tmp_path / "model.gguf")
        assert file.part.read_bytes() == b"first"
        file.commit()
    assert (tmp_path / "model.gguf").read_bytes() == b"first"


def test_the_part_is_held_while_gates_are_computed(
    zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run of the config is refused before it computes any."""
    base = zoo("llama", num_hidden_layers=1)
    config = write_config(
        tmp_path / "merge.yaml", merge_config(base, [base, zoo("llama", seed=1, num_hidden_layers=1)])
    )
    file, prepare, refused = tmp_path / "model.gguf", _PlannedParts.prepare, []

    def second(parts: _PlannedParts, tell: Callable[[str], None]) -> None:
        monkeypatch.setattr(_PlannedParts, "prepare", prepare)
        with pytest.raises(ProblemReport, match="another run is writing this file") as report:
            write_gguf(config, file, GgufOptions(device="cpu"))
        refused.append(report)
        prepare(parts, tell)

    monkeypatch.setattr(_PlannedParts, "prepare", second)
    assert write_gguf(config, file, GgufOptions(device="cpu")).path == file
    assert len(refused) == 1 and file.read_bytes()[:4] == b"GGUF"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a filesystem whose files have one name each."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    path = tmp_path / "model.gguf"
    with pytest.raises(ProblemReport, match=r"this file is there already\n.*--overwrite replaces it"):
        _written(path, came=b"somebody's")
    assert path.read_bytes() == b"somebody's"
    _written(path, came=b"somebody's", overwrite=True)
    assert path.read_bytes() == b"ours"
    path.unlink()
    _written(path, came=None)
    assert path.read_bytes() == b"ours"
    assert [left.name for left in tmp_path.iterdir()] == ["model.gguf"]


def _written(path: Path, *, came: bytes | None, overwrite: bool = False) -> None:
    """`came` is what another program writes there before the file is whole."""
    with new_file(path, overwrite=overwrite) as file:
        file.append(b"ours")
        if came is not None:
            path.write_bytes(came)
        file.commit()


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_no_room(tmp_path: Path) -> None:
    (problem,) = output_without_room(tmp_path / "model.gguf", 10**18)
    assert "not enough disk: 1,000,000,000,000,000,000 bytes are to be written" in problem.what


def test_a_limit_that_is_met_while_writing(zoo: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from raymoe.cli import main\n"
        "main()\n"
    )
    done = run(code, "gguf", zoo("llama"), tmp_path / "model.gguf")
    assert done.returncode == 2
    assert "model.gguf: it can't be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())
