"""Draws docs/merge.svg, the picture of a merge in README.md: models, plan, actors, routers, shards.

    python scripts/readme_picture.py

The picture has a background and colors of its own for light and dark themes, since a page that shows it as an image
gives it none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["ARROWS", "BOXES", "COLORS", "FRAMES", "PICTURE", "draw"]

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/merge.svg"
LABEL = (
    "A merge: the config and the headers of base and experts make a plan; Ray actors, one per expert, read prompts and "
    "write shards; routers, shards and the index are the output"
)
WIDTH, HEIGHT = 960, 470
TITLE, SMALL = 15, 12.5  # sizes of letters
LETTER = 0.54  # mean width of a letter, in its size, of a wide font
COLORS: Mapping[str, Mapping[str, str]] = {
    "light": {
        "page": "#ffffff",
        "frame": "#f3f4f6",
        "box": "#ffffff",
        "edge": "#9ca3af",
        "ink": "#111827",
        "soft": "#4b5563",
        "arrow": "#2563eb",
    },
    "dark": {
        "page": "#0d1117",
        "frame": "#161b22",
        "box": "#21262d",
        "edge": "#6e7681",
        "ink": "#f0f6fc",
        "soft": "#b1bac4",
        "arrow": "#79a8ff",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box with a title and a line below it; a frame has both above its boxes. `is_more` stands for several."""

    x: float
    y: float
    width: float
    height: float
    title: str
    text: str = ""
    is_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrow:
    """A line through points, and what goes along it, written at `label_at` (its start)."""

    points: tuple[tuple[float, float], ...]
    label: str = ""
    label_at: tuple[float, float] = (0, 0)
    is_dashed: bool = False


LEFT, MIDDLE, RIGHT = 20, 356, 700  # left edges of the three columns
SIDE, CENTER = 240, 256  # their widths
ROWS = (166, 232, 298, 364)
TOP, FRAME_TOP, FRAME_HEIGHT, BOX_HEIGHT = 24, 116, 312, 54

FRAMES = (
    Box(x=LEFT, y=FRAME_TOP, width=SIDE, height=FRAME_HEIGHT, title="models", text="folders, Hub ids, buckets"),
    Box(x=MIDDLE, y=FRAME_TOP, width=CENTER, height=FRAME_HEIGHT, title="Ray", text="a laptop, or a cluster with GPUs"),
    Box(x=RIGHT, y=FRAME_TOP, width=SIDE, height=FRAME_HEIGHT, title="output", text="a folder or a bucket"),
)


def _column(x: float, width: float, *rows: tuple[float, str, str]) -> tuple[Box, ...]:
    return tuple(
        Box(
            x=x + 12, y=y, width=width - 24, height=BOX_HEIGHT, title=title, text=text, is_more=title.startswith("more")
        )
        for y, title, text in rows
    )


BOXES = (
    Box(x=LEFT, y=TOP, width=SIDE, height=BOX_HEIGHT, title="config.yaml", text="models, prompts per expert"),
    Box(x=MIDDLE, y=TOP, width=CENTER, height=BOX_HEIGHT, title="plan", text="shards, byte ranges, problems"),
    Box(x=RIGHT, y=TOP, width=SIDE, height=BOX_HEIGHT, title="use", text="transformers, llama.cpp"),
    *_column(
        LEFT,
        SIDE,
        (ROWS[0], "base", "attention, norms, embeddings"),
        (ROWS[1], "expert 0", "feed-forward weights"),
        (ROWS[2], "expert 1", "feed-forward weights"),
        (ROWS[3], "more experts", ""),
    ),
    *_column(
        MIDDLE,
        CENTER,
        (ROWS[0], "router of each layer", "from all experts' prompts"),
        (ROWS[1], "actor 0", "reads prompts, writes shards"),
        (ROWS[2], "actor 1", "reads prompts, writes shards"),
        (ROWS[3], "more actors", "one per expert"),
    ),
    *_column(
        RIGHT,
        SIDE,
        (ROWS[0], "routers", "computed from prompts"),
        (ROWS[1], "shards of the base", "copied"),
        (ROWS[2], "shards of experts", "copied"),
        (ROWS[3], "index, record", "written last"),
    ),
)


def _across(start: float, end: float, row: int) -> tuple[tuple[float, float], ...]:
    y = ROWS[row] + BOX_HEIGHT / 2
    return (start, y), (end, y)


_IN, _FROM = LEFT + SIDE - 12, MIDDLE + 12  # edges of the boxes in the frames
_OUT, _TO = MIDDLE + CENTER - 12, RIGHT + 12
_TOP_END, _CENTER_X = TOP + BOX_HEIGHT, MIDDLE + CENTER / 2
_BELOW = FRAME_TOP + FRAME_HEIGHT

