"""Standard streams that are closed, full or ASCII: no traceback, and JSON stays JSON."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import command, write_config
from tests.pico import copy_model, merge_config

pytestmark = pytest.mark.processes


def shell(line: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """`line` with `$R` for raymoe and these arguments."""
    line = line.replace("$R", shlex.join(command(*arguments)))
    done = subprocess.run(
        ["sh", "-c", line], env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.fixture
def config(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    models = [copy_model(zoo("llama", seed=seed), tmp_path / "用户" / f"ü{seed}") for seed in (0, 1, 2)]
    return write_config(tmp_path / "cönfig.yaml", merge_config(models[0], models[1:], mode="random"))


def test_an_encoding_that_lacks_a_character(config: Path) -> None:
    done = shell("$R", "plan", config, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u7528\\u6237/\\xfc1" in done.stdout
    done = shell("$R", "plan", config, "--json", PYTHONIOENCODING="ascii")
    assert done.stdout.isascii() and "用户/ü1" in json.loads(done.stdout)["sources"][1]["model"]
    done = shell("$R", "plan", config.with_name("nö.yaml"), PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "n\\xf6.yaml: no such file" in done.stderr


CLOSED = ("$R >&-", 0, "")
NO_STREAMS = ("$R >&- 2>&- <&-", 0, "")
FULL = ("$R > /dev/full", 1, "error: standard output can't be written to: No space left on device\n")


# Each command, and each way; `make soak` has the rest of the pairs.
@pytest.mark.parametrize(
    ("arguments", "line", "status", "said"),
    [
        (("archs", "--json"), *NO_STREAMS),
        (("--version",), *FULL),
        (("plan", "CONFIG"), *CLOSED),
        (("plan", "CONFIG"), *FULL),
        *(
            pytest.param(arguments, *way, marks=pytest.mark.soak)
            for arguments, way in (
                (("archs", "--json"), CLOSED),
                (("archs", "--json"), FULL),
                (("--version",), CLOSED),
                (("--version",), NO_STREAMS),
                (("plan", "CONFIG"), NO_STREAMS),
            )
        ),
    ],
)
def test_output_that_nobody_gets(config: Path, arguments: tuple[str, ...], line: str, status: int, said: str) -> None:
    done = shell(line, *(str(config) if word == "CONFIG" else word for word in arguments))
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize(
    "arguments", [("archs",), pytest.param(("archs", "--json"), marks=pytest.mark.soak), ("--version",)]
)
def test_a_reader_that_has_gone(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*arguments), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_messages_that_nobody_gets(config: Path) -> None:
    for line in ("$R 2>&-", "$R 2> /dev/full"):
        assert shell(line, "plan", config).stdout.rstrip().endswith("No problems found.")
        assert shell(line, "plan", "gone.yaml").returncode == 2
