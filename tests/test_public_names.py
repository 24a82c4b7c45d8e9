"""`import raymoe` as an editor, a type checker and a user see it: its names, and the commands' options as arguments."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import raymoe
from raymoe.arguments import ConfigKeys
from raymoe.cli import app
from raymoe.cli.ignored_flags import accept_ignored_flags
from raymoe.config import MergeConfig

COMMANDS = typing.cast(click.Group, typer.main.get_command(app)).commands
# A cluster's job is no call of this process.
WITHOUT_FUNCTION = {"submit"}
# How a result is printed. Functions return it.
DISPLAY_OPTIONS = {
    **{name: {"json"} for name in ("plan", "inspect", "archs", "try", "edit", "prune")},
    "gguf": {"verbose"},
}
RENAMED = {
    "i_understand_this_is_not_useful_without_training": "allow_all_same",
    "label": "labels",  # the option is repeated
}
# `push --dry-run` and `edit --dry-run` are functions of their own, since they return lines and a plan.
OF_OTHER_FUNCTIONS = {"push": {"dry_run"}, "edit": {"dry_run"}}
FUNCTIONS = {"eval": "evaluate", "try": "generate"}


def ignored_flags() -> set[str]:
    def command(*, ignored_notes: list[str]) -> None: ...

    return set(inspect.signature(accept_ignored_flags(command)).parameters)


def argument_names(option: click.Parameter) -> set[str]:
    """What an option may be called as an argument; `--branch` and `--revision` are one option."""
    plain = {name.lstrip("-").replace("-", "_") for name in option.opts if name.startswith("--")}
    return {RENAMED.get(name, name) for name in plain}


def options(command: str) -> list[click.Parameter]:
    """A command's options, without mergekit's that do nothing, and those of how a result is printed."""
    ignored = ignored_flags() | {"help"}
    own = [each for each in COMMANDS[command].params if each.param_type_name == "option" and each.name not in ignored]
    return [each for each in own if not argument_names(each) & DISPLAY_OPTIONS.get(command, set())]


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - WITHOUT_FUNCTION))
def test_a_function_takes_the_options_of_its_command(command: str) -> None:
    taken = set(inspect.signature(getattr(raymoe, FUNCTIONS.get(command, command))).parameters)
    missing = [names for each in options(command) if not (names := argument_names(each)) & taken]
    assert [names for names in missing if not names & OF_OTHER_FUNCTIONS.get(command, set())] == []


@pytest.mark.parametrize("command", ["merge", "plan", "verify", "gguf", "push", "try", "extract"])
def test_arguments_have_the_defaults_of_the_options(command: str) -> None:
    """But for `quiet`: a function says nothing unless it is asked to."""
    parameters = inspect.signature(getattr(raymoe, FUNCTIONS.get(command, command))).parameters
    for option in options(command):
        for name in argument_names(option) & parameters.keys() - {"quiet"}:
            assert parameters[name].default == option.default, name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_is_described_and_tested(command: str) -> None:
    """A page of the docs shows how it is typed, and a test gives its name to the command line."""
    root = Path(__file__).parents[1]
    pages = [path.read_text(encoding="utf-8") for path in (root / "docs").rglob("*.md")]
    assert any(re.search(rf"\braymoe {command}\b", page) for page in pages)
    tests = (path.read_text(encoding="utf-8") for path in (root / "tests").rglob("test_*.py") if path != Path(__file__))
    assert any(f'"{command}"' in text for text in tests)


def functions() -> list[str]:
    return [name for name in raymoe.__all__ if inspect.isfunction(getattr(raymoe, name))]


@pytest.mark.parametrize("name", sorted(set(functions()) - {"load_config"}))
def test_a_docstring_names_every_argument(name: str) -> None:
    function = getattr(raymoe, name)
    text = function.__doc__
    assert "Returns:" in text and ">>> " in text
    if name != "push_dry_run":  # its arguments are those of `push`
        missing = [each for each in inspect.signature(function).parameters if f"        {each}: " not in text]
        assert [each for each in missing if f"        **{each}: " not in text] == []


def test_the_keys_of_a_config_are_arguments() -> None:
    assert ConfigKeys.__annotations__.keys() == MergeConfig.model_fields.keys()


def test_names_are_shown() -> None:
    assert set(raymoe.__all__) <= set(dir(raymoe))
    assert {name for name in dir(raymoe) if not name.startswith("_")} == set(raymoe.__all__) - {"__version__"}
    assert all(getattr(raymoe, name) is not None for name in raymoe.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """The lists in `raymoe/__init__.py`: the imports for type checkers, `__all__`, and where names are found."""
    source = Path(raymoe.__file__)
    assert (source.parent / "py.typed").is_file()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {node.module: tuple(each.name for each in node.names) for node in block.body if _is_import(node)}
    assert imported == raymoe._HOMES
    assert sorted(["__version__", *(name for names in imported.values() for name in names)]) == raymoe.__all__


def _is_import(node: Any) -> typing.TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom)


def test_problems_are_values(tmp_path: Path) -> None:
    with pytest.raises(raymoe.ProblemReport) as raised:
        raymoe.plan(base_model=str(tmp_path / "a"), experts=[{"source_model": "b"}], gate_mode="rigde", strict=True)
    assert isinstance(raised.value, raymoe.RaymoeError)
    assert all(isinstance(each, raymoe.Problem) for each in raised.value.problems)
    assert "rigde" in "".join(each.what for each in raised.value.problems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate_mod": "ridge"}, r"plan\(\) got an unexpected keyword argument 'gate_mod': did you mean gate_mode\?"),
        ({}, "needs a config"),
        ({"config": {"base_model": "a"}, "gate_mode": "ridge"}, "put gate_mode into the config"),
    ],
)
def test_a_config_that_is_not_given_or_given_twice(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        raymoe.plan(**arguments)


def test_options_are_given_once(tmp_path: Path) -> None:
    config = {"base_model": "a", "experts": [{"source_model": "b"}, {"source_model": "c"}], "gate_mode": "random"}
    with pytest.raises(TypeError, match="options is given as a whole and in single arguments"):
        raymoe.plan(config, raymoe.MergeOptions(seed=1), strict=True)
    with pytest.raises(TypeError, match="settings is given as a whole"):
        raymoe.merge(config, tmp_path / "out", settings=raymoe.RuntimeSettings(), overwrite=True)
    with pytest.raises(TypeError, match="needs out"):
        raymoe.merge(config)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"out_shard_size": "5 apples"}, "out_shard_size"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit"),
        ({"actors": 0}, "actors"),
        ({"private": True}, "--private"),
    ],
)
def test_arguments_that_mean_nothing(tmp_path: Path, arguments: dict[str, Any], where: str) -> None:
    with pytest.raises(raymoe.ProblemReport) as raised:
        raymoe.merge(tmp_path / "none.yaml", tmp_path / "out", **arguments)
    assert raised.value.problems[0].where == where
