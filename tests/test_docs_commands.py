"""What the pages tell users to type: commands and options of `raymoe` exist, and configs are accepted."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from raymoe.cli.application import app
from raymoe.config.load import parse_config

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    REPOSITORY / "cluster/README.md",
    REPOSITORY / "examples/README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SHELLS = ("", "sh", "bash", "console")
# The name of an actor, `raymoe actor 0`, and messages, `raymoe does not ...`.
OTHER_NAMES = frozenset({"actor", "does"})


def shell_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, indented ones and fenced ones of a shell, with continued lines as one."""
    blocks = [body for language, body in FENCE.findall(text) if language in SHELLS]
    blocks += re.findall(r"^ {4}(?! ).*(?:\n {4}.*)*", FENCE.sub("", text), flags=re.MULTILINE)
    for block in blocks:
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


def typed_commands(text: str) -> Iterator[list[str]]:
    """The words of each command line of raymoe, without the name. Comments and what follows a pipe are left out."""
    for line in shell_lines(text):
        if match := re.match(r"(?:\$ )?(?:\.venv/bin/)?raymoe +(?=\S)(.*)", line):
            words = shlex.split(match[1], comments=True)
            ends = [number for number, word in enumerate(words) if word in ("|", ">", "2>", "&&", ";", "&")]
            yield words[: ends[0]] if ends else words


def named_commands(text: str) -> Iterator[list[str]]:
    """The words of commands that prose names: `raymoe merge --overwrite`."""
    for span in re.findall(r"`raymoe +(?=[a-z])([^`\n]+)`", FENCE.sub("", text)):
        yield re.split(r"\s+", span.strip())


def refused(words: list[str]) -> str | None:
    """What is wrong with a command: its name, or an option that it does not have."""
    command = _group().commands.get(words[0])
    if command is None:
        return None if words[0] in OTHER_NAMES else f"there is no command {words[0]!r}"
    known = _options(command) | (_options(_group().commands["merge"]) if words[0] == "submit" else set())
    flags = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    unknown = sorted(flags - known - {"--help"})
    return f"{words[0]} has no {', '.join(unknown)}" if unknown else None


@functools.cache
def _group() -> Any:
    return typer.main.get_command(app)


def _options(command: Any) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("-")}


def configs(text: str) -> Iterator[str]:
    """The blocks of YAML that are whole merge configs."""
    for language, body in FENCE.findall(text):
        if language == "yaml" and re.search(r"^base_model:", body, flags=re.MULTILINE) and "\nexperts:" in body:
            yield body


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [found for words in (*typed_commands(text), *named_commands(text)) if (found := refused(words))] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configs_are_accepted(page: Path) -> None:
    for number, body in enumerate(configs(page.read_text(encoding="utf-8")), 1):
        parse_config(body, name=f"{name_of(page)}, config {number}")


def test_commands_of_the_readme_can_be_parsed() -> None:
    commands = list(typed_commands((REPOSITORY / "README.md").read_text(encoding="utf-8")))
    assert {words[0] for words in commands} >= {"merge", "plan", "verify", "try", "eval", "push", "gguf", "submit"}
    for words in commands:
        _group().commands[words[0]].make_context(words[0], words[1:])


def test_the_readme_has_a_config() -> None:
    assert list(configs((REPOSITORY / "README.md").read_text(encoding="utf-8")))


def test_help_cuts_no_summary() -> None:
    """At the usual 80 columns."""
    group = _group()
    context = group.make_context("raymoe", ["plan"], resilient_parsing=True, terminal_width=80)
    listed = group.get_help(context).partition("Commands:")[2]
    assert len(listed.strip().splitlines()) == len(group.commands) and "..." not in listed


def test_wrong_commands_and_configs_are_found() -> None:
    page = """
Run `raymoe merg c.yaml out` or `raymoe merge --overwrit`, as `raymoe.merge` does.

    $ raymoe plan c.yaml --quick > plan.txt     # not --slow
    raymoe submit c.yaml out \\
      --actors 2 --adress=x

```console
$ raymoe eval out --dat texts.jsonl
```
"""
    found = [refused(words) for words in (*typed_commands(page), *named_commands(page))]
    assert found == [
        "eval has no --dat",
        "plan has no --quick",
        "submit has no --adress",
        "there is no command 'merg'",
        "merge has no --overwrit",
    ]
    body = "base_model: org/name\nexperts:\n  - source_modell: org/name\n"
    assert list(configs(f"```yaml\n{body}```\n")) == [body]
