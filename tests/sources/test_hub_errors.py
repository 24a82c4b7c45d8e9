"""Errors of the libraries below huggingface_hub: which are of Xet storage, and what a person is told of them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymoe.errors import CheckpointError
from raymoe.sources.hub_errors import hub_errors, is_xet_error
from tests.sources.checkpoints import write_json
from tests.sources.hub_server import HubServer

# As hf_xet 1.8 says it of a server that can't be reached.
UNREACHABLE = RuntimeError(
    "Task error: File reconstruction error: CAS Client Error: Request middleware error: error sending request for url "
    f"(https://cas-server.invalid/v2/{'a' * 64})"
)
FULL = OSError(errno.ENOSPC, "No space left on device", "/data/xet/blob")


def told(error: Exception) -> str:
    with pytest.raises(CheckpointError) as caught, hub_errors("org/name", "main", "config.json"):
        raise error
    assert all(problem.remedy for problem in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize("name", ["XetAuthenticationError", "XetObjectNotFoundError"])
def test_the_types_of_hf_xet_are_no_errors_of_the_disk(name: str) -> None:
    kind = getattr(pytest.importorskip("hf_xet"), name, None)
    if kind is None:
        pytest.skip("an older hf_xet, without types of its own")
    assert is_xet_error(kind("no such thing"))
    said = told(kind("no such thing"))
    assert "org/name@main/config.json: the download from Xet storage failed (no such thing)" in said
    assert "HF_HUB_DISABLE_XET=1" in said


def test_which_errors_of_pythons_own_types_are_of_xet() -> None:
    assert is_xet_error(UNREACHABLE)
    assert is_xet_error(RuntimeError("Corrupted Reconstruction: a block is missing"))
    assert not is_xet_error(RuntimeError("cast to a smaller type in case of doubt"))
    assert is_xet_error(
        ConnectionError("Network error: 404 Not Found, http://host/api/models/a/b/xet-write-token/main")
    )
    assert not is_xet_error(ConnectionError("Connection reset by peer"))
    assert not is_xet_error(FULL)
    assert "the file can't be stored (No space left on device)" in told(FULL)
    with pytest.raises(RuntimeError, match="of our own"), hub_errors("org/name", None):
        raise RuntimeError("of our own")


@pytest.mark.s3
def test_xet_storage_that_can_not_be_reached(tmp_path: Path) -> None:
    """In a process of its own, which hf_xet reads its number of tries in."""
    pytest.importorskip("hf_xet")
    write_json(tmp_path / "repo/config.json", {"model_type": "llama"})
    code = (
        "from raymoe.errors import CheckpointError; from raymoe.config.model_refs import parse_model_ref\n"
        "from raymoe.sources.resolve import resolve_model\n"
        "try: resolve_model(parse_model_ref('org/name'))\n"
        "except CheckpointError as error: print(error)"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    with HubServer() as server:
        server.add("org/name", tmp_path / "repo").xet = "http://127.0.0.1:9"
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=plain | own, capture_output=True, text=True, check=True, timeout=120
        )
    assert "config.json: the download from Xet storage failed (" in done.stdout
    assert "HF_HUB_DISABLE_XET=1" in done.stdout
