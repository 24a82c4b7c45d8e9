"""A command without a cluster: Ray starts with it and ends with it. Every variable that can hold a password is set."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.commands import files_below, raymoe, wait_until, write_config
from tests.cli.test_secrets import VARIABLES, told, written
from tests.pico import merge_config
from tests.processes import mentioning

pytestmark = pytest.mark.processes


@dataclass(frozen=True)
class Run:
    """What the command said, its folder with the config and `out`, and the folder of its Ray's files."""

    out: str
    err: str
    folder: Path
    session: Path


@pytest.fixture(scope="module")
def run(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A merge that reads prompts. Read-only."""
    folder = tmp_path_factory.mktemp("own-ray")
    content = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="cheap_embed")
    config = write_config(folder / "config.yaml", content)
    session = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the path of a socket has to be short
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {**VARIABLES, "RAY_TMPDIR": str(session), "no_proxy": "*"}
    try:
        done = raymoe("merge", config, folder / "out", "-v", env=env)
        assert done.returncode == 0, done.stderr
        yield Run(out=done.stdout, err=done.stderr, folder=folder, session=session)
    finally:
        shutil.rmtree(session, ignore_errors=True)


def test_a_laptop_without_a_cluster(run: Run) -> None:
    said = run.err.splitlines()
    assert said[0].startswith("Mixtral, 2 experts: ") and said[0].endswith(f"to {run.folder / 'out'}")
    assert "starting Ray on this machine" in said
    end = said[said.index("Backbone: the base's attention, norms and embeddings.") - 1 :]
    commands = [line.strip() for line in end[end.index("next:") + 1 :]]
    heads = [line.split(":")[0] for line in end[: end.index("next:")]]
    assert heads[:2] == ["done", "Backbone"] and heads[-1] == "peak memory"
    assert commands and all(command.startswith(f"raymoe {command.split()[1]} {run.folder}") for command in commands)
    wait_until(lambda: not mentioning(str(run.session)), "the end of its Ray's processes")


def test_nothing_tells_a_secret(run: Run) -> None:
    """Neither what it says, nor its files, nor Ray's records of it."""
    assert told(run.out) == told(run.err) == []
    assert {"raymoe.json", "README.md", "result.json"} <= {path.name for path in files_below(run.folder / "out")}
    assert any("logs" in str(path) for path in files_below(run.session))
    assert written(run.folder) == written(run.session) == []
