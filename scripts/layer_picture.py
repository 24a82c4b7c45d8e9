"""Draws docs/layers.svg: the layers of the package, and which package imports which.

    python scripts/layer_picture.py

The layers are those of `[tool.importlinter]` in pyproject.toml, the imports those of the code. A row imports what it
has a dot for; all dots are right of the diagonal, since a layer imports only from those below it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["PICTURE", "draw", "package_imports", "read_layers"]

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/layers.svg"
LABEL = "The packages of raymoe, one row each, layer by layer from top to bottom; a dot where a row imports a column"
CELL, LEFT, TOP, RIGHT = 22, 132, 112, 70
INK, FAINT, BAND, DOT = "#111827", "#d1d5db", "#f3f4f6", "#2563eb"

Layers = Sequence[Sequence[str]]


def main() -> None:
    PICTURE.write_text(draw(read_layers(), package_imports()), encoding="utf-8")


def read_layers() -> list[list[str]]:
    """From the highest to the lowest; those of one layer do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers"]
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def package_imports() -> set[tuple[str, str]]:
    """Pairs of what imports and what is imported, by names right below `raymoe`."""
    graph = grimp.build_graph("raymoe", cache_dir=None)
    pairs = {
        (importer.split(".")[1], imported.split(".")[1])
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if importer.count(".") and imported.count(".")
    }
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def draw(layers: Layers, imports: set[tuple[str, str]]) -> str:
    names = [name for layer in layers for name in layer]
    size = CELL * len(names)
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {LEFT + size + RIGHT} {TOP + size + 8}",
            "font-family": "monospace",
            "font-size": "12",
            "role": "img",
            "aria-label": LABEL,
        },
    )
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="#ffffff")
    _bands(root, layers, LEFT + size)
    for number, name in enumerate(names):
        middle = CELL * number + CELL // 2
        _text(root, LEFT - 10, TOP + middle + 4, name, "end")
        turned = _text(root, LEFT + middle + 4, TOP - 8, name, "start")
        turned.set("transform", f"rotate(-60 {LEFT + middle + 4} {TOP - 8})")
        _square(root, LEFT + middle, TOP + middle)
    for importer, imported in sorted(imports):
        x, y = (CELL * names.index(name) + CELL // 2 for name in (imported, importer))
        dot = ElementTree.SubElement(root, "circle", cx=str(LEFT + x), cy=str(TOP + y), r="5", fill=DOT)
        ElementTree.SubElement(dot, "title").text = f"{importer} imports {imported}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _bands(root: ElementTree.Element, layers: Layers, right: int) -> None:
    """One band for each layer, gray and white by turns, and a line below it."""
    top = TOP
    for number, layer in enumerate(layers):
        height = CELL * len(layer)
        if number % 2 == 0:
            ElementTree.SubElement(root, "rect", x="0", y=str(top), width=str(right), height=str(height), fill=BAND)
        top += height
        ElementTree.SubElement(root, "line", x1="0", x2=str(right), y1=str(top), y2=str(top), stroke=FAINT)


def _square(root: ElementTree.Element, x: int, y: int) -> None:
    """The diagonal: a package meets itself."""
    ElementTree.SubElement(root, "rect", x=str(x - 5), y=str(y - 5), width="10", height="10", fill=FAINT)


def _text(root: ElementTree.Element, x: int, y: int, text: str, anchor: str) -> ElementTree.Element:
    element = ElementTree.SubElement(root, "text", {"x": str(x), "y": str(y), "fill": INK, "text-anchor": anchor})
    element.text = text
    return element


if __name__ == "__main__":
    main()
