"""Pico models and merges with a tokenizer, as checkpoints that `raymoe gguf` takes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.cli import run_command

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def merged(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """merged(family, host, shared=0, top=2, model={...}) is the folder of a merge of three experts. Read-only.

    `model` are keys of the dense models' config.json, further options those of the merge's config.
    """
    from tests.pico import merge_config, merge_without_ray

    root = tmp_path_factory.mktemp("merged")

    def merge(
        family: str,
        host: str,
        *,
        shared: int = 0,
        top: int = 2,
        model: dict[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        model = model or {}
        base = zoo(family, **model)
        experts = [zoo(family, seed=seed, **model) for seed in (1, 2, 3)]
        sharers = [zoo(family, seed=9 + number, **model) for number in range(shared)]
        config = merge_config(
            base,
            experts,
            architecture=host,
            experts_per_token=top,
            shared=sharers[0] if sharers else None,
            shared_prompts=bool(shared) and bool(MOE_ARCHITECTURES[host].shared_router),
            **options,
        )
        if shared:
            (first,) = config["shared_experts"]
            config["shared_experts"] = [{**first, "source_model": str(sharer)} for sharer in sharers]
        folder = root / str(len(list(root.iterdir())))
        merge_without_ray(config, folder)
        for name in TOKENIZER_FILES:
            shutil.copy(base / name, folder / name)
        return folder

    return merge


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit status."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """cli("merged", "model.gguf", ...) is `raymoe gguf` in this process; an exception, a traceback to users, fails."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["raymoe", "gguf", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command()
        said = capsys.readouterr()
        return Answer(ended.value.code if isinstance(ended.value.code, int) else 1, said.out, said.err)

    return run
