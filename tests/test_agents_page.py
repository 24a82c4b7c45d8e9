"""AGENTS.md is short, and its map has every package and module of raymoe, in the order of the layers."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from tests.pico import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (REPOSITORY / "AGENTS.md").read_text(encoding="utf-8")


def named_in_the_map() -> list[str]:
    """What comes before the colon of each line, in order."""
    section = PAGE.partition("\n## Map\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^- (.+?):", section, flags=re.MULTILINE)
    return [name for line in lines for name in re.findall(r"`(.+?)`", line)]


def packages_and_modules() -> list[str]:
    """Packages at any depth, and the modules beside them at the top."""
    root = REPOSITORY / "raymoe"
    packages = [f"{path.parent.relative_to(REPOSITORY)}/" for path in root.rglob("__init__.py") if path.parent != root]
    return [*packages, *(f"raymoe/{path.name}" for path in root.glob("*.py") if not path.name.startswith("_"))]


def layers() -> Sequence[str]:
    content = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in content["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    return [str(layer) for layer in contract["layers"]]


def test_the_map_names_every_package_and_no_other() -> None:
    assert sorted(named_in_the_map()) == sorted(packages_and_modules())


def test_the_map_goes_from_the_highest_layer_to_the_lowest() -> None:
    """Modules that share a line are of neighboring layers, so a line counts by its first name."""
    ranks = {name: rank for rank, layer in enumerate(layers()) for name in re.findall(r"\w+", layer)}
    section = PAGE.partition("\n## Map\n")[2].partition("\n## ")[0]
    firsts = re.findall(r"^- `raymoe/(\w+)", section, flags=re.MULTILINE)
    assert firsts == sorted(firsts, key=ranks.__getitem__)


def test_it_is_short() -> None:
    assert len(PAGE.splitlines()) < 80
