"""Parsing of how a config names a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.config.model_refs import ModelRef, PathRef, parse_model_ref, paths_in_label, short_name


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


@pytest.mark.parametrize(
    ("value", "path", "revision", "expert", "adapter"),
    [
        ("org/mix#2", "org/mix", None, 2, None),
        ("org/mix@v1#0", "org/mix", "v1", 0, None),
        ("org/mix#shared", "org/mix", None, "shared", None),
        ("org/mix#12+org/lora", "org/mix", None, 12, "org/lora"),
        ("s3://bucket/mix#3", "s3://bucket/mix", None, 3, None),
        ({"model": "org/mix", "expert": 2}, "org/mix", None, 2, None),
        ({"model": "org/mix#2", "expert": 2}, "org/mix", None, 2, None),
        ({"model": {"path": "org/mix", "revision": "v1"}, "expert": "shared"}, "org/mix", "v1", "shared", None),
        ({"model": "org/mix#2", "lora": "org/lora"}, "org/mix", None, 2, "org/lora"),
        ({"model": {"path": "s3://bucket/mix#3"}}, "s3://bucket/mix#3", None, None, None),
        ("./folder#x", "./folder#x", None, None, None),
        ("./folder#", "./folder#", None, None, None),
    ],
)
def test_experts_of_mixtures(
    value: object, path: str, revision: str | None, expert: int | str | None, adapter: str | None
) -> None:
    parsed = parse_model_ref(value)  # type: ignore[arg-type]
    lora = None if adapter is None else PathRef(path=adapter)
    assert parsed == ModelRef(model=PathRef(path=path, revision=revision), adapter=lora, expert=expert)


def test_a_folder_wins_over_the_number_of_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mix#2", "with+plus"):
        (tmp_path / name).mkdir()
    assert parse_model_ref("mix#2") == ref("mix#2")
    assert parse_model_ref("mix#2#1") == ModelRef(model=PathRef(path="mix#2"), expert=1)
    assert parse_model_ref("with+plus#1") == ModelRef(model=PathRef(path="with+plus"), expert=1)


def test_labels_name_their_models() -> None:
    commit = "0123456789" * 4
    assert paths_in_label(f"org/mix@{commit}#2+./lora") == [f"org/mix@{commit}", "./lora"]
    assert short_name(f"org/mix@{commit}#2", None) == "mix#2"


@pytest.mark.parametrize(
    "text", ["org/name", "org/name@v1", "a/b+c/d", "a/b@v1+c/d@v2", "a/b#2", "a/b@v1#2+c/d@v2", "a/b#shared"]
)
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
        ({"model": "a/b", "adapter": "c/d"}, "unknown key adapter in a model; known: expert, lora, model"),
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
