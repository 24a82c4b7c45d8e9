"""Parsing of how a config names a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.config.model_refs import ModelRef, PathRef, parse_model_ref


def ref(path: str, revision: str | None = None, adapter: tuple[str, str | None] | None = None) -> ModelRef:
    return ModelRef(
        model=PathRef(path=path, revision=revision),
        adapter=PathRef(path=adapter[0], revision=adapter[1]) if adapter else None,
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("org/name", ref("org/name")),
        ("  org/name ", ref("org/name")),
        ("org/name@v1", ref("org/name", "v1")),
        ("org/name@refs/pr/3", ref("org/name", "refs/pr/3")),
        ("org/name+org/lora", ref("org/name", None, ("org/lora", None))),
        ("org/name@v1+org/lora@v2", ref("org/name", "v1", ("org/lora", "v2"))),
        ("./not-there-yet", ref("./not-there-yet")),
        ({"model": "org/name"}, ref("org/name")),
        ({"model": "org/name+org/lora"}, ref("org/name", None, ("org/lora", None))),
        ({"model": {"path": "org/name", "revision": "v1"}}, ref("org/name", "v1")),
        ({"model": "org/name@v1", "lora": "org/lora@v2"}, ref("org/name", "v1", ("org/lora", "v2"))),
        (
            {"model": {"path": "a/b"}, "lora": {"path": "c/d", "revision": "e"}},
            ref("a/b", None, ("c/d", "e")),
        ),
        ({"model": {"path": "a/b"}, "lora": None, "override_architecture": None}, ref("a/b")),
    ],
)
def test_forms(value: object, expected: ModelRef) -> None:
    assert parse_model_ref(value) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["org/name", "org/name@v1", "a/b+c/d", "a/b@v1+c/d@v2"])
def test_written_back(text: str) -> None:
    assert str(parse_model_ref(text)) == text


@pytest.mark.parametrize(
    ("name", "expected_path", "expected_adapter"),
    [
        ("with+plus", "with+plus", None),
        ("with@at", "with@at", None),
        ("a+b+c", "a+b+c", None),
        ("with+plus+org/lora", "with+plus", "org/lora"),
        ("with@at+org/lora", "with@at", "org/lora"),
        ("org/name+with+plus", "org/name", "with+plus"),
    ],
)
def test_an_existing_folder_wins_over_splitting(
    name: str,
    expected_path: str,
    expected_adapter: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("with+plus", "with@at", "a+b+c"):
        (tmp_path / folder).mkdir()
    parsed = parse_model_ref(name)
    assert parsed.model == PathRef(path=expected_path)
    assert (parsed.adapter.path if parsed.adapter else None) == expected_adapter


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "the model is empty; write 'model'"),
        ("   ", "the model is empty"),
        ("+org/lora", "the model is empty"),
        ("org/name+", "the adapter is empty"),
        ("a/b+c/d+e/f", r"has 2 '\+', but a model takes one adapter"),
        ("@v1", "has a revision but no model before the '@'"),
        ("org/name@", "the revision after '@' in 'org/name@' is empty"),
        ("org/name@v1+org/lora@", "the revision after '@' in 'org/lora@' is empty"),
        ("org/name@a@b", "more than one '@'"),
        (None, "a model is a string or a mapping with 'model' and 'lora', not nothing"),
        (3, "not int 3"),
        (["a/b"], "not list"),
        ({}, "has no 'model'"),
        ({"lora": "a/b"}, "has no 'model'"),
        ({"model": "a/b", "adapter": "c/d"}, "unknown key adapter in a model; known: lora, model"),
        (
            {"model": {"path": "a/b", "rev": "x", "sub": 1}},
            "unknown keys rev, sub in 'model'; known: path, revision",
        ),
        ({"model": {"revision": "x"}}, "'model' needs a 'path'"),
        ({"model": {"path": ""}}, "'model' needs a 'path'"),
        (
            {"model": {"path": "a/b", "revision": 3}},
            "'revision' of 'model' must be a branch, tag or commit .* not 3",
        ),
        ({"model": ["a/b"]}, "'model' is a string or a mapping"),
        ({"model": "a/b", "lora": 3}, "'lora' is a string or a mapping"),
        ({"model": "a/b", "override_architecture": "X"}, "'override_architecture' is not supported"),
    ],
)
def test_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model_ref(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["model", "lora"])
@pytest.mark.parametrize("revision", ["https://user:hidden@host/x", "s3://AK:hid/den@b/x", "https:/user:hidden@host/x"])
def test_a_revision_with_credentials_is_refused_without_them(role: str, revision: str) -> None:
    value = {"model": "org/name", "lora": "org/lora", role: {"path": "org/name", "revision": revision}}
    with pytest.raises(ValueError, match="credentials") as caught:
        parse_model_ref(value)
    assert "hid" not in str(caught.value)
