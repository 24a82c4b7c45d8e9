"""Finding and indexing the weights of a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError
from raymoe.sources.folder_protocol import is_inside
from raymoe.sources.local_folder import LocalFolder
from raymoe.sources.resolve import resolve_model
from raymoe.sources.weight_index import index_adapter_weights, index_model_weights
from tests.sources.checkpoints import Tensors, write_json, write_sharded

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def zeros(*names: str) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.full(3, index, "float32") for index, name in enumerate(names)}


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        index_model_weights(LocalFolder(str(folder)))
    return caught.value


def test_one_file(make_model: Callable[..., Path], tensors: Tensors) -> None:
    folder = make_model()
    index = index_model_weights(LocalFolder(str(folder)))
    assert [file.location for file in index.files] == [str(folder / "model.safetensors")]
    data = (folder / "model.safetensors").read_bytes()
    assert index.files[0].size == len(data)
    assert {n: data[e.start : e.end] for n, e in index.tensors.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, {A: zeros("a", "b"), B: zeros("c")})
    index = index_model_weights(LocalFolder(str(tmp_path)))
    assert {name: entry.file.name for name, entry in index.tensors.items()} == {"a": A, "b": A, "c": B}
    assert [file.name for file in index.files] == [A, B]


def test_a_relative_path_becomes_absolute_and_symlinks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a snapshot folder of the Hub cache, whose files are links to blobs named by their hash."""
    save_file(zeros("a"), tmp_path / "blob")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blob")
    monkeypatch.chdir(tmp_path)
    (file,) = index_model_weights(LocalFolder("snapshot")).files
    assert file.location == str(tmp_path / "snapshot" / "model.safetensors")
    assert file.size == (tmp_path / "blob").stat().st_size


def test_a_tensor_in_two_shards_is_taken_from_the_last(tmp_path: Path) -> None:
    """transformers loads shards in the order of their names, whatever the index says of a tensor."""
    weight_map = write_sharded(tmp_path, {A: zeros("a", "tied"), B: zeros("tied", "c")})
    assert index_model_weights(LocalFolder(str(tmp_path))).tensors["tied"].file.name == B
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {**weight_map, "tied": A}})
    assert f"'tied' in {A} and in {B}: transformers takes the last" in str(refused(tmp_path))


def test_a_tensor_in_two_shards_and_not_in_the_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, {A: zeros("a", "tied"), B: zeros("tied", "c")})
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": A, "c": B}})
    assert f"'tied' in {A} and in {B}: transformers takes the last" in str(refused(tmp_path))


def test_a_tensor_that_only_the_shard_knows_is_part_of_the_model(tmp_path: Path) -> None:
    write_sharded(tmp_path, {A: zeros("a", "extra")})
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": A}})
    assert set(index_model_weights(LocalFolder(str(tmp_path))).tensors) == {"a", "extra"}


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "a\\b.safetensors",
        "",
        "a\0b",
        "C:x",
    ],
)
def test_an_index_must_stay_in_its_folder(tmp_path: Path, name: str) -> None:
    assert not is_inside(name)
    write_sharded(tmp_path / "m", {A: zeros("a")})
    save_file(zeros("b"), tmp_path / "model.safetensors")
    write_json(tmp_path / "m" / "model.safetensors.index.json", {"weight_map": {"a": A, "b": name}})
    error = refused(tmp_path / "m")
    assert f"names the file {name!r}, which is not inside the folder" in str(error)
    assert error.problems[0].where == str(tmp_path / "m" / "model.safetensors.index.json")


def test_a_subfolder_is_inside() -> None:
    assert is_inside("weights/model-1.safetensors")


def test_missing_shards_are_named_together(tmp_path: Path) -> None:
    write_sharded(tmp_path, {A: zeros("a"), B: zeros("b")})
    os.remove(tmp_path / A)
    os.remove(tmp_path / B)
    (tmp_path / B).symlink_to("../blobs/gone")
    error = refused(tmp_path)
    assert len(error.problems) == 2
    assert f"{A} is missing, but model.safetensors.index.json names it" in str(error)
    assert f"{B} is a symlink to nothing" in str(error)


def test_an_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path, {A: zeros("a", "moved"), B: zeros("c")})
    weight_map = {"a": A, "moved": B, "c": B, "gone": A}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    text = str(refused(tmp_path))
    assert f"{B}: the index file names this file for 'moved', found in {A} instead" in text
    assert f"{A}: the index file names this file for 'gone', found in no file" in text


