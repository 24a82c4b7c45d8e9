"""Models on the Hub, against a stand-in server on loopback: how little planning reads, refusals, offline work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError
from raymoe.sources.hub import HubOptions, parse_location
from raymoe.sources.resolve import fetch_file, fetch_side_files, resolve_model, resolve_models
from tests.sources.checkpoints import write_json, write_sharded
from tests.sources.hub_server import Handler, HubRepo, HubServer

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 2 MB, a tokenizer and a template."""
    folder = tmp_path / "repo"
    rng = np.random.default_rng(0)
    write_sharded(
        folder, {s: {f"t{i}.weight": rng.standard_normal((512, 1024), "float32")} for i, s in enumerate(SHARDS)}
    )
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").write_text("{{ x }}")
    return folder


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def repo(server: HubServer, folder: Path) -> HubRepo:
    return server.add("org/name", folder)


@pytest.fixture
def options(server: HubServer, tmp_path: Path) -> HubOptions:
    return HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=server.url)


def refusal(text: str, options: HubOptions) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(parse_model_ref(text), options)
    assert all(problem.remedy for problem in caught.value.problems)
    return str(caught.value)


def test_planning_reads_headers_and_json_only(
    server: HubServer, repo: HubRepo, folder: Path, options: HubOptions
) -> None:
    facts = resolve_model(parse_model_ref("org/name"), options)
    assert (facts.label, facts.revision) == (f"org/name@{repo.commit}", repo.commit)
    assert [file.location for file in facts.index.files] == [f"hf://org/name@{repo.commit}/{s}" for s in SHARDS]
    assert [file.name for file in facts.side_files] == ["chat_templates/tool.jinja", "tokenizer.json"]
    assert all(file.size == (folder / file.name).stat().st_size for file in facts.index.files)
    weights = sum((folder / name).stat().st_size for name in SHARDS)
    assert weights > 4_000_000
    assert server.body_bytes(".safetensors") <= 2 * 64 * 1024  # one ranged request a shard
    assert server.body_bytes() < 150_000
    assert not any(request.path.endswith(("tokenizer.json", ".jinja")) for request in server.requests)


class _OddHandler(Handler):
    """Of a server that knows no ranges, or that breaks off in the middle of one."""

    def do_GET(self) -> None:  # noqa: N802
        self._was_range = "Range" in self.headers
        if self.odd.without_ranges:
            del self.headers["Range"]
        super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    @property
    def odd(self) -> OddServer:
        assert isinstance(self.hub, OddServer)
        return self.hub

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        if self._was_range and self.odd.breaks:
            self.odd.breaks -= 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        try:
            super()._send(status, body, kind, headers)
        except OSError:
            self.odd.hung_up.set()
            self.close_connection = True


class OddServer(HubServer):
    """`breaks`: so many answers with a range end early. `hung_up`: a client did not wait for the end of an answer."""

    without_ranges = False
    breaks = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hung_up = threading.Event()

    @staticmethod
    def handler() -> type[Handler]:
        return _OddHandler


@pytest.mark.s3
def test_a_server_without_ranges_is_not_asked_for_the_whole_shard(tmp_path: Path) -> None:
    shard = {"t.weight": np.zeros((4096, 4096), "f4")}  # more than the buffers of two sockets take
    write_sharded(tmp_path / "repo", {"model.safetensors": shard})
    with OddServer() as server:
        server.add("org/name", tmp_path / "repo")
        server.without_ranges = True
        options = HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=server.url)
        facts = resolve_model(parse_model_ref("org/name"), options)
        assert server.hung_up.wait(60)
    assert facts.index.tensors["t.weight"].shape == (4096, 4096)


@pytest.mark.s3
def test_an_answer_that_breaks_off_is_asked_for_again(folder: Path, tmp_path: Path) -> None:
    with OddServer() as server:
        server.add("org/name", folder)
        options = HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=server.url)
        server.breaks = 2
        assert set(resolve_model(parse_model_ref("org/name"), options).index.tensors) == {"t0.weight", "t1.weight"}
        assert server.breaks == 0
        server.breaks = 1000
        assert "org/name: the Hub can't be reached (" in refusal("org/name", options)


