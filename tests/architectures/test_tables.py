"""The tables are the only place that knows models by name, and each of their fields is described."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any

import pytest

from raymoe.architectures import (
    FAMILIES,
    MOE_ARCHITECTURES,
    DenseFamily,
    DenseSpec,
    MoeArchitecture,
    MoeShape,
    dense_family,
)
from raymoe.architectures.dense_family import Scan, TensorRow
from raymoe.architectures.moe_architecture import ConstantRow
from raymoe.architectures.unsupported_families import UNSUPPORTED
from raymoe.export.gguf.choose_target import Target
from raymoe.export.gguf.llama_cpp_archs import ARCHITECTURES, LlamaCppArchitecture
from tests.package_source import all_nodes, trees
from tests.pico import REPOSITORY

NAMES = frozenset(
    {
        *FAMILIES,
        *(name for family in UNSUPPORTED for name in family.model_types),
        *(name for each in MOE_ARCHITECTURES.values() for name in (each.name, each.model_type, each.class_name)),
        *(each.class_name.removesuffix("ForCausalLM") for each in MOE_ARCHITECTURES.values()),
        *ARCHITECTURES,
    }
)
PACKAGE = REPOSITORY / "raymoe"
TABLES = {"raymoe/architectures", "raymoe/export/gguf/llama_cpp_archs.py"}
# Names that are no question: where they are, and why.
ALLOWED = {
    # What is chosen, by how a merge routes.
    "raymoe/export/gguf/choose_target.py": {"llama", "bailingmoe", "glm4moe", "qwen2moe", "qwen3moe"},
    # llama.cpp's rule for the names that users give to files.
    "raymoe/export/gguf/added_tokens.py": {"phi3"},
    # llama.cpp's names of tokenizers and of the way they cut text.
    "raymoe/export/gguf/pretokenizer.py": {"gpt2", "qwen2"},
    "raymoe/export/gguf/vocabulary.py": {"gpt2", "llama"},
    # Quantization methods.
    "raymoe/sources/quantization_check.py": {"bitnet"},
    # AutoConfig reads one family as another. `sources` and `architectures` do not import each other.
    "raymoe/sources/resolve.py": {"mistral", "ministral"},
}
ALLOWED_COMPARISONS = {"raymoe/sources/resolve.py": {"mistral"}}


def _texts(*nodes: ast.AST) -> set[str]:
    found = (each.value for node in nodes for each in _walk(node) if isinstance(each, ast.Constant))
    return {value for value in found if isinstance(value, str)}


def _is_named(text: str) -> bool:
    """Whether it is a name, or the beginning of several."""
    return text in NAMES or sum(name.startswith(text) for name in NAMES if len(text) > 3) > 1


def _compared(tree: ast.AST) -> set[str]:
    """Texts that something is compared with: by an operator, a method of text, or a case."""
    found: set[str] = set()
    for node in all_nodes(tree):
        if isinstance(node, ast.Compare):
            found |= _texts(node.left, *node.comparators)
        elif isinstance(node, ast.MatchValue):
            found |= _texts(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            found |= _texts(*node.args)
    return found


def _walk(node: ast.AST) -> Iterable[ast.AST]:
    return all_nodes(node) if isinstance(node, ast.Module) else ast.walk(node)


def _modules() -> list[tuple[str, ast.AST]]:
    return [(f"raymoe/{path}", tree) for path, tree in trees().items()]


def test_nothing_is_compared_with_the_name_of_a_model() -> None:
    """Not in the tables' modules either: what differs between models is a field of their rows."""
    found = {path: {text for text in _compared(tree) if _is_named(text)} for path, tree in _modules()}
    assert {path: names for path, names in found.items() if names} == ALLOWED_COMPARISONS


def test_no_other_module_than_the_tables_names_a_model() -> None:
    found = {path: _texts(tree) & NAMES for path, tree in _modules() if not any(path.startswith(t) for t in TABLES)}
    assert {path: names for path, names in found.items() if names} == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        'spec.model_type == "llama"',
        'architecture.name in ("granite", "other")',
        '"qwen2_moe" != name',
        'spec.model_type.startswith("hunyuan")',
        'match name:\n    case "mixtral": pass',
    ],
)
def test_each_form_of_a_comparison_is_found(code: str) -> None:
    assert [text for text in _compared(ast.parse(code)) if _is_named(text)]


@pytest.mark.parametrize(
    "table",
    [
        *(TensorRow, Scan, DenseFamily, DenseSpec, ConstantRow, MoeShape, MoeArchitecture),
        *(LlamaCppArchitecture, Target),
    ],
    ids=lambda table: table.__name__,
)
def test_every_field_is_described(table: Any) -> None:
    """As an attribute in its docstring. Fields with the same subject stand together, whatever their order."""
    _, _, attributes = (inspect.getdoc(table) or "").partition("Attributes:\n")
    described = re.findall(r"^    (\w+): .{10,}$", attributes, re.MULTILINE)
    assert sorted(described) == sorted(field.name for field in dataclasses.fields(table))


def test_the_head_of_the_module_describes_how_a_row_is_written() -> None:
    """Each field, and each symbol of a shape that is no number and no key of the family's own."""
    text = dense_family.__doc__ or ""
    assert all(re.search(rf"^    {field.name} ", text, re.MULTILINE) for field in dataclasses.fields(TensorRow)[1:])
    for family in FAMILIES.values():
        for row in family.rows:
            sums = (*row.shape, *(rows for _, rows in row.fused))
            for symbol in (name for each in sums for name in re.split(r"[*+]", each)):
                is_described = re.search(rf"\b{symbol}\b", text)
                assert symbol.isdecimal() or symbol in family.carried or is_described, (family.title, symbol)


def test_every_flag_of_a_row_is_one() -> None:
    """`when` names a boolean of `DenseSpec`, or a key that the family carries."""
    flags = {field.name for field in dataclasses.fields(DenseSpec)} | {
        name for name, value in vars(DenseSpec).items() if isinstance(value, property)
    }
    for family in FAMILIES.values():
        for row in family.rows:
            assert not row.when or row.when.removeprefix("!") in flags | set(family.carried), (family.title, row.role)
