"""Drawings of the evaluation page: numbers in, inline SVG out. They do not depend on evaluations.

Drawings are made as element trees, so that they are well-formed and text is escaped by construction. The style sheet
defines colors: class `e3` stands for expert 3, and `ink`, `faint`, `line` for parts of a drawing, so one drawing works
in light and dark. Sizes are CSS pixels at full width; a drawing shrinks with its column.

A drawing's `label` describes it to screen readers; single values are `<title>` elements, which browsers show as
tooltips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup
from rich.cells import cell_len, set_cell_size

_COLORS = 16  # of the style sheet
_MARGIN = 12  # around a drawing in its own file
_LETTER = 7.2  # width of a character at the drawings' 12 px, of a wide font


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A bar, or a point of a ladder, with its name: `kind` is its class, `text` its value as it is written."""

    name: str
    value: float
    text: str
    kind: str
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line over layers, with values in 0..1 and the level that chance alone would reach."""

    name: str
    values: Sequence[float]
    chance: float
    kind: str


def expert_kind(expert: int) -> str:
    """The class for an expert's color; experts beyond the style sheet's colors share them."""
    return f"e{expert % _COLORS}"


class Drawing:
    """An SVG in progress. Coordinates are rounded to a tenth of a pixel: pages hold thousands of them."""

    def __init__(self, width: float, height: float, label: str) -> None:
        view = f"0 0 {width:g} {height:g}"
        self.root = ElementTree.Element("svg", {"viewBox": view, "role": "img", "aria-label": label})

    def add(self, tag: str, text: str = "", title: str = "", **attributes: object) -> ElementTree.Element:
        """One element; `class_` is class, `_` in other names is `-`."""
        plain = {name.rstrip("_").replace("_", "-"): _plain(value) for name, value in attributes.items()}
        element = ElementTree.SubElement(self.root, tag, plain)
        element.text = text or None
        if title:
            ElementTree.SubElement(element, "title").text = title
        return element

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "", **more: object) -> None:
        self.add("rect", "", title, x=x, y=y, width=max(0.0, width), height=height, class_=kind, **more)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", title: str = "") -> None:
        element = self.add("text", text=text, x=x, y=y, class_=kind, text_anchor=anchor)
        if title:
            ElementTree.SubElement(element, "title").text = title

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    def markup(self) -> Markup:
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


def as_file(drawing: str, style: str) -> str:
    """A drawing as the text of an SVG file, with the page's background color, since viewers may be light or dark."""
    root = ElementTree.fromstring(drawing)
    _, _, width, height = (float(number) + 2 * _MARGIN for number in root.attrib["viewBox"].split())
    size = {"width": f"{width:g}", "height": f"{height:g}"}
    corner = {"x": f"{-_MARGIN}", "y": f"{-_MARGIN}"}
    box = f"{-_MARGIN} {-_MARGIN} {width:g} {height:g}"
    root.attrib.update({"xmlns": "http://www.w3.org/2000/svg", "viewBox": box, **size})
    sheet = ElementTree.Element("style")
    sheet.text = f"{style}\nsvg {{ width: {width:g}px; height: {height:g}px }}"
    root.insert(0, sheet)
    root.insert(1, ElementTree.Element("rect", {**corner, **size, "style": "fill: var(--page)"}))
    return f"{ElementTree.tostring(root, encoding='unicode')}\n"


def _plain(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)


def _short(text: str, cells: int) -> str:
    """At most `cells` columns wide, as a terminal counts. The middle is cut, since ends of names tell them apart."""
    if cell_len(text) <= cells:
        return text
    tail = (cells - 1) // 2
    return f"{set_cell_size(text, cells - 1 - tail).rstrip()}…{set_cell_size(text[::-1], tail).rstrip()[::-1]}"


def _gutter(names: Sequence[str], most: int) -> tuple[float, list[str]]:
    """Width of a column of names, and the names cut to it."""
    short = [_short(name, most) for name in names]
    return max(cell_len(name) for name in short) * _LETTER + 10, short