def test_fetched_bytes_are_the_planned_ones(folder: Path, repo: HubRepo, options: HubOptions) -> None:
    facts = resolve_model(parse_model_ref("org/name"), options)
    for index, file in enumerate(facts.index.files):
        entry = facts.index.tensors[f"t{index}.weight"]
        data = fetch_file(file, options).read_bytes()
        assert data[entry.start : entry.end] == load_file(folder / file.name)[entry.name].tobytes()
    side = fetch_side_files(facts, options)
    assert side["chat_templates/tool.jinja"].read_text() == "{{ x }}"


def test_a_cached_file_is_read_there(server: HubServer, repo: HubRepo, options: HubOptions) -> None:
    facts = resolve_model(parse_model_ref("org/name"), options)
    for file in facts.index.files:
        fetch_file(file, options)
    server.requests.clear()
    assert resolve_model(parse_model_ref("org/name"), options) == facts
    assert server.body_bytes(".safetensors") == 0


@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_revisions(server: HubServer, repo: HubRepo, options: HubOptions, revision: str) -> None:
    repo.branches = ("main", "v1")
    asked = repo.commit if revision == "commit" else revision
    assert resolve_model(parse_model_ref(f"org/name@{asked}"), options).revision == repo.commit
    offline = replace(options, offline=True)
    assert "offline, and not in the Hub cache" in refusal(f"org/name@{asked}", offline)  # config yes, weights no
    for name in SHARDS:
        fetch_file(
            next(f for f in resolve_model(parse_model_ref("org/name"), options).index.files if f.name == name), options
        )
    assert resolve_model(parse_model_ref(f"org/name@{asked}"), offline).revision == repo.commit


def test_offline_after_a_fetch_gives_the_same_facts(server: HubServer, repo: HubRepo, options: HubOptions) -> None:
    facts = resolve_model(parse_model_ref("org/name"), options)
    for file in (*facts.index.files, *(side.file for side in facts.side_files)):
        fetch_file(file, options)
    server.requests.clear()
    offline = HubOptions(cache_dir=options.cache_dir, offline=True)
    assert resolve_model(parse_model_ref("org/name"), offline) == facts
    assert fetch_file(facts.index.files[0], offline).stat().st_size == facts.index.files[0].size
    assert server.requests == []


def test_offline_without_the_model(repo: HubRepo, options: HubOptions, tmp_path: Path) -> None:
    offline = HubOptions(cache_dir=str(tmp_path / "empty"), offline=True)
    text = refusal("org/name", offline)
    assert "offline, and the model is not in the Hub cache; no folder 'org/name' here either" in text
    assert "`hf download org/name`, or unset HF_HUB_OFFLINE" in text
    (file, _) = resolve_model(parse_model_ref("org/name"), options).index.files
    with pytest.raises(CheckpointError, match="offline, and the file is not in the Hub cache"):
        fetch_file(file, offline)


def test_gated_private_and_unknown(
    server: HubServer, folder: Path, options: HubOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/gated", folder, access="gated")
    server.add("org/private", folder, access="private")
    gated = refusal("org/gated", options)
    assert gated.startswith("org/gated: the model is gated: its owner has to grant access")  # once, not once a file
    assert "a token: set HF_TOKEN" in gated
    assert "no folder 'org/private' here, and no such model on the Hub (or it is private)" in refusal(
        "org/private", options
    )
    assert "no folder 'org/nope' here, and no such model on the Hub" in refusal("org/nope", options)
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert resolve_model(parse_model_ref("org/gated"), options).revision
    assert resolve_model(parse_model_ref("org/private"), options).revision
    assert "a private model needs the token in use" in refusal("org/nope", options)


def test_no_such_revision(repo: HubRepo, options: HubOptions) -> None:
    assert "the model is on the Hub, but has no revision 'v9'" in refusal("org/name@v9", options)


@pytest.mark.s3
def test_the_server_is_gone(tmp_path: Path) -> None:
    with HubServer() as server:
        options = HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=server.url)
    text = refusal("org/name", options)
    assert text.startswith("org/name: the Hub can't be reached (Connection refused)")
    assert "HF_HUB_OFFLINE=1 works with what is in the cache" in text


def test_problems_of_several_models_together(
    server: HubServer, repo: HubRepo, folder: Path, options: HubOptions
) -> None:
    server.add("org/gated", folder, access="gated")
    refs = [parse_model_ref(text) for text in ("org/name", "org/gated", "org/nope", "org/name@v9", "org/name+org/nope")]
    with pytest.raises(CheckpointError) as caught:
        resolve_models(refs, options)
    assert [problem.where for problem in caught.value.problems] == ["org/gated", "org/nope", "org/name"]


