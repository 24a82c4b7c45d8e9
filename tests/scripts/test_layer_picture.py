"""docs/layers.svg is what scripts/layer_picture.py draws of this code, and the table beside it has all packages."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "scripts/layer_picture.py"))


def test_the_picture_is_of_this_code(script: dict[str, Any]) -> None:
    drawn = script["draw"](script["read_layers"](), script["package_imports"]())
    assert (REPOSITORY / "docs/layers.svg").read_text(encoding="utf-8") == drawn, "run scripts/layer_picture.py"


def test_the_table_beside_it_has_all_of_its_packages(script: dict[str, Any]) -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE)
    described = {re.split(r"\W", name)[0] for row in rows for name in re.findall(r"`(.*?)`", row)}
    named = [name for layer in script["read_layers"]() for name in layer if not name.startswith("_")]
    assert [name for name in named if name not in described] == []


def test_a_dot_is_in_the_row_of_what_imports(script: dict[str, Any]) -> None:
    picture = ElementTree.fromstring(script["draw"]([["top"], ["left", "right"]], {("top", "right")}))
    (dot,) = picture.iter(f"{SVG}circle")
    assert dot.findtext(f"{SVG}title") == "top imports right"
    first_row, third_column = script["TOP"] + script["CELL"] // 2, script["LEFT"] + 5 * script["CELL"] // 2
    assert (dot.get("cx"), dot.get("cy")) == (str(third_column), str(first_row))
    assert [text.text for text in picture.iter(f"{SVG}text")] == ["top", "top", "left", "left", "right", "right"]
