"""docs/merge.svg is what scripts/readme_picture.py draws, and can be read in light and dark."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BRIGHTNESS = (0.2126, 0.7152, 0.0722)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "scripts/readme_picture.py"))


def test_the_picture_is_what_the_script_draws(script: dict[str, Any]) -> None:
    assert script["PICTURE"].read_text(encoding="utf-8") == script["draw"](), "run scripts/readme_picture.py"


def test_the_readme_shows_it() -> None:
    assert "](docs/merge.svg)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_text_stays_in_its_box(script: dict[str, Any]) -> None:
    for box in (*script["BOXES"], *script["FRAMES"]):
        title, text = len(box.title) * script["TITLE"], len(box.text) * script["SMALL"]
        assert max(title, text) * script["LETTER"] <= box.width - 24, box


def test_boxes_do_not_overlap(script: dict[str, Any]) -> None:
    boxes = script["BOXES"]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            apart_x = one.x + one.width <= other.x or other.x + other.width <= one.x
            apart_y = one.y + one.height <= other.y or other.y + other.height <= one.y
            assert apart_x or apart_y, (one, other)


def test_every_arrow_ends_at_an_edge(script: dict[str, Any]) -> None:
    places = (*script["BOXES"], *script["FRAMES"])
    for arrow in script["ARROWS"]:
        for point in (arrow.points[0], arrow.points[-1]):
            assert any(_is_on_edge(box, *point) for box in places), (arrow.label, point)


def _is_on_edge(box: Any, x: float, y: float) -> bool:
    in_x, in_y = box.x <= x <= box.x + box.width, box.y <= y <= box.y + box.height
    return (in_y and x in (box.x, box.x + box.width)) or (in_x and y in (box.y, box.y + box.height))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(script: dict[str, Any], theme: str) -> None:
    colors = script["COLORS"][theme]
    for name, background, least in (
        ("ink", "frame", 4.5),
        ("ink", "box", 4.5),
        ("soft", "frame", 4.5),
        ("soft", "box", 4.5),
        ("soft", "page", 4.5),
        ("arrow", "page", 3),
        ("arrow", "frame", 3),
    ):
        one, other = _luminance(colors[name]), _luminance(colors[background])
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= least, (name, background)


def _luminance(color: str) -> float:
    shares = [part / 255 for part in bytes.fromhex(color.removeprefix("#"))]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip(BRIGHTNESS, linear, strict=True))
