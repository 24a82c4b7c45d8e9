"""`raymoe merge` as its users type it, mergekit-moe's arguments among them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.commands import hashes, raymoe, write_config
from tests.pico import merge_config
from tests.runtime.in_process import in_this_process

Cli = Callable[..., Any]

MERGEKIT_IDLE = {
    "--lazy-unpickle": [],
    "--low-cpu-memory": [],
    "--read-to-gpu": [],
    "--multi-gpu": [],
    "--gpu-rich": [],
    "--cuda": [],
    "--async-write": [],
    "--write-threads": ["4"],
    "--num-threads": ["3"],
    "--clone-tensors": [],
    "--safe-serialization": [],
    "--lora-merge-cache": ["/tmp/cache"],
    "--lora-merge-dtype": ["float16"],
    "--unsafe-truncate-embeddings": [],
}
"""Flags of mergekit-moe that have nothing to do here."""

MERGEKIT_OTHERS = [
    *("--i-understand-this-is-not-useful-without-training", "--trust-remote-code", "--random-seed", "7"),
    *("--device", "cpu", "--transformers-cache", "/tmp/cache", "--allow-crimes", "--copy-tokenizer"),
    *("--out-shard-size", "5B", "--no-write-model-card", "-v"),
]


def test_as_mergekit_moe_is_called(config: Callable[..., Path], ray_env: dict[str, str], tmp_path: Path) -> None:
    path = config()
    with in_this_process():
        assert raymoe("merge", path, tmp_path / "a", "--copy-tokenizer").returncode == 0
    flags = ["--copy-tokenizer", "--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle"]
    done = raymoe("merge", path, tmp_path / "b", *flags, env=ray_env)
    assert done.returncode == 0
    assert done.stdout == ""
    assert "note: --lazy-unpickle is accepted and changes nothing here" in done.stderr
    assert "done: " in done.stderr and "peak memory: driver " in done.stderr
    names = {"config.json", "README.md", "raymoe.json", "model.safetensors.index.json", "tokenizer.json"}
    assert names < set(os.listdir(tmp_path / "a"))
    assert ".raymoe" not in os.listdir(tmp_path / "a")
    weights = [{k: v for k, v in hashes(tmp_path / d).items() if k != "raymoe.json"} for d in "ab"]
    assert weights[0] == weights[1]  # and raymoe.json only tells the options apart


def test_every_flag_of_mergekit_moe(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    idle = [word for flag, values in MERGEKIT_IDLE.items() for word in (flag, *values)]
    done = cli("merge", config(), tmp_path / "out", *idle, *MERGEKIT_OTHERS)
    assert done.code == 0
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert sorted(note.split()[1] for note in notes) == sorted(MERGEKIT_IDLE)  # once each
    assert not (tmp_path / "out/README.md").exists()
    options = json.loads((tmp_path / "out/raymoe.json").read_text())["options"]
    assert (options["seed"], options["allow_crimes"], options["model_card"]) == (7, True, False)


def test_opposites_and_short_forms(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    """mergekit's --no-... forms and -j; --quiet takes back all that is said but errors."""
    opposites = [f"--no-{name}" for name in ("lazy-unpickle", "cuda", "low-cpu-memory", "read-to-gpu", "multi-gpu")]
    opposites += [f"--no-{name}" for name in ("async-write", "clone-tensors", "safe-serialization", "allow-crimes")]
    opposites += ["--no-trust-remote-code", "--no-copy-tokenizer", "-j", "2", "--quiet"]
    done = cli("merge", config(), tmp_path / "out", *opposites)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert "tokenizer.json" not in os.listdir(tmp_path / "out")


