"""The hooks of .pre-commit-config.yaml are the commands of `make lint`."""

from __future__ import annotations

import re

import yaml

from tests.pico import REPOSITORY


def commands_of_make_lint() -> list[str]:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    return [line.strip().replace("$(BIN)/", ".venv/bin/") for line in recipe.splitlines()]


def test_hooks_run_what_make_lint_runs() -> None:
    """Ruff's hooks are given the changed files where `make lint` looks at all, and exclude what pyproject.toml does."""
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [re.sub(r" --force-exclude$", " .", hook["entry"]) for hook in local["hooks"]]
    assert sorted(entries) == sorted(commands_of_make_lint())
