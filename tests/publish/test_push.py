"""`raymoe push`: what is on the Hub afterwards, what is sent and what is not, and what is refused before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

import raymoe
from tests.cli.commands import raymoe as command
from tests.cli.conftest import Answer
from tests.object_store.servers import Server
from tests.publish.hub import WritableHub, account

Cli = Callable[..., Answer]
SHARDS = [f"model-0000{n}-of-00006.safetensors" for n in range(1, 7)]


def local_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sent_bytes(hub: WritableHub) -> int:
    return sum(upload.nbytes for upload in hub.uploads)


def test_what_is_published(hub: WritableHub, merged: Path, cli: Cli) -> None:
    done = cli("push", merged, "org/name")
    assert done.code == 0
    assert done.out == ""
    assert f"push to {hub.url}/org/name (branch main): 14 files" in done.err
    assert done.err.splitlines()[-1].startswith(f"pushed: {hub.url}/org/name/commit/")
    there, here = hub.files("org/name"), local_files(merged)
    assert there.keys() == here.keys() | {".gitattributes"}
    differing = {name for name in here if there[name] != here[name]}
    assert differing == {"README.md", "raymoe.json"}
    assert hub.history("org/name") == ["initial commit", "mixtral merge of 3 experts, made with raymoe"]
    # Larger files than the server takes at once went in parts; nothing went twice.
    assert len({(upload.oid, upload.part) for upload in hub.uploads}) == len(hub.uploads) > len(SHARDS)
    assert sent_bytes(hub) == sum(len(here[name]) for name in SHARDS)


def test_the_published_record_is_of_the_published_files(hub: WritableHub, merged: Path) -> None:
    raymoe.push(merged, "org/name")
    there = hub.files("org/name")
    card = there["README.md"].decode()
    assert 'from_pretrained("org/name", dtype="auto")' in card
    assert "<this folder>" not in card
    for name, entry in json.loads(there["raymoe.json"])["files"].items():
        checksum = f"xxh3-128:{xxhash.xxh3_128(there[name]).hexdigest()}"
        assert (entry["size"], entry["checksum"]) == (len(there[name]), checksum), name


def test_it_loads_from_there(hub: WritableHub, merged: Path, tmp_path: Path) -> None:
    """A user of the repository, in a process of its own: the same weights, and the tokenizer."""
    raymoe.push(merged, "org/name", private=True)
    script = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
both = [AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("org/name", {str(merged)!r})]
assert both[0].keys() == both[1].keys() and all(torch.equal(a, both[1][n]) for n, a in both[0].items())
assert AutoTokenizer.from_pretrained("org/name")("a line").input_ids
print("equal")
"""
    env = hub.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_again_there_is_nothing_to_push(hub: WritableHub, merged: Path, cli: Cli) -> None:
    first = raymoe.push(merged, "org/name")
    before = len(hub.uploads)
    again = cli("push", merged, "org/name")
    assert again.code == 0
    assert "no file to send; 14 are there already" in again.err
    assert (
        again.err.splitlines()[-1] == f"nothing to push: {hub.url}/org/name has these files (commit {first.commit[:8]})"
    )
    assert len(hub.uploads) == before
    assert len(hub.history("org/name")) == 2
    assert cli("push", merged, "org/name", "--quiet").err == ""


def test_an_edited_card_is_published_as_it_is(hub: WritableHub, merged: Path, tmp_path: Path, cli: Cli) -> None:
    raymoe.push(merged, "org/name")
    shutil.copytree(merged, tmp_path / "out")
    with open(tmp_path / "out/README.md", "a") as card:
        card.write("\nBy hand.\n")
    pushed = raymoe.push(tmp_path / "out", "org/name", message="A better card")
    assert (pushed.sent, len(pushed.unchanged)) == (("README.md", "raymoe.json"), 12)
    assert hub.files("org/name")["README.md"].endswith(b"\nBy hand.\n")
    assert hub.history("org/name")[-1] == "A better card"
    text = (tmp_path / "out/README.md").read_text()
    (tmp_path / "out/README.md").write_text(text.replace("library_name", "license: mine\nlibrary_name", 1))
    refused = cli("push", tmp_path / "out", "org/name")
    assert refused.code == 2
    assert "README.md: the Hub refuses its metadata" in refused.err and "license" in refused.err