ARROWS = (
    Arrow(points=((LEFT + SIDE, 42), (MIDDLE, 42))),
    Arrow(
        points=((LEFT + SIDE, 140), (324, 140), (324, 62), (MIDDLE, 62)),
        label="headers",
        label_at=(LEFT + SIDE + 8, 133),
        is_dashed=True,
    ),
    Arrow(points=((_CENTER_X, _TOP_END), (_CENTER_X, FRAME_TOP)), label="jobs", label_at=(_CENTER_X + 10, 101)),
    Arrow(points=_across(_IN, MIDDLE, 0), label="weights", label_at=(LEFT + SIDE + 8, ROWS[0] + 20)),
    *(Arrow(points=_across(_IN, _FROM, row)) for row in (1, 2, 3)),
    Arrow(points=_across(_OUT, _TO, 0), label="rows", label_at=(MIDDLE + CENTER + 10, ROWS[0] + 20)),
    Arrow(points=_across(_OUT, _TO, 1), label="bytes", label_at=(MIDDLE + CENTER + 10, ROWS[1] + 20)),
    Arrow(points=_across(_OUT, _TO, 2)),
    Arrow(points=((RIGHT + SIDE / 2, FRAME_TOP), (RIGHT + SIDE / 2, _TOP_END))),
    Arrow(
        points=((LEFT + SIDE / 2, _BELOW), (LEFT + SIDE / 2, 452), (RIGHT + SIDE / 2, 452), (RIGHT + SIDE / 2, _BELOW)),
        label="from bucket to bucket, the store copies the weights itself",
        label_at=(MIDDLE - 50, 446),
        is_dashed=True,
    ),
)


def main() -> None:
    PICTURE.write_text(draw(), encoding="utf-8")


def draw() -> str:
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "font-family": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif",
            "role": "img",
            "aria-label": LABEL,
        },
    )
    ElementTree.SubElement(root, "style").text = _style()
    _add_head(root)
    ElementTree.SubElement(root, "rect", {"class": "page", "width": "100%", "height": "100%", "rx": "8"})
    for frame in FRAMES:
        _add_box(root, frame, "frame")
    for arrow in ARROWS:
        _add_arrow(root, arrow)
    for box in BOXES:
        _add_box(root, box, "box more" if box.is_more else "box")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _style() -> str:
    light, dark = (" ".join(f"--{name}: {color};" for name, color in COLORS[theme].items()) for theme in COLORS)
    return "\n".join(
        (
            "",
            f"svg {{ {light} }}",
            f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}",
            ".page { fill: var(--page); }",
            ".frame { fill: var(--frame); stroke: var(--edge); }",
            ".box { fill: var(--box); stroke: var(--edge); }",
            ".more { stroke-dasharray: 4 4; }",
            f".title {{ fill: var(--ink); font-size: {TITLE}px; font-weight: 600; }}",
            f".text {{ fill: var(--soft); font-size: {SMALL}px; }}",
            ".arrow { fill: none; stroke: var(--arrow); stroke-width: 2; }",
            ".dashed { stroke-dasharray: 6 4; }",
            ".head { fill: var(--arrow); }",
            "",
        )
    )


def _add_head(root: ElementTree.Element) -> None:
    """The head of all arrows."""
    definitions = ElementTree.SubElement(root, "defs")
    marker = ElementTree.SubElement(
        definitions,
        "marker",
        {
            "id": "head",
            "viewBox": "0 0 10 10",
            "refX": "9",
            "refY": "5",
            "markerWidth": "5",
            "markerHeight": "5",
            "orient": "auto",
        },
    )
    ElementTree.SubElement(marker, "path", {"class": "head", "d": "M0 0 L10 5 L0 10 z"})


def _add_box(root: ElementTree.Element, box: Box, kind: str) -> None:
    size = {"x": box.x, "y": box.y, "width": box.width, "height": box.height, "rx": 6}
    ElementTree.SubElement(root, "rect", {"class": kind, **{name: f"{value:g}" for name, value in size.items()}})
    title = box.y + (23 if box.text else BOX_HEIGHT / 2 + 5)
    _add_text(root, "title", box.x + 12, title, box.title)
    if box.text:
        _add_text(root, "text", box.x + 12, box.y + 42, box.text)


def _add_arrow(root: ElementTree.Element, arrow: Arrow) -> None:
    line = " L".join(f"{x:g} {y:g}" for x, y in arrow.points)
    kind = "arrow dashed" if arrow.is_dashed else "arrow"
    ElementTree.SubElement(root, "path", {"class": kind, "d": f"M{line}", "marker-end": "url(#head)"})
    if arrow.label:
        _add_text(root, "text", *arrow.label_at, arrow.label)


def _add_text(root: ElementTree.Element, kind: str, x: float, y: float, text: str) -> None:
    ElementTree.SubElement(root, "text", {"class": kind, "x": f"{x:g}", "y": f"{y:g}"}).text = text


if __name__ == "__main__":
    main()