def test_one_model_named_twice_is_asked_for_once(
    server: HubServer, repo: HubRepo, tmp_path: Path, options: HubOptions
) -> None:
    lora = tmp_path / "lora"
    write_json(lora / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    module = "base_model.model.t0"
    save_file(
        {f"{module}.lora_A.weight": np.ones((1, 1024), "f4"), f"{module}.lora_B.weight": np.ones((512, 1), "f4")},
        lora / "adapter_model.safetensors",
    )
    server.add("org/lora", lora)
    refs = [parse_model_ref("org/name"), parse_model_ref("org/name+org/lora"), parse_model_ref(f"org/name+{lora}")]
    facts = resolve_models(refs, options)
    assert [request.path for request in server.requests].count("/api/models/org/name") == 1
    remote = facts[refs[1]].adapter
    assert remote is not None
    assert remote.label == f"org/lora@{remote.revision}"
    assert remote.pairs["t0.weight"].a.file.location.startswith("hf://org/lora@")


def test_a_file_that_is_missing_or_broken(server: HubServer, repo: HubRepo, folder: Path, options: HubOptions) -> None:
    os.truncate(folder / SHARDS[0], 1000)
    (folder / SHARDS[1]).unlink()
    text = refusal("org/name", options)
    assert f"{SHARDS[1]} is missing, but model.safetensors.index.json names it" in text
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"t0.weight": SHARDS[0]}})
    repo.commit = "a" * 40
    assert f"org/name@{repo.commit}/{SHARDS[0]}: the header describes a file of" in refusal("org/name", options)
    (folder / "config.json").unlink()
    repo.commit = "b" * 40
    assert "config.json is missing" in refusal("org/name", options)


def test_a_file_that_is_not_the_planned_one(repo: HubRepo, options: HubOptions) -> None:
    (file, _) = resolve_model(parse_model_ref("org/name"), options).index.files
    with pytest.raises(CheckpointError, match=f"has {file.size} bytes, but {file.size + 1} were expected"):
        fetch_file(replace(file, size=file.size + 1), options)


def test_bin_files_are_downloaded_with_a_warning(server: HubServer, tmp_path: Path, options: HubOptions) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "bin"
    write_json(folder / "config.json", {})
    torch.save({"a": torch.arange(4.0)}, folder / "pytorch_model.bin")
    server.add("org/bin", folder)
    facts = resolve_model(parse_model_ref("org/bin"), options)
    assert len(facts.warnings) == 1
    assert "has .bin weights only: to be indexed they are downloaded whole" in facts.warnings[0]
    entry = facts.index.tensors["a"]
    assert entry.file.location.startswith("hf://org/bin@")
    data = fetch_file(entry.file, options).read_bytes()
    np.testing.assert_array_equal(np.frombuffer(data[entry.start : entry.end], "<f4"), np.arange(4.0))


def test_the_librarys_environment_variables(server: HubServer, repo: HubRepo, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE, without any option of ours, in a process of its own."""
    code = (
        "import sys; from raymoe.config.model_refs import parse_model_ref; from raymoe.sources.resolve import *\n"
        "facts = resolve_model(parse_model_ref('org/name'))\n"
        "print(facts.label, *[fetch_file(f) for f in facts.index.files], 'torch' in sys.modules)"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = plain | {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
    root = str(Path(__file__).parents[2])
    outputs = []
    for extra in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=environment | extra, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.split())
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == f"org/name@{repo.commit}"
    assert outputs[0][1].startswith(str(tmp_path / "hub" / "models--org--name"))
    assert outputs[0][-1] == "False"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (f"hf://org/name@{'a' * 40}/model.safetensors", ("org/name", "a" * 40, "model.safetensors")),
        (f"hf://gpt2@{'1' * 40}/chat_templates/x.jinja", ("gpt2", "1" * 40, "chat_templates/x.jinja")),
        ("hf://org/name@main/model.safetensors", None),
        ("/data/model.safetensors", None),
    ],
)
def test_locations(location: str, expected: tuple[str, str, str] | None) -> None:
    assert parse_location(location) == expected
