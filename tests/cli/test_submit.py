"""`raymoe submit` to the head of a real cluster that wants a token."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.commands import raymoe, start, wait_until, write_config
from tests.cli.job_head import MISSING, JobHead, job_head
from tests.pico import copy_model, merge_config, merge_without_ray, tensors_of

pytestmark = [pytest.mark.ray, pytest.mark.processes]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobHead]:
    if MISSING:
        pytest.skip(f"Ray's job server needs ray[default]; not installed: {', '.join(MISSING)}")
    with job_head(tmp_path_factory.mktemp("head")) as up:
        yield up


@pytest.fixture
def jobs(head: JobHead) -> Callable[[], dict[str, Any]]:
    """jobs() are all jobs of the head, as Ray's job server tells of them, by id."""
    import requests

    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()

    def ask() -> dict[str, Any]:
        answer = requests.get(f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=30)
        return {job["submission_id"]: job for job in answer.json() if job["type"] == "SUBMISSION"}

    return ask


def test_a_merge_is_followed_and_finished(
    head: JobHead, jobs: Callable[[], Any], zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Prompts come from a file and a model from a folder, both named relative to the working directory."""
    experts = [zoo("llama", seed=seed) for seed in (1, 2)]
    config = merge_config(zoo("llama"), experts, mode="cheap_embed")
    same = merge_without_ray(config, tmp_path / "expected")
    texts = config["experts"][0]["positive_prompts"]
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in texts))
    config["experts"][0]["positive_prompts"] = {"file": "prompts.txt"}
    (tmp_path / "expert").symlink_to(experts[1])
    config["experts"][1]["source_model"] = "expert"
    write_config(tmp_path / "config.yaml", config)
    before = jobs().keys()
    out = tmp_path / "out"
    following = start("submit", "config.yaml", out, "-v", f"--result={tmp_path}/run.json", env=head.env, cwd=tmp_path)
    line = wait_until(following.stdout.readline, "the first line", [following])  # type: ignore[union-attr]
    (name,) = jobs().keys() - before
    assert line and jobs()[name]["status"] in ("PENDING", "RUNNING")  # the log comes while the job runs
    log, said = following.communicate(timeout=120)
    assert following.returncode == 0, (log, said)
    assert "checkpoint is complete" in log
    assert f"{experts[0]} is not sent" in said and f"result: {out}\n" in said
    for shard in same.shards:
        assert (out / shard.file_name).read_bytes() == (tmp_path / "expected" / shard.file_name).read_bytes()
    metadata = jobs()[name]["metadata"]
    assert metadata["output"] == str(out) and name.startswith(f"raymoe-{metadata['config_digest'][:8]}-")
    assert "AUTH" not in json.dumps(jobs()[name]["runtime_env"])
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["exit_reason"] == "done" and all(phase["end_s"] is not None for phase in run["phases"].values())
    weights = sum(shard.nbytes for shard in same.worker_shards)
    assert run["bytes"]["written_by_actors"] == weights
    written = wait_until(lambda: _metric(head.metrics(), "ray_raymoe_bytes_copied_total", str(out)), "metrics")
    assert written == weights
    assert _metric(head.metrics(), "ray_raymoe_shards_done_total", str(out)) == len(same.shards) - 1


@pytest.mark.soak  # that a job's status 0, 1 and 2 come back is in the other tests
def test_a_finished_merge_is_submitted_again(head: JobHead, config: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing is left to do; another plan is refused by the merge itself. Their status comes back."""
    path, out = config(), tmp_path / "out"
    assert raymoe("submit", path, out, env=head.env).returncode == 0
    again = raymoe("submit", path, out, env=head.env)
    assert again.returncode == 0 and "already complete" in again.stdout
    other = raymoe("submit", path, out, "--out-shard-size", "31K", env=head.env)
    assert other.returncode == 2 and "the output folder holds a finished merge" in other.stdout


def _metric(text: str, name: str, output: str) -> float | None:
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{") and f'output="{output}"' in line]
    return float(lines[0].rpartition(" ")[2]) if lines else None


def test_a_merge_that_fails(head: JobHead, zoo: Callable[..., Path], tmp_path: Path) -> None:
    """An expert has weights that are no numbers, which shows while it is copied."""
    name = "model.layers.0.mlp.down_proj.weight"
    broken = torch.full_like(tensors_of(zoo("llama"))[name], torch.nan)
    expert = copy_model(zoo("llama"), tmp_path / "expert", tensors={name: broken})
    config = merge_config(zoo("llama"), [expert, zoo("llama", seed=2)], mode="random")
    path = write_config(tmp_path / "config.yaml", config)
    failed = raymoe("submit", path, tmp_path / "out", "--strict", f"--result={tmp_path}/run.json", env=head.env)
    assert failed.returncode == 1
    assert "NaN or infinity in model.layers.0.mlp.down_proj.weight" in failed.stdout
    assert "submit it again" in failed.stderr and "result:" not in failed.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["exit_reason"], run["phases"]["shards"]["end_s"]) == ("failed", None)
    assert "NaN or infinity" in run["error"]


def test_models_that_the_cluster_lacks(head: JobHead, tmp_path: Path) -> None:
    config = {
        "base_model": "/nowhere/base",
        "experts": [{"source_model": "/nowhere/a"}, {"source_model": "/nowhere/b"}],
    }
    path = write_config(tmp_path / "config.yaml", config | {"gate_mode": "random"})
    refused = raymoe("submit", path, tmp_path / "out", env=head.env)
    assert refused.returncode == 2
    assert "no folder '/nowhere/base' here" in refused.stdout


def test_without_waiting_and_stopped_following(
    head: JobHead, jobs: Callable[[], Any], config: Callable[..., Path], tmp_path: Path
) -> None:
    """Both leave the job to itself."""
    done = raymoe("submit", config(), tmp_path / "a", "--no-wait", env=head.env)
    assert done.returncode == 0 and "ray job logs --follow raymoe-" in done.stderr
    following = start("submit", config(), tmp_path / "b", env=head.env)
    wait_until(following.stdout.readline, "the first line", [following])  # type: ignore[union-attr]
    following.send_signal(signal.SIGINT)
    said = following.communicate(timeout=60)[1]
    assert following.returncode == 1
    name = said.rpartition("ray job stop ")[2].strip()
    assert name in jobs() and "the job goes on" in said and "Traceback" not in said
    for out in "ab":
        wait_until(lambda out=out: (tmp_path / out / "raymoe.json").exists(), f"merge {out} is done")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"}, "the cluster requires a token, and there is none here"),
        ({"RAY_AUTH_TOKEN": "another"}, "the cluster refuses the token"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "RAY_AUTH_TOKEN_PATH=/nowhere/token: the token can't be read"),
    ],
)
def test_tokens(
    head: JobHead, jobs: Callable[[], Any], config: Callable[..., Path], changed: dict[str, str], words: str
) -> None:
    before = jobs().keys()
    refused = raymoe("submit", config(), "/out", env=head.env | changed)
    assert refused.returncode == 2 and words in refused.stderr
    assert jobs().keys() == before
