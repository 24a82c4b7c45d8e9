"""Kinds of places, and that only the modules that parse look at the text of one."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import raymoe
from raymoe.object_store.location import Location, LocationKind, is_relative
from raymoe.sources.facts import SourceFile
from tests.package_source import all_nodes, trees

LOCAL, S3, OTHER, HUB = LocationKind.LOCAL, LocationKind.S3, LocationKind.OTHER_STORE, LocationKind.HUB
IN_HUB = f"hf://org/name@{'0' * 40}/model.safetensors"


TEXTS = [
    ("/models/a", LOCAL),
    ("models/a", LOCAL),
    ("/odd/s3://name", LOCAL),
    ("", LOCAL),
    ("file:///models/a", LOCAL),
    ("local:///models/a", LOCAL),
    ("s3://bucket/a", S3),
    (" S3A://bucket/a", S3),
    ("gs://bucket/a", OTHER),
    ("memory://a", OTHER),
    ("https://host/a", OTHER),
    (IN_HUB, HUB),
    ("HF://org/name", HUB),
]


@pytest.mark.parametrize(("text", "kind"), TEXTS)
def test_kinds(text: str, kind: LocationKind) -> None:
    assert LocationKind.of(text) is kind
    assert (kind.is_local, kind.is_object) == (kind is LOCAL, kind not in (LOCAL, HUB))


def test_no_kind_is_left_out() -> None:
    assert {kind for _, kind in TEXTS} == set(LocationKind)


def test_places_that_users_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    for text, expected in {
        "out": Location(f"{tmp_path}/out", LOCAL),
        "~/out": Location("/home/user/out", LOCAL),
        "file:///data/out/": Location("/data/out", LOCAL),
        "s3a://bucket/out/": Location("s3://bucket/out", S3),
        "gs://bucket/out": Location("gs://bucket/out", OTHER),
        "hf://org/name": Location("hf://org/name", HUB),
    }.items():
        assert Location.parse(text) == expected
        assert Location.of(expected.text) == Location.parse(expected.text) == expected
        assert str(expected) == f"{expected}" == expected.text
    assert Location.parse(Path("out")) == Location.parse("out")


@pytest.mark.parametrize(
    "text", ["s3:/bucket/out", "s3://KEY:SECRET@bucket/out", "s3://bucket/a?X-Amz-Signature=SECRET"]
)
def test_what_is_misspelt_or_secret_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as error:
        Location.parse(text)
    assert "SECRET" not in str(error.value)


def test_files_of_a_folder() -> None:
    assert Location.parse("s3://bucket").join("a/b.json") == Location.parse("s3://bucket/a/b.json")
    assert Location.parse("/").join("b.json") == Location.parse("/b.json")


def test_web_addresses() -> None:
    assert [Location.parse(text).is_web_address for text in ("https://host/a", "http://host/a", "s3://http/a")] == [
        True,
        True,
        False,
    ]


def test_what_depends_on_the_working_directory_or_the_home_folder() -> None:
    assert all(map(is_relative, ("out", "./out", "~/out", "hf://org/name")))
    assert not any(map(is_relative, ("/out", "file:///out", "s3://bucket/out")))


def test_a_source_file_knows_its_kind() -> None:
    for location, kind in {"/models/a": LOCAL, "s3://bucket/a": S3, "memory://a": OTHER, IN_HUB: HUB}.items():
        file = SourceFile(location=location, size=1)
        for same in (file, replace(file, size=2), pickle.loads(pickle.dumps(file))):
            assert same.kind is kind
    assert replace(SourceFile(location="/models/a", size=1), location="s3://bucket/a").kind is S3


# --- the text of places is looked at in few modules only

PARSERS = {"object_store/urls.py", "object_store/location.py"}
# What is no place: URLs with passwords in any text, and addresses of servers.
OTHER_URLS = {"safe_text.py", "object_store/options.py", "runtime/start_errors.py", "submit/job_server.py"}
# They are given what users write, or URLs alone.
CALLERS = {
    "config/model_refs.py",
    "config/prompt_sources.py",
    "object_store/registry.py",
    "object_store/error_messages.py",
}
_TEXT_METHODS = ("startswith", "removeprefix", "partition", "rpartition", "split", "find", "index", "count")
_TESTS_OF_TEXT = ("is_url", "is_s3")


def text_tests(tree: ast.AST) -> Iterator[int]:
    """The lines where text is compared with, or searched for, the beginning of a URL."""
    for node in all_nodes(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _TEXT_METHODS:
            sides = node.args
        if any(text.endswith("://") for side in sides for text in _texts(side)):
            yield node.lineno


def _texts(node: ast.expr) -> list[str]:
    """The strings of a literal, alone or in a tuple."""
    literals = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return [each.value for each in literals if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def calls_of_tests(tree: ast.AST) -> Iterator[int]:
    """The lines that import a test of text."""
    for node in all_nodes(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name in _TESTS_OF_TEXT for alias in node.names):
            yield node.lineno


def test_no_other_module_tests_the_text_of_places() -> None:
    testing = {name for name, tree in trees().items() if any(text_tests(tree))}
    importing = {name for name, tree in trees().items() if any(calls_of_tests(tree))}
    assert len(trees()) > 100
    assert testing - PARSERS == OTHER_URLS
    assert importing - PARSERS == CALLERS


@pytest.mark.parametrize(
    "line",
    [
        '"://" in file.location',
        '"://" not in location',
        'location.startswith("hf://")',
        'location.lower().startswith(("http://", "https://"))',
        'scheme, _, rest = url.partition("://")',
        'location[:5] == "s3://"',
    ],
)
def test_what_is_found(line: str) -> None:
    assert list(text_tests(ast.parse(line))) == [1]
    assert not list(text_tests(ast.parse('f"hf://{label}/{name}" + join_url("s3://bucket", name)')))


def test_the_recipe_names_every_module_that_asks_for_s3() -> None:
    """Each is a place to look at for a store that also copies ranges, or takes parts."""
    root = Path(raymoe.__file__).parent
    recipe = (root.parent / "docs/contributing/store.md").read_text(encoding="utf-8")
    asking = [path.stem for path in root.rglob("*.py") if "LocationKind.S3" in path.read_text(encoding="utf-8")]
    assert len(asking) > 5
    assert [name for name in asking if f"{name}." not in recipe] == []
