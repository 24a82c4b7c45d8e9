"""Fixtures for tests of the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raymoe.cli import run_command
from tests.cli.commands import write_config


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit status."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """cli("plan", path, ...) runs a command in this process; an exception, a traceback to users, fails."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["raymoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_command()
        said = capsys.readouterr()
        return Answer(exit.value.code if isinstance(exit.value.code, int) else 1, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def ray_env(local_ray: None) -> dict[str, str]:
    """The environment of a command that is to use the session's cluster."""
    import ray

    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture
def config(zoo: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """config(mode="random", **keys) writes a config of three experts and returns its path."""

    def write(mode: str = "random", **keys: Any) -> Path:
        from tests.pico import merge_config

        experts = [zoo("llama", seed=seed) for seed in (1, 2, 3)]
        content = merge_config(zoo("llama"), experts, mode=mode) | keys
        return write_config(tmp_path / "config.yaml", content)

    return write
