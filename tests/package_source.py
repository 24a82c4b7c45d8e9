"""The package's source as syntax trees, for tests of rules about the code. A process parses each file once."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import raymoe

__all__ = ["all_nodes", "trees"]

_ROOT = Path(raymoe.__file__).parent


@cache
def trees() -> Mapping[str, ast.Module]:
    """The package's modules by their paths below its folder, such as `config/load.py`. Read-only."""
    paths = sorted(_ROOT.rglob("*.py"))
    return {path.relative_to(_ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@cache
def all_nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """What `ast.walk` gives. Several tests look through all of the package."""
    return tuple(ast.walk(tree))
