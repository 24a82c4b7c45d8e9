"""docs/recipe.md: its config is one that plans, and its commands are ones that the command line takes."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import raymoe
from raymoe.cli import app
from raymoe.config import config_warnings, load_config

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs/recipe.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of each command line of raymoe on the page, without its name and its output."""
    joined = re.sub(r"\\\n +", "", PAGE)
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ (raymoe .*)", joined, re.MULTILINE)]


def test_the_config_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "recipe.yaml")
    assert config_warnings(config) == []
    for expert in config.experts:
        assert expert.source_model.adapter is not None
        assert (REPOSITORY / expert.source_model.adapter.path / "adapter_config.json").is_file()
    assert [Path(prompts.file).is_file() for prompts in config.prompt_files.values()] == [True] * len(config.experts)


def test_the_commands_are_parsed() -> None:
    group = typer.main.get_command(app)
    parsed = []
    for name, *arguments in commands():
        command = group.get_command(None, name)  # type: ignore[attr-defined, arg-type]
        command.make_context(name, arguments)
        parsed.append(name)
    assert parsed == ["plan", "merge", "try", "eval", "verify", "push", "push", "gguf"]


def test_the_python_calls_are_ones_that_raymoe_takes() -> None:
    (block,) = re.findall(r"^```python\n(import raymoe.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    called = []
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("raymoe."):
            name = ast.unparse(node.func).removeprefix("raymoe.")
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
            inspect.signature(getattr(raymoe, name)).bind(*map(ast.literal_eval, node.args), **given)
            called.append(name)
    assert sorted(called) == ["evaluate", "gguf", "merge", "plan", "push"]


def test_no_output_is_left_to_fill_in() -> None:
    assert re.findall(r"^[A-Z]{3,}$", PAGE, re.MULTILINE) == []