def test_weights_of_another_model_go_and_other_files_stay(hub: WritableHub, merged: Path, cli: Cli) -> None:
    hub.create("org/name")
    old = {
        "model-00001-of-00009.safetensors": b"old",
        "pytorch_model.bin": b"old",
        "adapter_config.json": b"{}",
        "added_tokens.json": b"{}",
        "chat_templates/tool.jinja": b"x",
        "notes/adapter_config.json": b"{}",
        "eval.json": b"{}",
        SHARDS[0]: b"old",
    }
    hub.commit("org/name", "main", "old model", old, {}, [])
    done = cli("push", merged, "org/name")
    assert done.code == 0
    assert "the commit removes files of another model there" in done.err
    assert "the repository has other files, which stay: eval.json, notes/adapter_config.json" in done.err
    there = hub.files("org/name")
    assert there.keys() == local_files(merged).keys() | {".gitattributes", "eval.json", "notes/adapter_config.json"}
    assert there[SHARDS[0]] == (merged / SHARDS[0]).read_bytes()
    assert hub.history("org/name")[1:] == ["old model", "mixtral merge of 3 experts, made with raymoe"]


def test_a_branch(hub: WritableHub, merged: Path, cli: Cli) -> None:
    hub.create("org/name")
    assert cli("push", merged, "org/name", "--branch", "v2", "--message", "Second try").code == 0
    assert hub.files("org/name").keys() == {".gitattributes"}
    assert hub.files("org/name", "v2").keys() == local_files(merged).keys() | {".gitattributes"}
    assert hub.history("org/name")[-1] == "Second try"
    assert cli("push", merged, "org/name", "--revision", "v2").err.splitlines()[-1].startswith("nothing to push")


def test_private(hub: WritableHub, merged: Path, cli: Cli) -> None:
    assert cli("push", merged, "org/mine", "--private").code == 0
    assert hub.written["org/mine"].private
    assert cli("push", merged, "org/mine").code == 0  # and it stays so
    hub.create("org/public")
    refused = cli("push", merged, "org/public", "--private")
    assert refused.code == 2
    assert "exists already, and is public" in refused.err
    assert hub.history("org/public") == ["initial commit"]


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_from_an_object_store(hub: WritableHub, merged: Path, server: Server, bucket: str, tmp_path: Path) -> None:
    """Shards are copied to this machine's disk one at a time."""
    for name, content in local_files(merged).items():
        server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=f"out/{name}", Body=content)
    (tmp_path / "tmp").mkdir()
    copies: list[int] = []
    hub.before_upload = lambda count: copies.append(len(list((tmp_path / "tmp").rglob("*.safetensors"))))
    env = hub.environment(tmp_path / "home", TMPDIR=str(tmp_path / "tmp"))
    assert command("push", f"{bucket}/out", "org/name", env=env).returncode == 0
    assert set(copies) == {1}
    there = hub.files("org/name")
    assert all(there[name] == (merged / name).read_bytes() for name in SHARDS)
    assert list((tmp_path / "tmp").iterdir()) == []
    again = raymoe.push(f"{bucket}/out", "org/name")
    assert (again.sent, len(again.unchanged)) == ((), 14)


def refusal(cli: Cli, *arguments: object) -> str:
    done = cli("push", *arguments)
    assert (done.code, done.out) == (2, "")
    assert " -> " in done.err
    return done.err


