"""What `raymoe submit` finds before a cluster is asked, and what it sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from raymoe.cli import app
from raymoe.cli.submit import _parse_merge_arguments
from raymoe.config import load_config, parse_config
from raymoe.errors import ProblemReport
from raymoe.submit.job_spec import make_job
from tests.cli.commands import write_config

NOBODY = ("--address", "http://127.0.0.1:1")
EXPERTS = [{"source_model": "org/a"}, {"source_model": "org/b"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out"], "OUT: out is relative, and the job's working directory is thrown away"),
        (["s3:///"], "OUT: "),
        (["/out", "--result", "run.json"], "--result: run.json is relative"),
        (["/out", "--bogus"], "No such option: --bogus"),
        (["/out", "--actors", "0"], "Invalid value for '--actors'"),
        (["/out"], "Ray at http://127.0.0.1:1: it can't be reached: Connection refused"),
        (["/out", "--address", "auto"], "Ray at auto: this is not the address of a job server"),
        (["/out", "--address", "ray://head:10001"], "Ray at ray://head:10001: this is not the address of a job server"),
    ],
)
def test_refusals(
    cli: Callable[..., Any], config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arguments: Any, words: str
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    refused = cli("submit", *NOBODY, config(), *arguments)
    assert (refused.code, refused.out) == (2, "")
    assert words in refused.err


def test_bad_config(cli: Callable[..., Any], tmp_path: Path) -> None:
    refused = cli("submit", *NOBODY, write_config(tmp_path / "c.yaml", {"base_model": "org/x"}), "/out")
    assert refused.code == 2 and "experts" in refused.err and "127.0.0.1" not in refused.err


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    experts = [{"source_model": "./a", "positive_prompts": {"file": "/nowhere/p.txt"}}, *EXPERTS[1:]]
    experts[1] = experts[1] | {"positive_prompts": ["x"]}
    path = write_config(tmp_path / "c.yaml", {"base_model": "org/x", "experts": experts})
    with pytest.raises(ProblemReport) as report:
        make_job(load_config(path), "out", [])
    assert [problem.where.partition(":")[0] for problem in report.value.problems] == ["OUT", "config", "/nowhere/p.txt"]


def test_too_many_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.submit.job_spec._MAX_CONFIG_BYTES", 10_000)
    (tmp_path / "p.txt").write_text(f"{'x' * 1000}\n" * 11)
    prompts = ({"file": str(tmp_path / "p.txt"), "limit": None}, ["x"])
    experts = [expert | {"positive_prompts": each} for expert, each in zip(EXPERTS, prompts, strict=True)]
    path = write_config(tmp_path / "c.yaml", {"base_model": "org/x", "experts": experts})
    with pytest.raises(ProblemReport, match="too much for a job's package"):
        make_job(load_config(path), "/out", [])


@pytest.mark.parametrize("given", [None, "--keep-uploads", "--no-keep-uploads"])
def test_a_submitted_merge_keeps_its_uploads(given: str | None) -> None:
    """It is submitted again if it stops. The user may say otherwise."""
    commands: Any = get_command(app)
    context = click.Context(commands.commands["submit"], parent=click.Context(commands))
    _, options = _parse_merge_arguments(context, ["c.yaml", "/out", "--actors=2", *([given] if given else [])])
    assert sorted(options) == ["--actors=2", given or "--keep-uploads"]


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts come through as they are; folders of this machine get whole paths, and what may be elsewhere is left."""
    monkeypatch.chdir(tmp_path)
    for name in ("org/a", "b+c@d"):
        (tmp_path / name).mkdir(parents=True)
    texts = ["a: b", "- 'c' \"d\"", "# e", "é 漢 \U0001f600 \x85 \u2028", "\\n", "null", "1e3", "  indented"]
    (tmp_path / "p.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    remote = {"file": "s3://bucket/p.jsonl"}
    experts: list[dict[str, Any]] = [
        {"source_model": "org/a", "positive_prompts": {"file": "p.txt"}},
        {"source_model": {"model": {"path": "b+c@d"}, "lora": "/there/lora"}, "positive_prompts": remote},
        {"source_model": "org/hub@main", "positive_prompts": ["x"]},
    ]
    path = write_config(tmp_path / "c.yaml", {"base_model": "s3://bucket/base", "experts": experts})
    job = make_job(load_config(path), "s3://bucket/a b", ["--actors=2"])
    sent = parse_config(job.config, name="sent")
    assert list(sent.experts[0].positive_prompts) == texts  # type: ignore[arg-type]
    assert sent.experts[1].positive_prompts.file == remote["file"]  # type: ignore[union-attr]
    models = [str(expert.source_model) for expert in sent.experts]
    assert models == [f"{tmp_path}/org/a", f"{tmp_path}/b+c@d+/there/lora", "org/hub@main"]
    assert job.models == (f"{tmp_path}/org/a", f"{tmp_path}/b+c@d", "/there/lora")
    assert job.entrypoint == "python -m raymoe merge config.yaml 's3://bucket/a b' --actors=2"
    assert make_job(load_config(path), "/elsewhere", []).digest == job.digest
