"""The file is at its place when it is whole, and not before, however the run ends."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.errors import ProblemReport
from raymoe.export.gguf import GgufOptions, write_gguf
from raymoe.export.gguf.input_model import _PlannedParts
from raymoe.export.gguf.staging_file import disk_space_problems, open_staging_file, output_path
from tests.cli.commands import write_config
from tests.pico import copy_model, merge_config


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.processes
def test_killed_while_writing(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Only the part is left, and the next run writes it anew."""
    file = tmp_path / "model.gguf"
    code = (
        "import os, pathlib, signal, sys\n"
        "from raymoe.export.gguf.staging_file import open_staging_file\n"
        "with open_staging_file(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.append(bytes(100))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run(code, file).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.raymoe-part"]
    written = write_gguf(zoo("llama"), file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert file.read_bytes()[:4] == b"GGUF" and written.size == file.stat().st_size


def test_a_name_is_given_to_what_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the file, then its name."""
    path, real, synced = tmp_path / "model.gguf", os.fsync, dict[int, bool]()

    def fsync(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = path.exists()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with open_staging_file(path) as file:
        file.append(bytes(100))
        file.commit()
    assert [synced.get(each.stat().st_ino) for each in (path, tmp_path)] == [False, True]


def test_stopped_while_writing(tmp_path: Path) -> None:
    def write() -> None:
        with open_staging_file(tmp_path / "model.gguf") as file:
            file.append(bytes(100))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_write_one_file(zoo: Callable[..., Path], tmp_path: Path) -> None:
    with open_staging_file(tmp_path / "model.gguf") as file:
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

    def second(parts: _PlannedParts) -> None:
        monkeypatch.setattr(_PlannedParts, "prepare", prepare)
        with pytest.raises(ProblemReport, match="another run is writing this file") as report:
            write_gguf(config, file, GgufOptions(device="cpu"))
        refused.append(report)
        prepare(parts)

    monkeypatch.setattr(_PlannedParts, "prepare", second)
    assert write_gguf(config, file, GgufOptions(device="cpu")).path == file
    assert len(refused) == 1 and file.read_bytes()[:4] == b"GGUF"
    assert not list(tmp_path.glob("*part"))


def test_a_part_of_another_program_stays(tmp_path: Path) -> None:
    """Browsers call half a download so; also where the run is refused."""
    download, file = tmp_path / "model.gguf.part", tmp_path / "model.gguf"
    download.write_bytes(b"GGUF half")
    with open_staging_file(file) as new:
        new.append(b"GGUF")
        new.commit()
    with pytest.raises(ProblemReport, match="this file exists already"), open_staging_file(file):
        pass
    assert download.read_bytes() == b"GGUF half" and file.read_bytes() == b"GGUF"


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "text", "folder", "pipe"])
def test_what_is_no_part_is_in_the_way(tmp_path: Path, kind: str) -> None:
    """Nothing that a link leads to is emptied, and nothing is removed."""
    victim, part = tmp_path / "victim", tmp_path / "model.gguf.raymoe-part"
    if kind != "dangling":
        victim.write_bytes(b"GGUF precious")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: part.symlink_to("victim"),
        "dangling": lambda: part.symlink_to("victim"),
        "hard link": lambda: os.link(victim, part),
        "text": lambda: part.write_text("mine"),
        "folder": part.mkdir,
        "pipe": lambda: os.mkfifo(part),
    }
    make[kind]()
    before = os.lstat(part)
    for overwrite in (False, True):
        with (
            pytest.raises(ProblemReport, match="something else has it"),
            open_staging_file(part.with_suffix(""), overwrite=overwrite),
        ):
            pass
    assert os.path.samestat(os.lstat(part), before) and os.lstat(part).st_size == before.st_size
    assert victim.read_bytes() == b"GGUF precious" if kind != "dangling" else not victim.exists()


def test_killed_when_the_file_had_its_name(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF whole")
    os.link(file, tmp_path / "model.gguf.raymoe-part")
    with open_staging_file(file, overwrite=True) as new:
        assert file.read_bytes() == b"GGUF whole"
        new.append(b"GGUF new")
        new.commit()
    assert file.read_bytes() == b"GGUF new" and [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a filesystem whose files have one name each."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    path = tmp_path / "model.gguf"
    with pytest.raises(ProblemReport, match=r"this file exists already\n.*--overwrite replaces it"):
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
    with open_staging_file(path, overwrite=overwrite) as file:
        file.append(b"ours")
        if came is not None:
            path.write_bytes(came)
        file.commit()


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_no_room(tmp_path: Path) -> None:
    (problem,) = disk_space_problems(tmp_path / "model.gguf", 10**18)
    assert "not enough disk: 1,000,000,000,000,000,000 bytes are needed" in problem.what


@pytest.mark.processes
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


@pytest.mark.parametrize("name", ["s3:/bucket/m.gguf", "s3:m.gguf", "gs//bucket/m.gguf"])
def test_places_that_look_like_urls(name: str) -> None:
    with pytest.raises(ProblemReport, match="looks like a URL"):
        output_path(name)


def test_only_local_files_are_written(tmp_path: Path) -> None:
    assert output_path(f"file://{tmp_path}/m.gguf") == output_path(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    for name in ("s3://bucket/m.gguf", "gs://bucket/m.gguf", "hf://org/name/m.gguf"):
        with pytest.raises(ProblemReport, match="a GGUF file is written to a local path"):
            output_path(name)


def test_what_is_read_is_not_replaced(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """A file of the model under a name of its own, and one of prompts."""
    model = copy_model(zoo("llama"), tmp_path / "model")
    os.link(model / "model.safetensors", tmp_path / "m.gguf")
    with pytest.raises(ProblemReport, match="this is a file of the model, which is read"):
        write_gguf(model, tmp_path / "m.gguf", GgufOptions(overwrite=True))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    (tmp_path / "p.gguf").symlink_to(prompts)
    content = merge_config(model, [model, zoo("llama", seed=1)])
    content["experts"][0]["positive_prompts"] = {"file": str(prompts)}
    config = write_config(tmp_path / "merge.yaml", content)
    with pytest.raises(ProblemReport, match=r"this is the file of experts.0.\.positive_prompts, which is read"):
        write_gguf(config, tmp_path / "p.gguf", GgufOptions(overwrite=True, device="cpu"))
    assert (tmp_path / "p.gguf").is_symlink() and prompts.read_text() == "one\ntwo\n"


def test_a_source_that_is_written_meanwhile(
    zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the old bytes and half of the new are no model: there is no file."""
    from raymoe.export.gguf import convert

    model, write = Path(shutil.copytree(zoo("llama"), tmp_path / "model")), convert._write

    def write_then_save_again(*arguments: Any) -> None:
        write(*arguments)
        os.utime(model / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(convert, "_write", write_then_save_again)
    with pytest.raises(ProblemReport, match=r"model.safetensors: the file was written while it was read"):
        write_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
