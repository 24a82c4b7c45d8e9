"""From refs to facts, for local models; and files fetched later."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raymoe.config.model_refs import PathRef, parse_model_ref
from raymoe.errors import CheckpointError
from raymoe.sources.folder_protocol import side_files
from raymoe.sources.hub import HubFolder, HubOptions
from raymoe.sources.resolve import fetch_file, fetch_side_files, resolve_model, resolve_models
from tests.sources.checkpoints import Tensors

Make = Callable[..., Path]


def test_facts(make_model: Make, tensors: Tensors) -> None:
    folder = make_model()
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "qwen.tiktoken",
        "modeling.py",
        "README.md",
        "chat_template.jinja",
    ):
        (folder / name).write_text("x")
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").write_text("y")
    facts = resolve_model(parse_model_ref(str(folder)))
    assert (facts.label, facts.revision, facts.adapter) == (str(folder), None, None)
    assert facts.config == {"model_type": "llama"}
    assert set(facts.index.tensors) == set(tensors)
    fetched = fetch_side_files(facts)
    assert list(fetched) == [
        "chat_template.jinja",
        "chat_templates/tool.jinja",
        "generation_config.json",
        "qwen.tiktoken",
        "tokenizer.json",
    ]
    assert fetched["chat_templates/tool.jinja"].read_text() == "y"
    assert pickle.loads(pickle.dumps(facts)) == facts


def test_a_relative_path_and_the_home_folder(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(parse_model_ref("model")).label == str(folder)
    assert resolve_model(parse_model_ref("~/model")).label == str(folder)


def test_several_models_and_all_their_problems(make_model: Make, tensors: Tensors, tmp_path: Path) -> None:
    good, bad_config, quantized = (
        make_model("good"),
        make_model("bad"),
        make_model(
            "q",
            tensors={"model.layers.0.up.qweight": np.zeros((3, 4), "int32")},
            config={"quantization_config": {"bits": 4}},
        ),
    )
    (bad_config / "config.json").write_text("{")
    os.truncate(bad_config / "model.safetensors", 20)
    refs = [parse_model_ref(str(path)) for path in (good, bad_config, quantized, tmp_path / "nowhere", good)]
    with pytest.raises(CheckpointError) as caught:
        resolve_models(refs)
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == [
        f"{bad_config}/config.json",
        f"{bad_config}/model.safetensors",
        str(quantized),
        str(tmp_path / "nowhere"),
    ]
    text = str(caught.value)
    for message in (
        "not valid JSON",
        "the file has only 20",
        "quantized with an unknown method, 4 bits",
        "not a Hub id",
    ):
        assert message in text
    facts = resolve_models([refs[0], refs[4]])
    assert list(facts) == [refs[0]]
    assert set(facts[refs[0]].index.tensors) == set(tensors)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "white space/x", "-x/y"])
def test_neither_a_folder_nor_a_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .* here \(/.*\), and not a Hub id such as org/name"):
        resolve_model(parse_model_ref(name))


def test_refused_paths(make_model: Make) -> None:
    folder = make_model()
    with pytest.raises(CheckpointError, match="a local folder has no revisions, but '@v1' asks for one"):
        resolve_model(parse_model_ref(f"{folder}@v1"))
    with pytest.raises(CheckpointError, match="this is a file; a model is named by its folder"):
        resolve_model(parse_model_ref(f"{folder}/model.safetensors"))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing\n.*complete the folder"):
        resolve_model(parse_model_ref(str(folder)))
    (folder / "config.json").write_text('"text"')
    with pytest.raises(CheckpointError, match="expected a JSON object, found str"):
        resolve_model(parse_model_ref(str(folder)))


def test_fetch_file_notices_what_changed(make_model: Make) -> None:
    folder = make_model()
    (file,) = resolve_model(parse_model_ref(str(folder))).index.files
    assert fetch_file(file) == folder / "model.safetensors"
    with open(folder / "model.safetensors", "ab") as handle:
        handle.write(b"x")
    with pytest.raises(
        CheckpointError, match=f"has {file.size + 1} bytes, but had {file.size} when the merge was planned"
    ):
        fetch_file(file)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there on this node \(.+\)\n.*every node sees it"):
        fetch_file(file)


def test_a_quantized_model_is_told_by_its_tensors_too(make_model: Make) -> None:
    folder = make_model("q", tensors={"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 4), "int32")})
    with pytest.raises(CheckpointError, match=r"quantized \(GPTQ or AWQ\)"):
        resolve_model(parse_model_ref(str(folder)))


def test_a_folder_called_chat_templates(make_model: Make) -> None:
    """A side file is called what it is called in the model's folder, whatever that folder is called."""
    folder = make_model("chat_templates")
    (folder / "tokenizer.json").write_text("{}")
    facts = resolve_model(parse_model_ref(str(folder)))
    assert list(fetch_side_files(facts)) == ["tokenizer.json"]


def test_side_files_are_at_the_top_or_in_chat_templates() -> None:
    """A name with more folders is no template, whatever it ends in."""
    names = ["tokenizer.json", "chat_template.jinja", "chat_templates/tool.jinja", "tokenization_own.py"]
    deeper = [
        "chat_templates/old/chat_template.jinja",
        "chat_templates/../../evil.jinja",
        "chat_templates/x/q.tiktoken",
    ]
    folder = HubFolder(PathRef(path="o/n"), "a" * 40, dict.fromkeys([*names, *deeper], 3), HubOptions())
    assert [side.name for side in side_files(folder)] == sorted(names[:3])
    assert [side.name for side in side_files(folder, ("*.py",))] == names[3:]


def test_a_folder_of_the_hubs_cache(make_model: Make, tmp_path: Path) -> None:
    """It holds revisions; the model is one of them, or the Hub's id."""
    commit = "c" * 40
    cache = tmp_path / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    make_model("model").rename(cache / "snapshots" / commit)
    for name in (cache, cache / "snapshots"):
        with pytest.raises(CheckpointError) as caught:
            resolve_model(parse_model_ref(str(name)))
        (problem,) = caught.value.problems
        assert problem.remedy == (
            f"name the model by its Hub id, org/name, or a revision's folder: {cache}/snapshots/{commit}"
        )
    assert resolve_model(parse_model_ref(str(cache / "snapshots" / commit))).index.tensors


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"])
def test_small_files_that_are_large(make_model: Make, name: str) -> None:
    """They are read whole. A sparse file takes no place on the disk, and all of the memory."""
    folder = make_model()
    (folder / name).touch()
    os.truncate(folder / name, 9 << 30)
    with pytest.raises(CheckpointError, match=f"/{name}: 9,663,676,416 bytes are too many for such a file"):
        resolve_model(parse_model_ref(str(folder)))


def test_code_that_is_large_counts_as_missing(make_model: Make) -> None:
    folder = make_model()
    (folder / "own.py").touch()
    os.truncate(folder / "own.py", 9 << 30)
    assert resolve_model(parse_model_ref(str(folder))).python_files == ()
