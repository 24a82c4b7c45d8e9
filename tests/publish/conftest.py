"""Fixtures: a Hub to push to, a finished merge to push, and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raymoe.planning import MergeOptions
from tests.cli.conftest import Answer, cli, config, ray_env
from tests.object_store.fixtures import bucket, server
from tests.pico import merge_config, merge_here
from tests.publish.hub import WritableHub

__all__ = ["Answer", "bucket", "cli", "config", "hub", "merged", "ray_env", "server"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """A Hub that this process and its commands use, with a token that may write."""
    from huggingface_hub import constants

    with WritableHub(tmp_path / "hub", part_bytes=100_000) as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield hub


@pytest.fixture(scope="session")
def merged(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge of three experts, in six shards. Read-only; `shutil.copytree` gives one to change."""
    out = tmp_path_factory.mktemp("merged") / "out"
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2, 3)], mode="hidden")
    merge_here(config, out, MergeOptions(max_shard_bytes=300_000))
    return out