def test_finished_merge_is_complete(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    """The same command again, as schedulers do it: nothing is done but to bring in order what is missing beside it."""
    out, flags = tmp_path / "out", ("--out-shard-size", "300K")
    assert cli("merge", config(), out, *flags).code == 0
    before, result = hashes(out), (out / "result.json").read_bytes()
    again = cli("merge", config(), out, *flags)
    assert again.code == 0
    said = again.err.splitlines()
    assert said[0] == f"{out} is already complete: an earlier run has finished this merge"
    assert said[-6].startswith(f"done: {out}, ") and said[-6].endswith("all from an earlier run")
    steps = [f'raymoe try {out} "..."', f"raymoe eval {out} --data texts.jsonl", f"raymoe gguf {out} out.gguf"]
    assert said[-5:] == ["next:", *(f"  {step}" for step in (*steps, f"raymoe push {out} ORG/NAME"))]
    assert hashes(out) == before and (out / "result.json").read_bytes() == result
    # Killed between the end of the merge and its last line.
    (out / "result.json").unlink()
    (out / ".raymoe/done").mkdir(parents=True)
    (out / ".raymoe/lock").touch()
    assert cli("merge", config(), out, *flags, "--quiet").err == ""
    report = json.loads((out / "result.json").read_text())
    assert (report["exit_reason"], report["was_complete"]) == ("done", True)
    assert report["bytes"]["kept_from_earlier_run"] > 0
    assert not (out / ".raymoe").exists() and hashes(out) == before
    # Elsewhere it is written in any case.
    assert cli("merge", config(), out, *flags, "--result", tmp_path / "run.json").code == 0
    assert json.loads((tmp_path / "run.json").read_text())["was_complete"]
    base = Path(yaml.safe_load(config().read_text())["base_model"]) / "model.safetensors"
    times, content = base.stat(), base.read_bytes()
    os.utime(base, (times.st_atime + 10**6, times.st_mtime + 10**6))
    touched = cli("merge", config(), out, *flags)
    base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    newer = cli("merge", config(), out, *flags)
    base.write_bytes(content)
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert touched.code == 0, "the same weights"
    assert newer.code == 2 and f"made of other sources than are there now: {base}" in newer.err
    shard = next(iter(sorted(out.glob("model-*.safetensors"))))
    shard.unlink()
    damaged = cli("merge", config(), out, *flags)
    assert damaged.code == 2 and f"{shard.name} is missing" in damaged.err and "--overwrite" in damaged.err


def test_card_that_a_finished_merge_lacks(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Whether there is a card is not in the digest."""
    out = tmp_path / "out"
    assert cli("merge", config(), out, "--no-write-model-card").code == 0
    assert cli("merge", config(), out, "--no-write-model-card").code == 0
    refused = cli("merge", config(), out)
    assert refused.code == 2 and "the finished merge here has no model card" in refused.err


def test_finished_merge_is_not_overwritten_unasked(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("merge", config(), out, "--out-shard-size", "300K").code == 0
    (out / "notes.txt").write_text("mine")
    before = hashes(out)
    refused = cli("merge", config(), out)
    assert refused.code == 2
    assert "holds a finished merge" in refused.err and "--overwrite" in refused.err
    assert hashes(out) == before
    flags = ["--overwrite", "--no-copy-tokenizer", "--no-write-model-card"]
    assert cli("merge", config(), out, *flags).code == 0
    # Nothing of the old merge is left, and what is not its own is.
    left = set(os.listdir(out))
    assert "notes.txt" in left
    assert not left & {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    record = json.loads((out / "raymoe.json").read_text())
    assert left == {*record["files"], "raymoe.json", "result.json", "notes.txt"}
    result = json.loads((out / "result.json").read_text())
    assert result["exit_reason"] == "done" and result["output"] == str(out)
    assert all(phase["end_s"] is not None for phase in result["phases"].values())


@pytest.mark.parametrize("flag", ["--write-model-card", "--no-write-model-card"])
def test_model_card(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path, flag: str
) -> None:
    assert cli("merge", config(), tmp_path / "out", flag).code == 0
    assert (tmp_path / "out/README.md").exists() == (flag == "--write-model-card")
    files = json.loads((tmp_path / "out/raymoe.json").read_text())["files"]
    assert ("README.md" in files) == (flag == "--write-model-card")


def test_version(cli: Callable[..., Any]) -> None:
    import raymoe as package

    done = cli("--version")
    assert (done.code, done.out) == (0, f"raymoe {package.__version__}\n")


def test_help_shows_no_idle_flags(cli: Callable[..., Any]) -> None:
    done = cli("merge", "--help")
    assert done.code == 0
    assert "--out-shard-size" in done.out and "--overwrite" in done.out
    assert not [flag for flag in MERGEKIT_IDLE if flag in done.out]


def test_overwriting_leaves_nothing_of_another_model(
    zoo: Callable[..., Path], cli: Cli, without_ray: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "chat_templates").mkdir(parents=True)
    theirs = (
        "chat_template.jinja",
        "chat_templates/tool.jinja",
        "added_tokens.json",
        "adapter_config.json",
        "vocab.json",
    )
    own = ("notes.txt", "eval.json", "chat_templates/notes.txt")
    for name in (*theirs, *own, "model-00001-of-00009.safetensors"):
        (out / name).write_text("x")
    base = zoo("llama")
    config = write_config(tmp_path / "c.yaml", merge_config(base, [zoo("llama", seed=1), base], mode="random"))
    assert cli("merge", config, out, "--actors", "1", "--overwrite").code == 0
    assert all((out / name).read_text() == "x" for name in own)
    for name in theirs:
        assert not (out / name).exists() or (out / name).read_text() == (base / name).read_text()
    assert (out / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()


def test_prompts_that_can_not_be_read_are_refused(zoo: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    """Before anything is written: the tokenizer's files tell which tokens there are."""
    small = zoo("llama", seed=3, vocab_size=80)
    content = merge_config(small, [small, zoo("llama", seed=4, vocab_size=80)], mode="hidden")
    answer = cli("merge", write_config(tmp_path / "c.yaml", content), tmp_path / "out", "--actors", "1")
    assert answer.code == 2 and not (tmp_path / "out").exists()
    assert "expert 0, prompt 1" in answer.err and "Traceback" not in answer.err
