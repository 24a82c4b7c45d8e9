"""`raymoe plan`: what it says adds up, it writes nothing, and it needs neither Ray nor torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.commands import hashes, start

WITHOUT = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "torch", "transformers"}:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Forbid())
from raymoe.cli import main
main()
"""


def without_frameworks(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("flags", [[], ["--json"], ["out"]])
@pytest.mark.processes
def test_needs_no_framework_and_writes_nothing(config: Callable[..., Path], tmp_path: Path, flags: list[str]) -> None:
    path = config("hidden")
    empty = tmp_path / "cwd"
    empty.mkdir()
    before = hashes(tmp_path)
    done = without_frameworks("plan", path, *flags, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"architecture": "qwen"}])
def test_sums_agree(cli: Callable[..., Any], config: Callable[..., Path], keys: dict[str, Any]) -> None:
    done = cli("plan", config("hidden", **keys), "--json", "--out-shard-size", "300K")
    assert done.code == 0
    plan = json.loads(done.out)
    assert len(plan["shards"]) > 4
    assert plan["output_bytes"] == sum(plan["bytes_by_source"].values())
    assert plan["output_bytes"] == sum(shard["bytes"] for shard in plan["shards"])
    for owner, count in plan["bytes_by_source"].items():
        assert count == sum(shard["bytes"] for shard in plan["shards"] if shard["owner"] == owner)
    # What is not a tensor is a header: 8 bytes and a few hundred for each tensor, in every shard.
    headers = plan["output_bytes"] - sum(plan["bytes_by_kind"].values())
    tensors = sum(shard["tensors"] for shard in plan["shards"])
    assert 50 * tensors < headers < 300 * tensors
    width = 2 if "dtype" in keys else 4
    assert sum(plan["bytes_by_kind"].values()) == width * plan["parameters"]
    assert plan["active_parameters"] < plan["parameters"]


def test_plan_is_what_the_merge_writes(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    flags = ["--out-shard-size", "300K"]
    plan = json.loads(cli("plan", config(), "--json", *flags).out)
    assert cli("merge", config(), tmp_path / "out", *flags).code == 0
    for shard in plan["shards"]:
        assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == plan["config"]
    assert json.loads((tmp_path / "out/raymoe.json").read_text())["plan_digest"] == plan["digest"]


def test_plan_says_what_is_at_the_output(
    cli: Callable[..., Any], without_ray: None, config: Callable[..., Path], tmp_path: Path
) -> None:
    """What `merge` would refuse, with the same words; and that an unfinished merge goes on."""
    from raymoe.storage.outputs.local import LocalOutput

    out = tmp_path / "out"
    new = cli("plan", config(), out)
    assert new.out.rstrip().endswith("No problems found.")
    digest = json.loads(cli("plan", config(), out, "--json").out)["digest"]
    unfinished = LocalOutput(out)
    unfinished.lock()
    unfinished.begin(digest, {}, fresh=False)
    unfinished.release()
    there = sorted(out.rglob("*"))
    begun = cli("plan", config(), out)
    assert f"{out} has an unfinished merge of this plan: `raymoe merge` resumes it." in begun.out
    other = cli("plan", config("hidden"), out)
    assert "can't be merged now" in other.out and "an unfinished merge of another plan" in other.out
    assert sorted(out.rglob("*")) == there
    assert cli("merge", config(), out).code == 0
    finished = cli("plan", config(), out)
    assert finished.code == 0
    assert f"{out} holds this finished merge: `raymoe merge` has nothing to do." in finished.out
    assert json.loads(cli("plan", config(), out, "--json").out)["output"]["is_complete"]
    assert cli("merge", config(), out).code == 0
    other = cli("plan", config("hidden"), out)
    assert other.code == 2
    assert "the output folder holds a finished merge" in other.out and "No problems found." not in other.out
    (problem,) = json.loads(cli("plan", config("hidden"), out, "--json").out)["output"]["problems"]
    assert problem in cli("merge", config("hidden"), out).err
    base = yaml.safe_load(config().read_text())["base_model"]
    assert "the output is the folder of base, which would be overwritten" in cli("plan", config(), base).out


def test_text(cli: Callable[..., Any], config: Callable[..., Path]) -> None:
    done = cli("plan", config("hidden"), "--out-shard-size", "300K")
    assert done.code == 0
    for word in ("Mixtral (MixtralForCausalLM), 3 experts, 2 for each token", "base", "expert 2", "router"):
        assert word in done.out
    assert "Gates: hidden from 6 prompts, read by the base model" in done.out
    assert "few prompts (expert 0 has 2, expert 1 has 2, expert 2 has 2): " in done.out
    assert done.out.rstrip().endswith("No errors found.")


def test_names_are_printed_as_they_are(cli: Callable[..., Any], zoo: Callable[..., Path], tmp_path: Path) -> None:
    """A long path with brackets: on one line, and no markup."""
    from tests.cli.commands import write_config
    from tests.pico import copy_model

    model = copy_model(zoo("llama", seed=1), tmp_path / ("x" * 90) / "[bold]model[/bold] [/]")
    experts = [{"source_model": str(model)}, {"source_model": str(zoo("llama", seed=2))}]
    content = {"base_model": str(zoo("llama")), "gate_mode": "random", "experts": experts}
    done = cli("plan", write_config(tmp_path / "config.yaml", content))
    assert done.code == 0
    assert str(model) in done.out


def test_warnings_are_said_and_listed(cli: Callable[..., Any], config: Callable[..., Path]) -> None:
    path = config("random", prompt_model="base")
    done = cli("plan", path)
    assert done.code == 0
    assert "warning: prompt_model has no effect" in done.err


@pytest.mark.processes
def test_ctrl_c_while_planning(tmp_path: Path) -> None:
    """The config is a pipe that nothing comes through: the command waits in planning."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    process = start("merge", pipe, tmp_path / "out")
    writer = os.open(pipe, os.O_WRONLY)  # returns when the command reads
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        os.close(writer)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("stopped") and "Traceback" not in err
    assert not (tmp_path / "out").exists()