def _layer_ticks(layers: int) -> list[int]:
    """About ten layers at most, at a round distance."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if layers / step <= 10)
    return list(range(0, layers, step))


def _layer_axis(drawing: Drawing, x0: float, cell: float, numbers: Sequence[int], y: float) -> None:
    for place in _layer_ticks(len(numbers)):
        drawing.text(x0 + (place + 0.5) * cell, y, str(numbers[place]), "faint small", "middle")


def bars(rows: Sequence[Mark], largest: float, label: str, *, width: float = 480, rule: float | None = None) -> Markup:
    """Horizontal bars from zero; `largest` is the value of a full bar, `rule` a value marked by a dashed line."""
    height, step = len(rows) * 26 + 2, 26
    gutter, names = _gutter([row.name for row in rows], 18)
    room = width - gutter - max(cell_len(row.text) for row in rows) * _LETTER - 8
    drawing = Drawing(width, height, label)
    for number, row in enumerate(rows):
        y = number * step
        length = row.value / largest * room if largest else 0.0
        drawing.text(gutter - 10, y + 17, names[number], "ink", "end", row.name if names[number] != row.name else "")
        drawing.rect(gutter, y + 4, room, 18, "track", rx=3)
        drawing.rect(gutter, y + 4, max(length, 1.0), 18, f"bar {row.kind}", row.title, rx=3)
        drawing.text(gutter + room + 8, y + 17, row.text, "number")
    if rule is not None:
        x = gutter + rule / largest * room
        drawing.line(x, 0, x, height, "rule")
    return drawing.markup()


def ladder(marks: Sequence[Mark], span: tuple[str, str, str] | None, label: str, *, width: float = 1040) -> Markup:
    """Named points on one axis of values. `span` is (from, to, reached): kinds of the marks that a gap lies between."""
    low, high = min(m.value for m in marks), max(m.value for m in marks)
    pad, scale = 70.0, (width - 140) / ((high - low) or 1.0)
    places = [pad + (mark.value - low) * scale for mark in marks]
    levels = _levels([(x, max(cell_len(m.name), cell_len(m.text)) * _LETTER) for x, m in zip(places, marks)])
    axis = (max(levels) + 1) * 44.0 + 14
    drawing = Drawing(width, axis + 16, label)
    drawing.line(0, axis, width, axis, "axis")
    if span is not None:
        at = {mark.kind: x for x, mark in zip(places, marks)}
        start, end, reached = (at[kind] for kind in span)
        drawing.rect(min(start, end), axis - 5, abs(end - start), 10, "track strong", rx=5)
        closed = min(
            max(reached, min(start, end)), max(start, end)
        )  # a merge may be worse than the beginning of the gap
        drawing.rect(min(start, closed), axis - 5, abs(closed - start), 10, "bar merged", rx=5)
    for x, level in zip(places, levels):
        drawing.line(x, axis - 12 - level * 44.0, x, axis, "lead")
    for mark, x, level in zip(marks, places, levels):
        y = axis - 34 - level * 44.0
        drawing.add("circle", cx=x, cy=axis, r=7.0, class_=f"dot {mark.kind}", title=f"{mark.name}: {mark.text}")
        kind = "strong" if mark.kind in ("merged", "model") else "ink"
        drawing.text(x, y, mark.name, f"{kind} halo", "middle")
        drawing.text(x, y + 16, mark.text, "number halo", "middle")
    return drawing.markup()


def _levels(labels: Sequence[tuple[float, float]]) -> list[int]:
    """For (middle, width) of labels, the lowest row of each where it does not touch a label that is placed already."""
    rows: list[tuple[float, float, int]] = []
    for middle, width in labels:
        taken = {level for x, other, level in rows if abs(x - middle) < (width + other) / 2 + 12}
        rows.append((middle, width, next(level for level in range(len(labels)) if level not in taken)))
    return [level for _, _, level in rows]


def heatmap(
    rows_LE: Sequence[Sequence[float]],
    experts: Sequence[str],
    own: int | None,
    label: str,
    *,
    numbers: Sequence[int],
    width: float = 510,
) -> Markup:
    """Layers from left to right, experts from top to bottom; the opacity of a cell is its share. `numbers` are those of
    the layers."""
    layers, count = len(rows_LE), len(experts)
    gutter, names = _gutter(experts, 14)
    step = 24.0 if count <= 8 else 16.0
    cell = (width - gutter - 2) / layers
    gap = 1.0 if cell > 4 else 0.4
    drawing = Drawing(width, count * step + 22, label)
    for expert in range(count):
        y = expert * step
        kind = "strong" if expert == own else "ink"
        drawing.text(gutter - 8, y + step / 2 + 4, names[expert], kind, "end", experts[expert])
        drawing.rect(gutter, y + 1, width - gutter - 2, step - 2, "track")
        for layer, shares in enumerate(rows_LE):
            if shares[expert] >= 0.005:
                title = f"layer {numbers[layer]}, {experts[expert]}: {shares[expert]:.0%}"
                x = gutter + layer * cell
                strength = f"{shares[expert]:.2f}"
                drawing.rect(x, y + 1, cell - gap, step - 2, f"bar {expert_kind(expert)}", title, fill_opacity=strength)
    if own is not None:
        drawing.line(gutter - 3, own * step + 2, gutter - 3, (own + 1) * step - 2, f"notch {expert_kind(own)}")
    _layer_axis(drawing, gutter, cell, numbers, count * step + 16)
    return drawing.markup()


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    own: Sequence[int | None],
    label: str,
) -> Markup:
    """Shares of each row by column, as numbers on cells with the share as opacity; own cells are framed."""
    gutter, names = _gutter(rows, 16)
    width = 510.0
    cell = (width - gutter) / len(columns)
    upright = all(cell_len(name) <= int((cell - 4) / _LETTER) for name in columns)
    if not upright:  # the last head leans over the edge
        cell -= 36 / len(columns)
    tall = min(46.0, max(26.0, cell * 0.7))
    head = 22.0 if upright else min(14, max(cell_len(name) for name in columns)) * _LETTER * 0.86 + 14
    drawing = Drawing(width, head + len(rows) * tall + 4, label)
    for number, name in enumerate(columns):
        _column_head(drawing, gutter + (number + 0.5) * cell, head - 8, name, upright=upright)
    for row, name in enumerate(rows):
        y = head + row * tall
        drawing.text(gutter - 10, y + tall / 2 + 4, names[row], "ink", "end", name)
        for column, share in enumerate(shares[row]):
            x = gutter + column * cell
            title = f"{name} to {columns[column]}: {share:.1%}"
            strength, kind = f"{share * 0.75:.2f}", expert_kind(column)
            drawing.rect(x + 1, y + 1, cell - 2, tall - 2, "track", rx=3)
            drawing.rect(x + 1, y + 1, cell - 2, tall - 2, f"bar {kind}", title, fill_opacity=strength, rx=3)
            text = f"{share:.0%}" if cell >= 44 else f"{share * 100:.0f}"
            drawing.text(x + cell / 2, y + tall / 2 + 4, text, "cell strong" if share >= 0.5 else "cell", "middle")
            if column == own[row]:
                drawing.rect(x + 2, y + 2, cell - 4, tall - 4, f"frame {kind}", rx=3)
    return drawing.markup()


def _column_head(drawing: Drawing, x: float, y: float, name: str, *, upright: bool) -> None:
    if upright:
        drawing.text(x, y, name, "ink", "middle")
    else:
        drawing.add("text", _short(name, 14), x=x, y=y, class_="ink", transform=f"rotate(-62 {x:.1f} {y:.1f})")


def lines(series: Sequence[Series], numbers: Sequence[int], label: str) -> Markup:
    """Shares by layer as lines from 0 to 100%; dashed lines are chance, names are above. `numbers` are those of the
    layers."""
    layers = len(numbers)
    width, height, x0, y0 = 510.0, 250.0, 44.0, 34.0
    plot_w, plot_h = width - x0 - 10, height - y0 - 40
    drawing = Drawing(width, height, label)
    dot = 3.0 if layers <= 40 else 1.5

    def y_of(share: float) -> float:
        return y0 + (1 - share) * plot_h

    def x_of(layer: int) -> float:
        return x0 + (layer + 0.5) * plot_w / layers

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawing.line(x0, y_of(share), width - 10, y_of(share), "line")
        drawing.text(x0 - 8, y_of(share) + 4, f"{share:.0%}", "faint small", "end")
    _layer_axis(drawing, x0, plot_w / layers, numbers, height - 22)
    drawing.text(x0 + plot_w / 2, height - 4, "layer", "faint small", "middle")
    for number, one in enumerate(series):
        key = x0 + number * plot_w / max(2, len(series))
        drawing.line(key, 12, key + 22, 12, f"curve {one.kind}")
        drawing.text(key + 28, 16, one.name, "ink")
        drawing.line(x0, y_of(one.chance), width - 10, y_of(one.chance), f"chance {one.kind}")
        points = " ".join(f"{x_of(n):.1f},{y_of(value):.1f}" for n, value in enumerate(one.values))
        drawing.add("polyline", points=points, class_=f"curve {one.kind}")
        for layer, value in enumerate(one.values):
            title = f"layer {numbers[layer]}, {one.name}: {value:.1%}"
            drawing.add("circle", cx=x_of(layer), cy=y_of(value), r=dot, class_=f"point {one.kind}", title=title)
    return drawing.markup()


def stack(
    rows_LE: Sequence[Sequence[float]],
    experts: Sequence[str],
    entropy: Sequence[float],
    label: str,
    *,
    numbers: Sequence[int],
) -> Markup:
    """One bar per layer, divided by the experts' shares, above a line of the layers' entropy (0 to 1). `numbers` are
    those of the layers."""
    width, top, tall, low, gap = 700.0, 4.0, 180.0, 44.0, 26.0
    x0 = 58.0
    cell = (width - x0) / len(rows_LE)
    base = top + tall + gap
    drawing = Drawing(width, base + low + 36, label)
    space = min(3.0, cell * 0.2)
    for share in (0.0, 0.5, 1.0):
        drawing.text(x0 - 8, top + (1 - share) * tall + 4, f"{share:.0%}", "faint small", "end")
    for layer, shares in enumerate(rows_LE):
        y = top
        for expert, share in enumerate(shares):
            title = f"layer {numbers[layer]}, {experts[expert]}: {share:.1%}"
            drawing.rect(
                x0 + layer * cell, y, cell - space, max(0.3, share * tall - 0.7), f"bar {expert_kind(expert)}", title
            )
            y += share * tall
        title = f"layer {numbers[layer]}, entropy {entropy[layer]:.3f}"
        size = entropy[layer] * low
        drawing.rect(x0 + layer * cell, base + low - size, cell - space, size, "bar spread", title)
    drawing.line(x0, base, width, base, "rule")
    drawing.text(x0 - 8, base + 4, "even", "faint small", "end")
    drawing.text(x0 - 8, base + low, "entropy", "faint small", "end")
    _layer_axis(drawing, x0, cell, numbers, base + low + 16)
    drawing.text(x0 + (width - x0) / 2, base + low + 33, "layer", "faint small", "middle")
    return drawing.markup()