def test_an_index_that_disagrees_with_many_shards(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00012.safetensors" for number in range(1, 13)]
    write_sharded(tmp_path, {name: zeros(f"t{number}") for number, name in enumerate(names)})
    weight_map = {f"t{number - 1}": name for number, name in enumerate(names)}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    found = refused(tmp_path).problems
    assert len(found) == 6 and found[-1].what == "and more problems of this kind"


def test_tensors_that_many_shards_hold(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00012.safetensors" for number in range(1, 13)]
    held = {name: zeros("all", *(f"from {other}" for other in range(number + 1))) for number, name in enumerate(names)}
    write_sharded(tmp_path, held)
    weight_map = {f"x{name}": name for name in names} | {"all": names[0]}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    found = [problem for problem in refused(tmp_path).problems if "transformers takes the last" in problem.what]
    assert "and 7 more: transformers takes the last" in found[0].what
    assert len(found) == 5


def test_every_broken_shard_is_reported(tmp_path: Path) -> None:
    write_sharded(tmp_path, {A: zeros("a"), B: zeros("c")})
    for name in (A, B):
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 2)
    error = refused(tmp_path)
    assert [problem.where for problem in error.problems] == [str(tmp_path / A), str(tmp_path / B)]
    assert all("(truncated)" in problem.what for problem in error.problems)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json: not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "'weight_map' is missing, empty or not an object"),
        ('{"weight_map": []}', "'weight_map' is missing, empty or not an object"),
        ('{"weight_map": {"a": 1}}', "values that are not file names"),
        ('{"weight_map": {"a": "model.bin"}}', "names the file 'model.bin', which is no .safetensors file"),
        ('{"weight_map": {"a": "\\ud800"}}', "not inside the folder"),
    ],
)
def test_broken_index(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert message in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights found (model.safetensors, model.safetensors.index.json, pytorch_model.bin)"),
        ([A, B], f"found 2 shards ({A}, ...) but no model.safetensors.index.json"),
        (["pytorch_model-00001-of-00002.bin"], "but no pytorch_model.bin.index.json"),
        (["model.Q4_K.gguf"], "no weights found .*, only model.Q4_K.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], "this is a LoRA adapter, not a whole model"),
    ],
)
def test_no_weights(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        index_model_weights(LocalFolder(str(tmp_path)))
    assert all(part in str(caught.value) for part in message.split(".*"))
    assert caught.value.problems[0].remedy


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors") == {}
    assert "the weight files hold no tensors" in str(refused(tmp_path))


def test_adapter_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        index_adapter_weights(LocalFolder(str(tmp_path)))
    save_file(zeros("x"), tmp_path / "adapter_model.safetensors")
    assert set(index_adapter_weights(LocalFolder(str(tmp_path))).tensors) == {"x"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    os.chmod(folder / "model.safetensors", 0)
    assert "can't be read: Permission denied" in str(refused(folder))


def test_many_missing_shards_are_counted(tmp_path: Path) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {f"t{n}": f"s{n}.bin" for n in range(3000)}})
    said = str(refused(tmp_path))
    assert "and 2995 more files of the index that can't be used" in said
    assert len(said) < 5000


def test_links_out_of_the_folder(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """What they lead to would be published with the merge."""
    (tmp_path / "secret").write_text("key = XYZ")
    model = make_model()
    (model / "inside.json").write_text("{}")
    (model / "generation_config.json").symlink_to("inside.json")
    (model / "own.py").symlink_to(tmp_path / "secret")
    facts = resolve_model(parse_model_ref(str(model)))
    assert "generation_config.json" in [side.name for side in facts.side_files]
    assert not facts.python_files
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: this link leads out .*\n.*copy the file there"):
        resolve_model(parse_model_ref(str(model)))


@pytest.mark.parametrize("blobs", ["models--org--m", "models--org--other"])
def test_links_of_the_hubs_cache(make_model: Callable[..., Path], tmp_path: Path, blobs: str) -> None:
    snapshot = tmp_path / "cache" / "models--org--m" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    make_model().rename(snapshot)
    target = tmp_path / "cache" / blobs / "blobs" / "abc"
    target.parent.mkdir(parents=True)
    target.write_text("{{ messages }}")
    (snapshot / "chat_template.jinja").symlink_to(target)
    if blobs == "models--org--m":
        assert resolve_model(parse_model_ref(str(snapshot))).side_files
    else:
        with pytest.raises(CheckpointError, match="this link leads out of the model's folder"):
            resolve_model(parse_model_ref(str(snapshot)))
