"""Options as dataclasses, the ignored flags of mergekit-moe, and the options that `raymoe submit` passes on."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from raymoe.cli.ignored_flags import accept_ignored_flags
from raymoe.cli.option_groups import expand_groups
from raymoe.submit.job_spec import Job

Cli = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Annotated[int, typer.Option("--width")] = 1


@dataclass(frozen=True, kw_only=True)
class Box(Size):
    height: Annotated[int, typer.Option("--height")] = 2


def test_a_group_is_one_option_per_field_at_its_place() -> None:
    given: list[tuple[int, Box, int]] = []

    def command(first: int, *, box: Box, last: int = 3) -> None:
        given.append((first, box, last))

    expanded = expand_groups(command)
    assert list(inspect.signature(expanded).parameters) == ["first", "width", "height", "last"]
    expanded(first=0, width=4, height=5, last=6)
    assert given == [(0, Box(width=4, height=5), 6)]


def test_a_command_gets_a_line_for_each_given_flag() -> None:
    given: list[list[str]] = []

    def command(*, ignored_notes: list[str]) -> None:
        given.append(ignored_notes)

    accepting = accept_ignored_flags(command)
    flags = dict.fromkeys(inspect.signature(accepting).parameters)
    accepting(**{**flags, "cuda": False, "num_threads": 2})
    assert [note.split()[1] for note in given[0]] == ["--cuda", "--num-threads"]


@pytest.mark.parametrize("typo", ["--lazy-unpikle", "--cudas", "--no-gpu-rich", "--write-thread"])
def test_a_mistyped_flag_is_refused(cli: Cli, config: Callable[..., Path], tmp_path: Path, typo: str) -> None:
    refused = cli("merge", config(), tmp_path / "out", typo)
    assert refused.code == 2 and f"No such option: {typo}" in refused.err


def test_submit_passes_on_what_was_typed(
    cli: Cli, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults too, if they were typed: another version of raymoe on the cluster may have others. Uploads are kept for
    the job that is submitted again."""
    sent: list[Job] = []

    def send(client: object, job: Job, *, install: bool) -> str:
        sent.append(job)
        return "job-1"

    monkeypatch.setattr("raymoe.submit.job_server.job_server", lambda address, token: None)
    monkeypatch.setattr("raymoe.submit.submit.send_job", send)
    typed = ["--no-cuda", "--copy-tokenizer", "-vv", "--actors", "2", "-j", "4", "--gpu-rich", "-m", "a b"]
    done = cli("submit", "--no-wait", config(), *typed, "/out", "--no-write-model-card")
    assert done.code == 0, done.err
    words = shlex.split(sent[0].entrypoint)
    assert words[:6] == ["python", "-m", "raymoe", "merge", "config.yaml", "/out"]
    values = ["--actors=2", "--num-threads=4", "--message=a b"]
    switches = [
        "--no-cuda",
        "--copy-tokenizer",
        "--verbose",
        "--verbose",
        "--gpu-rich",
        "--no-write-model-card",
        "--keep-uploads",
    ]
    assert sorted(words[6:]) == sorted([*values, *switches])