def test_refused_outputs(hub: WritableHub, merged: Path, tmp_path: Path, cli: Cli, zoo: Callable[..., Path]) -> None:
    assert "there is no such folder" in refusal(cli, tmp_path / "nothing", "org/name")
    assert "there is no raymoe.json, the record of a finished merge" in refusal(cli, zoo("llama"), "org/name")
    broken = shutil.copytree(merged, tmp_path / "out")
    (broken / SHARDS[1]).unlink()
    (broken / SHARDS[2]).write_bytes(b"short")
    said = refusal(cli, broken, "org/name")
    assert f"{SHARDS[1]} is missing" in said and f"{SHARDS[2]} has 5 bytes" in said
    (broken / ".raymoe").mkdir()
    (broken / ".raymoe/plan.json").write_text("{}")
    assert "this merge is not finished" in refusal(cli, broken, "org/name")
    (broken / ".raymoe/plan.json").unlink()
    (broken / "raymoe.json").write_text('{"files": {"../secret": {"size": 1}}}')
    assert "raymoe.json: this record can't be read" in refusal(cli, broken, "org/name")
    assert hub.written == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["name"], "'name' is not a repository name"),
        (["org/na me"], "'org/na me' is not a repository name"),
        (["a/b/c"], "is not a repository name"),
        (["other/name"], "the token belongs to tester, which is not a member of 'other'\n    -> push to tester/name"),
        (["readers/name"], "tester may only read in 'readers'"),
        (["org/name", "--revision", "a" * 40], "is not a valid branch name"),
        (["org/name", "--message", " "], "the commit's message is empty"),
    ],
)
def test_refused_targets(hub: WritableHub, merged: Path, cli: Cli, arguments: list[str], said: str) -> None:
    hub.accounts[hub.token] = account("tester", "write", {"org": "write", "readers": "read"})
    assert said in refusal(cli, merged, *arguments)
    assert hub.written == {}


def test_refused_tokens(
    hub: WritableHub, merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    hub.accounts["hf_reader"] = account("tester", "read", {"org": "write"})
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "the token in use is read-only" in refusal(cli, merged, "org/name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refuses the token" in refusal(cli, merged, "org/name")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the Hub was found\n    -> run `hf auth login`" in refusal(cli, merged, "org/name")
    hub.accounts["hf_fine"] = account("tester", "fineGrained", {})
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    said = refusal(cli, merged, "org/name")
    assert "org/name: the Hub does not allow it (You don't have the rights" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(cli, merged, "org/name")
    assert hub.written == {}


def test_a_hub_that_is_not_there(hub: WritableHub, merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "push: the Hub can't be reached (Connection refused)" in refusal(cli, merged, "org/name")


def test_a_server_without_xet(hub: WritableHub, merged: Path, tmp_path: Path) -> None:
    """The library does not fall back by itself: the message has the way out."""
    done = command("push", merged, "org/name", env=hub.environment(tmp_path / "home", HF_HUB_DISABLE_XET="0"))
    assert done.returncode == 1
    assert "error: push to org/name: the upload to Xet storage failed" in done.stderr
    assert "HF_HUB_DISABLE_XET=1" in done.stderr
    assert hub.history("org/name") == ["initial commit"]


def test_a_dry_run_makes_and_sends_nothing(hub: WritableHub, merged: Path, cli: Cli) -> None:
    looked = cli("push", merged, "org/name", "--dry-run", "--private")
    assert looked.code == 0, looked.err
    assert f"{hub.url}/org/name would be created, private" in looked.err
    assert f"  would send {SHARDS[0]}, " in looked.err and "  would send README.md, " in looked.err
    paths = looked.err.partition("raymoe.json names these local paths, which are published with it:\n")[2]
    assert paths.startswith("  /"), "the merge's models are folders"
    assert "nothing was sent" in looked.err
    assert not any(request.path.startswith("/api/repos/create") for request in hub.requests) and not hub.uploads
    assert cli("push", merged, "org/name").code == 0
    again = cli("push", merged, "org/name", "--dry-run")
    assert again.code == 0 and "no file to send" in again.err and "would send" not in again.err


@pytest.mark.parametrize("branch", ["a b", "a..b", "x.lock", "/x", "x/", "a~1", "a@{b", "", "@"])
def test_branches_that_git_refuses(branch: str, hub: WritableHub, merged: Path, cli: Cli) -> None:
    refused = cli("push", merged, "org/name", "--branch", branch)
    assert refused.code == 2 and "is not a valid branch name" in refused.err


def test_a_copy_of_a_published_merge_is_published_under_its_own_name(
    hub: WritableHub, merged: Path, cli: Cli, tmp_path: Path
) -> None:
    assert cli("push", merged, "org/first").code == 0
    copied = tmp_path / "copy"
    for name, content in hub.files("org/first").items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(content)
    assert cli("push", copied, "org/second").code == 0
    card = hub.files("org/second")["README.md"].decode()
    assert 'from_pretrained("org/second"' in card and "org/first" not in card
