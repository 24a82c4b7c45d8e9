"""What is said of a Ray that can't be started: the file that can't be written, and the variable that moves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.errors import ProblemReport
from raymoe.runtime.start_errors import reject_job_server, start_problem


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("/tmp/ray/session_1", "set RAY_TMPDIR to a short folder that you may write to"),
        ("/scratch/x/ray", "set RAY_TMPDIR to a short folder that you may write to"),
        ("/home/me/.ray/auth_token", "set HOME to a folder that you may write to"),
        ("/home/me/.ray", "set HOME to a folder that you may write to"),
        ("/home", "set HOME to a folder that you may write to"),
    ],
)
def test_the_file_is_named(file: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of another user's folder, and a folder that would have to be made for it."""
    monkeypatch.setenv("HOME", "/home/me")
    problem = start_problem(PermissionError(13, "Permission denied", file), None)
    assert problem.what == f"no cluster could be started: {file}: Permission denied"
    assert remedy in problem.remedy


def test_other_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    problem = start_problem(RuntimeError("The node died.\nSee its log."), None)
    assert (problem.where, problem.what) == ("Ray on this machine", "no cluster could be started: The node died.")
    assert str(tmp_path / "ray") in problem.remedy
    assert "--address" not in problem.remedy
    problem = start_problem(RuntimeError("RAY_AUTH_TOKEN_PATH is set but file does not exist"), None)
    assert problem.remedy.startswith("correct that variable")
    problem = start_problem(ConnectionError(), "head:6379")
    assert problem.what == "no cluster could be reached: ConnectionError"
    assert "check --address and RAY_ADDRESS" in problem.remedy


@pytest.mark.parametrize("how", ["--address", "RAY_ADDRESS"])
@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("http://127.0.0.1:8265", "127.0.0.1"),
        ("https://user:pw@head.example/ray", "head.example"),
        ("HTTP://[::1", "HEAD"),
    ],
)
def test_the_address_of_a_job_server(monkeypatch: pytest.MonkeyPatch, how: str, address: str, host: str) -> None:
    """What `raymoe submit` takes. Ray would take http for a host's name."""
    monkeypatch.setenv("RAY_ADDRESS", address if how == "RAY_ADDRESS" else "")
    with pytest.raises(ProblemReport) as refused:
        reject_job_server(address)
    said = str(refused.value)
    assert said.startswith(f"{how}: this is the address of a cluster's job server")
    assert f"with `raymoe submit`, or name the cluster itself: {host}:6379 or ray://{host}:10001" in said
    assert ("without RAY_ADDRESS Ray is started on this machine" in said) == (how == "RAY_ADDRESS")
    assert "pw" not in said


@pytest.mark.parametrize("address", ["", "auto", "local", "127.0.0.1:6379", "ray://head:10001", "head.example:6379"])
def test_other_addresses_are_ray_s(address: str) -> None:
    reject_job_server(address)
