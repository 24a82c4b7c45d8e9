"""What goes wrong before a merge begins: one clear message, exit status 2, no traceback, nothing written, no Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.commands import write_config

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these errors may wait for a cluster. (A cluster that this process already has is no start.)"""
    import ray

    def init(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started for an error that planning can see")

    monkeypatch.setattr(ray, "init", init)


def problem(cli: Cli, *arguments: object) -> str:
    answer = cli(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    return str(answer.err)


def test_missing_config(cli: Cli, tmp_path: Path) -> None:
    said = problem(cli, "merge", tmp_path / "none.yaml", tmp_path / "out")
    assert "none.yaml: no such file" in said
    assert not (tmp_path / "out").exists()


def test_yaml_error(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base_model: [unclosed\nexperts: {")
    said = problem(cli, "merge", path, tmp_path / "out")
    assert "config.yaml:" in said  # with the line
    assert not (tmp_path / "out").exists()


def test_config_is_a_folder(cli: Cli, tmp_path: Path) -> None:
    assert "this is a folder, not a file" in problem(cli, "plan", tmp_path)


def test_all_config_problems_in_one_report(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(gate_mode="hiden", experts_per_token="two", extra_key=1)
    said = problem(cli, "merge", path, tmp_path / "out")
    for word in ("problems:", "gate_mode", "experts_per_token", "extra_key"):
        assert word in said


def test_wrong_model_path(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    said = problem(cli, "merge", config(base_model=str(tmp_path / "no/such/model")), tmp_path / "out")
    assert "no folder" in said and "no/such/model" in said
    assert not (tmp_path / "out").exists()


def test_experts_of_other_shapes_are_all_named(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    wide, deep = zoo("llama", intermediate_size=128), zoo("llama", num_hidden_layers=4)
    experts = [{"source_model": str(model)} for model in (zoo("llama", seed=1), wide, deep)]
    content = {"base_model": str(zoo("llama")), "gate_mode": "random", "experts": experts}
    said = problem(cli, "merge", write_config(tmp_path / "config.yaml", content), tmp_path / "out")
    assert "experts[1]" in said and "intermediate_size is 128" in said
    assert "experts[2]" in said and "num_hidden_layers is 4" in said
    assert "experts[0]" not in said
    assert not (tmp_path / "out").exists()


def test_other_family_needs_allow_crimes(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    experts = [{"source_model": str(zoo("mistral", seed=1))}, {"source_model": str(zoo("llama", seed=1))}]
    content = {"base_model": str(zoo("llama")), "gate_mode": "random", "experts": experts}
    path = write_config(tmp_path / "config.yaml", content)
    assert "--allow-crimes" in problem(cli, "plan", path)
    assert cli("plan", path, "--allow-crimes").code == 0


def test_experts_that_are_all_the_same_need_the_flag(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    experts = [{"source_model": str(zoo("llama")), "positive_prompts": [text]} for text in ("one", "two")]
    path = write_config(tmp_path / "config.yaml", {"base_model": str(zoo("llama")), "experts": experts})
    flag = "--i-understand-this-is-not-useful-without-training"
    assert flag in problem(cli, "plan", path)
    assert cli("plan", path, flag).code == 0


def test_output_is_a_file(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "the output is a file" in problem(cli, "merge", config(), tmp_path / "out")
    assert "is a file, so that no folder can be in it" in problem(cli, "merge", config(), tmp_path / "out/below")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_name_too_long(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    assert "can't be used: File name too long" in problem(cli, "merge", config(), tmp_path / ("x" * 300))


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_is_a_source(cli: Cli, config: Callable[..., Path], zoo: Callable[..., Path], overwrite: bool) -> None:
    source = zoo("llama", seed=2)
    before = sorted(os.listdir(source))
    flags = ["--overwrite"] if overwrite else []
    said = problem(cli, "merge", config(), source, *flags)
    assert "the output is the folder of expert 1" in said
    assert sorted(os.listdir(source)) == before


def test_output_is_a_source_of_links(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """The Hub's cache: a folder of links to files that lie elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in zoo("llama", seed=1).iterdir():
        (snapshot / file.name).symlink_to(file)
    experts = [{"source_model": str(snapshot)}, {"source_model": str(zoo("llama", seed=2))}]
    content = {"base_model": str(zoo("llama")), "gate_mode": "random", "experts": experts}
    path = write_config(tmp_path / "config.yaml", content)
    assert "the output is the folder of expert 0" in problem(cli, "merge", path, snapshot, "--overwrite")
    assert (snapshot / "model.safetensors").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["link", "data/../data/base", "linked/base", "base.of.subfolders", "adapter"])
def test_output_is_a_source_by_another_name(
    cli: Cli, zoo: Callable[..., Path], tmp_path: Path, name: str, overwrite: bool
) -> None:
    """Also a model's own folder where its shards are in a subfolder, and that of an adapter. Nothing is removed."""
    from tests.pico import copy_model, save_lora, tensors_of

    base, sharded = copy_model(zoo("llama"), tmp_path / "data/base"), tmp_path / "data/sharded"
    copy_model(zoo("llama", seed=1), sharded)
    (sharded / "weights").mkdir()
    (sharded / "model.safetensors").rename(sharded / "weights/one.safetensors")
    weight_map = dict.fromkeys(tensors_of(base), "weights/one.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter = save_lora(tmp_path / "data/lora", base, modules=["down_proj"])
    (tmp_path / "link").symlink_to("data/base")
    (tmp_path / "linked").symlink_to("data")
    (tmp_path / "base.of.subfolders").symlink_to("data/sharded")
    (tmp_path / "adapter").symlink_to("data/lora")
    experts = [{"source_model": str(sharded)}, {"source_model": f"{base}+{adapter}"}]
    config = {"base_model": str(base), "gate_mode": "random", "experts": experts}
    path = write_config(tmp_path / "config.yaml", config)
    before = sorted(tmp_path.rglob("*"))
    said = problem(cli, "merge", path, tmp_path / name, *(["--overwrite"] if overwrite else []))
    assert "the output is the folder of" in said and "--overwrite" not in said
    assert sorted(tmp_path.rglob("*")) == before
    broken = write_config(tmp_path / "broken.yaml", {**config, "architecture": "mixtral", "base_model": str(base)})
    (sharded / "config.json").unlink()
    said = problem(cli, "merge", broken, tmp_path / name)
    assert "config.json is missing" in said and "the output is the folder of" in said and "--overwrite" not in said


def test_output_takes_the_place_of_what_is_read(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(config().read_text())  # YAML, but the name is the output's too
    said = problem(cli, "merge", out / "config.json", out, "--overwrite")
    assert "the merge would remove or replace the config there" in said
    (tmp_path / "link").symlink_to("out")
    (out / "vocab.txt").write_text("one\ntwo\n")
    prompts = {"file": str(tmp_path / "link/vocab.txt")}
    content = yaml.safe_load(config("hidden").read_text())
    content["experts"][1]["positive_prompts"] = prompts
    path = write_config(tmp_path / "c.yaml", content)
    said = problem(cli, "merge", path, out, "--overwrite")
    assert "remove or replace the file of experts[1].positive_prompts there" in said
    assert "would remove or replace the file of" in cli("plan", path, out).out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cuda",), "--device cuda: torch sees no GPU here\n    -> leave it out to compute on the CPU"),
        (("cuda:3",), "--device cuda: torch sees no GPU here"),
        (("cuda", "--gpus-per-expert", "0"), "--gpus-per-expert 0 gives no GPU to any actor"),
        (("tpu",), "there is no device 'tpu'"),
    ],
)
def test_a_device_that_is_not_here(
    cli: Cli, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, said: str
) -> None:
    import ray
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert said in problem(cli, "merge", config("hidden"), tmp_path / "out", "--device", *arguments)


@pytest.mark.parametrize("command", ["merge", "plan", "submit"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("s3:bucket", "write s3://bucket"),
        ("s4://bucket/x", "did you mean s3://bucket/x"),
        ("http:/host/x", "write http://host/x"),
        ("https://no-such-host.invalid/x", "HTTP is for reading"),
        ("hf://org/name", "raymoe push"),
    ],
)
def test_output_is_no_place_to_write_to(
    cli: Cli,
    config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    place: str,
    said: str,
) -> None:
    """Told without a request, and without a folder called 's3:'."""
    path = config()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert said in problem(cli, command, path, place)
    if command != "plan":
        assert said in problem(
            cli, command, path, "/out" if command == "submit" else "out", "--result", f"{place}/r.json"
        )
    assert sorted(tmp_path.iterdir()) == before


def test_models_and_prompts_that_were_meant_as_urls(cli: Cli, config: Callable[..., Path]) -> None:
    content = yaml.safe_load(config("hidden").read_text())
    models = [{**expert, "source_model": "s3:/bucket/e"} for expert in content["experts"]]
    assert "write s3://bucket/e" in problem(cli, "plan", config("hidden", experts=models))
    assert "did you mean s3://bucket/b" in problem(cli, "plan", config("hidden", base_model={"model": "s4://bucket/b"}))
    assert "write s3://bucket/a" in problem(cli, "plan", config("hidden", base_model="org/name+s3:bucket/a"))
    prompts = [{**expert, "positive_prompts": {"file": "s3:/bucket/p.txt"}} for expert in content["experts"]]
    assert "write s3://bucket/p.txt" in problem(cli, "plan", config("hidden", experts=prompts))
    for command in ("verify", "inspect", "push", "gguf", "extract"):
        more = {"push": ["org/name"], "gguf": ["m.gguf"], "extract": ["0", "/out"]}.get(command, [])
        assert "write s3://bucket/out" in problem(cli, command, "s3:/bucket/out", *more)


def test_places_in_the_working_directory_of_a_ray_job(
    cli: Cli, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray unpacks a job's `working_dir`: it is deleted with the job. Whole paths elsewhere are fine."""
    path = config()
    package = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    for arguments in (("out",), (package / "out",), (tmp_path / "out", "--result", "run.json")):
        said = problem(cli, "merge", path, *arguments)
        assert "in the working directory of a Ray job" in said and "name a URL in a bucket, or the whole path" in said
    assert "in the working directory of a Ray job" in problem(cli, "plan", path, "out")
    assert "in the working directory of a Ray job" in problem(cli, "gguf", path, "m.gguf")
    assert "in the working directory of a Ray job" in problem(cli, "eval", "out", "--data", "t", "--json", "e.json")
    assert cli("plan", path, tmp_path / "out").code == 0
    assert not list(package.iterdir())


def test_output_holds_other_files(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    said = problem(cli, "merge", config(), tmp_path / "out")
    assert "is not empty" in said and "--overwrite" in said
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_disk_too_small(cli: Cli, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """A source of holes: 8.8 TB that take no room."""
    from tests.pico import copy_model

    huge, rows = copy_model(zoo("llama"), tmp_path / "huge", config={"vocab_size": 1 << 34}), 1 << 34
    file = huge / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    hole = min(header[name]["data_offsets"][0] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert hole == 0, "the embedding and the head were expected at the start of the file"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        del header[name]
    moved = min(entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__")
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset - moved for offset in entry["data_offsets"]]
    end -= moved
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        start, end = end, end + rows * 64 * 4
        header[name] = {"dtype": "F32", "shape": [rows, 64], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        try:
            handle.truncate(8 + len(text) + end)
        except OSError:
            pytest.skip("this file system has no files of that size")
    if shutil.disk_usage(tmp_path).free > end:
        pytest.skip("this disk is large enough")
    experts = [{"source_model": str(zoo("llama", seed=1))}]
    content = {"base_model": str(huge), "gate_mode": "random", "experts_per_token": 1, "experts": experts}
    said = problem(cli, "merge", write_config(tmp_path / "huge.yaml", content), tmp_path / "out")
    assert "not enough disk: 8,79" in said
    assert not (tmp_path / "out").exists()


_AS_ORDINARY_USER = """
import contextlib, io, os, sys
from raymoe import cli
from raymoe.errors import ProblemReport
# All that is imported before a look at the output, which nobody may not read: by a merge into a file.
with contextlib.suppress(ProblemReport), contextlib.redirect_stderr(io.StringIO()):
    cli.app(["merge", sys.argv[2], sys.argv[2]], standalone_mode=False)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cli.main()
"""


@pytest.fixture
def sealed() -> Iterator[Path]:
    """A folder that everybody can look into."""
    folder = Path(tempfile.mkdtemp(prefix="raymoe-sealed-"))
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.processes
def test_output_not_writable(zoo: Callable[..., Path], sealed: Path) -> None:
    """As nobody where the tests run as root, whom no permission stops."""
    for number, model in enumerate((zoo("llama"), zoo("llama", seed=1))):
        shutil.copytree(model, sealed / str(number))
    experts = [{"source_model": str(sealed / "1")}]
    content = {"base_model": str(sealed / "0"), "gate_mode": "random", "experts_per_token": 1, "experts": experts}
    path = write_config(sealed / "config.yaml", content)
    for file in (sealed, *sealed.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    arguments = [sys.executable, "-c", _AS_ORDINARY_USER, "merge", path, sealed / "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert f"no permission to write in {sealed}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["big", "0", "-5B", "5X", "1.5.2G", ""])
def test_bad_shard_size(cli: Cli, config: Callable[..., Path], tmp_path: Path, size: str) -> None:
    said = problem(cli, "merge", config(), tmp_path / "out", f"--out-shard-size={size}")
    assert "--out-shard-size: " in said and repr(size) in said


def test_usage(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    assert "No such option" in problem(cli, "merge", config(), tmp_path / "out", "--no-such-flag")
    assert "Missing argument 'OUT'" in problem(cli, "merge", config())
    assert "--write-threads" in problem(cli, "merge", config(), tmp_path / "out", "--write-threads", "many")
    assert "--actors" in problem(cli, "merge", config(), tmp_path / "out", "--actors", "0")
    assert not (tmp_path / "out").exists()


def test_8_and_4_bit_exclude_each_other(cli: Cli, config: Callable[..., Path], tmp_path: Path) -> None:
    said = problem(cli, "merge", config("hidden"), tmp_path / "out", "--load-in-8bit", "--load-in-4bit")
    assert "can't go with --load-in-4bit" in said


def test_quantized_gates_need_a_gpu(cli: Cli, local_ray: None, config: Callable[..., Path], tmp_path: Path) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU here")
    said = problem(cli, "merge", config("hidden"), tmp_path / "out", "--load-in-4bit")
    assert "--load-in-4bit: needs a GPU" in said
    assert not (tmp_path / "out").exists()


def test_more_gpus_than_there_are(cli: Cli, local_ray: None, config: Callable[..., Path], tmp_path: Path) -> None:
    said = problem(cli, "merge", config(), tmp_path / "out", "--gpus-per-expert", "4096")
    assert "4096 GPUs per expert were requested" in said
    assert not (tmp_path / "out").exists()
