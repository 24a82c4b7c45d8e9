"""Imports go one way: no circle among modules, none among packages, those inside functions and for types included."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import raymoe
from tests.package_source import all_nodes

Graph = Mapping[str, set[str]]

ROOT = Path(raymoe.__file__).parent


def modules_of(root: Path) -> dict[str, Path]:
    """Each module and package below `root`, by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(tree: ast.AST, package: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a module imports anywhere in its text. `package` is what its relative imports start from."""
    for node in all_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{base}.{alias.name}" in modules:
                    yield f"{base}.{alias.name}"
                elif base in modules:
                    yield base


def import_graph(root: Path) -> dict[str, set[str]]:
    modules = modules_of(root)
    graph = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set(imports_of(ast.parse(path.read_text()), package, modules)) - {name}
    return graph


def among_children(graph: Graph, package: str) -> dict[str, set[str]]:
    """The graph of what is directly in `package`: its modules, and its packages with all that is in them."""
    depth = package.count(".") + 2
    inside = {name: ".".join(name.split(".")[:depth]) for name in graph if name.startswith(f"{package}.")}
    children: dict[str, set[str]] = defaultdict(set)
    for name, child in inside.items():
        children[child] |= {inside[other] for other in graph[name] if other in inside} - {child}
    return dict(children)


def circles(graph: Graph) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def in_words(found: list[list[str]], graph: Graph) -> str:
    """Each circle with its arrows."""
    return "\n\n".join(
        "\n".join(f"{node} -> {', '.join(sorted(graph[node] & set(circle)))}" for node in circle) for circle in found
    )


@functools.cache
def _graph() -> Graph:
    return import_graph(ROOT)


def test_modules_import_in_no_circle() -> None:
    graph = _graph()
    assert len(graph) > 100
    found = circles(graph)
    assert not found, in_words(found, graph)


def test_packages_import_in_no_circle() -> None:
    graph = _graph()
    packages = [name for name, path in modules_of(ROOT).items() if path.name == "__init__.py"]
    for package in packages:
        children = among_children(graph, package)
        found = circles(children)
        assert not found, in_words(found, children)


@pytest.mark.parametrize(
    ("back", "names"),
    [
        ("from pack.one.a import x", ["pack.one.a", "pack.two.b"]),
        ("def f():\n    import pack.one.a", ["pack.one.a", "pack.two.b"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..one import a", ["pack.one.a", "pack.two.b"]),
        ("from pack.one import c", None),
    ],
)
def test_a_circle_is_found_and_named(tmp_path: Path, back: str, names: list[str] | None) -> None:
    texts = {"one/a": "from pack.two import b", "one/c": "", "two/b": back}
    for name, text in texts.items():
        path = tmp_path / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (tmp_path / "pack/__init__.py").touch()
    graph = import_graph(tmp_path / "pack")
    assert circles(graph) == ([names] if names else [])
    # One folder needs the other and is needed by it, though no module is.
    assert circles(among_children(graph, "pack")) == [["pack.one", "pack.two"]]
