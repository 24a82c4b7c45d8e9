"""docs/troubleshooting.md quotes messages that exist, and has all that do not carry their own remedy.

A message is a string literal of the package; the values in it are placeholders. On the page `...` stands for them.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from raymoe.errors import ProblemReport, RaymoeError
from tests.package_source import all_nodes, trees

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs/troubleshooting.md"
VALUE = "\0"

# Exceptions whose text is that of a message which is held elsewhere: of a problem, or of another exception.
PASSED_ON = {"str", "not_finite_message", "last_words"}
# Problems without a remedy of their own: their text is an error's, which says what to write.
SAYS_IT_ALL = {"str(error)", "what"}


def template(node: ast.expr) -> str:
    """The fixed words of an expression, with `VALUE` for everything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return VALUE


def docstrings(tree: ast.Module) -> set[int]:
    """The nodes of a module that are expressions of their own: docstrings, of attributes too."""
    return {id(node.value) for node in all_nodes(tree) if isinstance(node, ast.Expr)}


@cache
def messages() -> tuple[str, ...]:
    """All texts of the package with a space in them."""
    found = set()
    for tree in trees().values():
        skipped = docstrings(tree)
        for node in all_nodes(tree):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in skipped:
                found.add(" ".join(template(node).split()))
    return tuple(text for text in found if " " in text)


@cache
def quotes() -> tuple[str, ...]:
    """The messages in the first columns of the page's tables of messages."""
    found: list[str] = []
    for table in re.findall(
        r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    ):
        for row in table.splitlines():
            found += re.findall(r"`([^`]+)`", row.split(" | ")[0])
    return tuple(found)


def is_quoted(message: str, quote: str) -> bool:
    """Whether the fixed words of a quote are in a message, in this order."""
    at = 0
    for words in quote.split("..."):
        if (found := message.find(words.strip(), at)) < 0:
            return False
        at = found + len(words.strip())
    return True


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


def calls() -> Iterator[tuple[str, ast.Call]]:
    """All calls of the package, each with its file and line."""
    for path, tree in trees().items():
        for node in all_nodes(tree):
            if isinstance(node, ast.Call):
                yield f"raymoe/{path}:{node.lineno}", node


@cache
def exceptions() -> dict[str, type[RaymoeError]]:
    """Every exception whose message is written for the user, by its name."""
    for path, tree in trees().items():
        names = {
            base for node in all_nodes(tree) if isinstance(node, ast.ClassDef) for base in map(ast.unparse, node.bases)
        }
        if any(name.endswith(("Error", "Report", "Failed")) for name in names):
            importlib.import_module(f"raymoe.{path.removesuffix('.py').replace('/', '.')}")
    found: dict[str, type[RaymoeError]] = {}
    waiting = [RaymoeError]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            if kind.__module__.startswith("raymoe."):
                found[kind.__name__] = kind
                waiting.append(kind)
    return found


def test_each_quote_is_a_message() -> None:
    assert len(quotes()) > 150
    assert [quote for quote in quotes() if not any(is_quoted(message, quote) for message in messages())] == []


def test_quotes_have_words_to_be_found_by() -> None:
    assert [quote for quote in quotes() if len(quote.replace("...", "").split()) < 2] == []


def test_no_message_is_on_the_page_twice_in_the_same_words() -> None:
    assert [quote for quote in set(quotes()) if quotes().count(quote) > 1] == []


def test_exceptions_are_on_the_page_with_their_exit_statuses() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| exception |")[2].partition("\n\n")[0]
    rows = [row.split("|") for row in table.splitlines()[2:]]
    statuses = {name: int(row[-2]) for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert statuses == {name: kind.exit_code for name, kind in exceptions().items()}


def test_what_ends_a_command_that_had_begun_is_on_the_page() -> None:
    """Reports of problems say what to do after an arrow; other exceptions are one sentence or two."""
    kinds = {name for name, kind in exceptions().items() if not issubclass(kind, ProblemReport)}
    missing = []
    for place, node in calls():
        if called(node) in kinds and node.args:
            text = " ".join(template(node.args[0]).split())
            known = ast.unparse(node.args[0]).split("(")[0] in PASSED_ON or not re.search("[a-z]", text)
            if not known and not any(is_quoted(text, quote) for quote in quotes()):
                missing.append(f"{place}: {text!r}")
    assert missing == []


def test_problems_without_a_remedy_are_on_the_page() -> None:
    missing = []
    for place, node in calls():
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called(node) == "Problem" and "remedy" not in given and ast.unparse(given["what"]) not in SAYS_IT_ALL:
            text = " ".join(template(given["what"]).split())
            if not any(is_quoted(text, quote) for quote in quotes()):
                missing.append(f"{place}: {text!r}")
    assert missing == []


def test_warnings_while_a_command_runs_are_on_the_page() -> None:
    missing = []
    for place, node in calls():
        text = " ".join(template(node.args[0]).split()) if called(node) == "say" and node.args else ""
        is_warning = text.startswith("warning: ") and text != f"warning: {VALUE}"
        if is_warning and not any(is_quoted(text, quote) for quote in quotes()):
            missing.append(f"{place}: {text!r}")
    assert missing == []


@pytest.mark.parametrize(
    ("quote", "message"),
    [("the file ... is missing", f"the file {VALUE} is missing"), ("no ... here", f"no folder {VALUE} here: {VALUE}")],
)
def test_dots_stand_for_values(quote: str, message: str) -> None:
    assert is_quoted(message, quote)
    assert not is_quoted(message, f"{quote} at all")
