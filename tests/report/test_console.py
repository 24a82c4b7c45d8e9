"""Text of models, configs and records on a terminal: nothing in it moves the cursor, hides a line or makes one up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from raymoe.console import console, print_line, print_warning, say, say_command
from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.report.plan_report import print_verification
from raymoe.results import Verification
from raymoe.safe_text import has_unprintable, json_text, printable, safe_message
from raymoe.submit.job_log import _LogPrinter
from tests.cli.conftest import cli
from tests.pico import copy_model, merge_config
from tests.report.terminals import Terminal

__all__ = ["cli"]

# Clears the screen, colors, goes back, reorders, ends the line for Unicode, half of a character.
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\u202e\u2066\u2028\x7f\ud800 [bold]x[/bold]"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202e\u2066\u2028\x7f\ud800 [bold]x[/bold]"


def test_what_is_escaped() -> None:
    assert printable(HOSTILE) == SHOWN
    plain = "tab\tline\nümläut 漢字 עברית 👩‍🚀 ▁token Ġ"
    assert printable(plain) == plain and not has_unprintable(plain)


def test_lines_that_are_no_messages_of_their_own() -> None:
    assert safe_message("name\ndone: all is well") == r"name\ndone: all is well"
    assert safe_message("2 problems:\n  one\n      -> remedy\n") == "2 problems:\n  one\n      -> remedy\n"
    problem = Problem(where="a\nb", what=f"{HOSTILE}\nerror: no", remedy="x\ny")
    for error in (ProblemReport([problem, problem]), MergeFailed(f"{HOSTILE}\nerror: no")):
        assert not has_unprintable(str(error))
        assert not [line for line in str(error).splitlines() if line.startswith(("error", "b", "y"))]


def test_json_says_the_same_and_is_text() -> None:
    content = {HOSTILE: [HOSTILE, "é", 1.5, None]}
    text = json_text(content)
    assert not has_unprintable(text) and json.loads(text) == content
    text.encode()


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("a", "b")
    table.add_row(HOSTILE, "x")
    table_console = console()
    table_console.print(table)
    table_console.print(HOSTILE, style="bold")
    out = capsys.readouterr().out
    assert not has_unprintable(out)
    assert r"\x1b[2J" in out and "[bold]x[/bold]" in out


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    print_line(f"{HOSTILE}\nverified")
    print_verification(Verification(tensors=1, differences=(f"{HOSTILE}: missing",), notes=(HOSTILE,)), quiet=False)
    said = capsys.readouterr()
    assert not has_unprintable(said.out + said.err)
    assert "\nverified" not in said.out


def test_long_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end between words, and go on below with an indent. What is to be copied stays whole."""
    path = "/a/very/long/path/to/a/folder/that/does/not-fit-at-all"
    errors, answers = Terminal.install(monkeypatch, "stderr", 40), Terminal.install(monkeypatch, "stdout", 40)
    text = f"error: there is a problem with {path}, which is no folder\n    -> give the name of a folder that is there"
    say(text)
    print_line(text)
    say_command(f"raymoe push {path} ORG/NAME")
    said = errors.getvalue().splitlines()
    assert said == [
        "error: there is a problem with",
        f"  {path},",
        "  which is no folder",
        "    -> give the name of a folder that is",
        "      there",
        f"  raymoe push {path} ORG/NAME",
    ]
    assert answers.getvalue().splitlines() == said[:-1]


def test_long_lines_that_are_piped(capsys: pytest.CaptureFixture[str]) -> None:
    say("word " * 100)
    print_line("word " * 100)
    print_warning(console(), "word " * 100)
    said = capsys.readouterr()
    assert said.err == "word " * 100 + "\n" and said.out.startswith(said.err + "warning: word")
    assert said.out.count("\n") == 2


def test_warnings_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal.install(monkeypatch, "stdout", 30)
    print_warning(console(), f"a text that needs two lines {HOSTILE}")
    first, *others = screen.getvalue().splitlines()
    assert first == "\x1b[1;35mwarning:\x1b[0m a text that needs two"
    assert all(line.startswith(" " * 9) and len(line) <= 30 and "\x1b" not in line for line in others)


def test_logs_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    """A connection that begins with the first line again repeats nothing."""

    class Client:
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            yield f"a\n{HOSTILE}\n"
            yield "b\n"

    log = _LogPrinter()
    for _ in range(2):
        asyncio.run(log.tail(cast(Any, Client()), "job"))
    assert capsys.readouterr().out == f"a\n{SHOWN}\nb\n"


@pytest.fixture
def hostile(zoo: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose config.json has such text wherever it may have text."""
    changes = {"architectures": [HOSTILE], "note": HOSTILE, HOSTILE: 1, "hidden_act": "silu"}
    return copy_model(zoo("llama"), tmp_path / "mo\x1b[31mdel", config=changes)


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_commands(
    cli: Callable[..., Any], hostile: Path, zoo: Callable[..., Path], tmp_path: Path, as_json: tuple[str, ...]
) -> None:
    config = merge_config(hostile, [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    for arguments in (("inspect", hostile), ("plan", tmp_path / "config.yaml")):
        answer = cli(*arguments, *as_json)
        assert answer.code == 0, answer.err
        assert not has_unprintable(answer.out + answer.err)
    # A type that nobody knows is named in an error.
    config_file = hostile / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "model_type": HOSTILE}))
    answer = cli("plan", tmp_path / "config.yaml")
    assert answer.code == 2 and not has_unprintable(answer.out + answer.err)


def test_a_config_says_where_requests_go(
    cli: Callable[..., Any], zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they go there."""
    monkeypatch.setattr("raymoe.object_store.retry._TRIES_AT_FIRST_CONTACT", 1)
    storage = {"endpoint": "http://127.0.0.1:1", "profile": "work", "deadline_s": 1}
    config = merge_config(zoo("llama"), ["s3://b/m", zoo("llama", seed=2)], mode="random", storage=storage)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    said = "note: s3:// is reached at http://127.0.0.1:1 with the profile 'work', as storage: in the config says\n"
    for arguments in (("plan", "C"), ("merge", "C", tmp_path / "out"), ("gguf", "C", tmp_path / "m.gguf")):
        answer = cli(*(tmp_path / "c.yaml" if each == "C" else each for each in arguments))
        assert answer.code == 2 and answer.err.startswith(said), answer.err
