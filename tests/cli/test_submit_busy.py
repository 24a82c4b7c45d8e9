"""A cluster that has no agent for a job yet: it is asked again, and the last word says what to do."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from raymoe.errors import MergeFailed
from raymoe.submit import submit
from raymoe.submit.job_server import job_server
from raymoe.submit.job_spec import Job
from tests.http_server import HttpServer

pytestmark = pytest.mark.processes

JOB = Job(entrypoint="true", config="{}", metadata={"config_digest": "0" * 64}, models=(), output="/o")


class _JobServer(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's does, the first `server.busy` times that no agent is available."""

    server: Any

    def _answer(self, status: int, content: Any) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})
        elif self.path.startswith("/api/packages/"):
            self._answer(200, "")  # it has the files
        elif self.path.removeprefix("/api/jobs/") in self.server.jobs:
            self._answer(200, {"type": "SUBMISSION", "status": "PENDING", "entrypoint": "true"})
        else:
            self._answer(404, "no such job")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = request["submission_id"]
        self.server.posts += 1
        if self.server.posts <= self.server.busy:
            if self.server.takes_silently:
                self.server.jobs.append(name)
            self._answer(500, "No available agent to submit job, please try again later.")
        else:
            self.server.jobs.append(name)
            self._answer(200, {"job_id": name, "submission_id": name})

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def job_server_that_is(*, busy: int, takes_silently: bool = False) -> Iterator[Any]:
    with HttpServer(("127.0.0.1", 0), _JobServer) as server:
        vars(server).update(busy=busy, takes_silently=takes_silently, posts=0, jobs=[])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "JOB_AGENT_PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


def send(server: Any) -> str:
    return submit.send_job(job_server(f"http://127.0.0.1:{server.server_port}", None), JOB, install=False)


def test_it_is_asked_again_until_it_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    with job_server_that_is(busy=2) as server:
        assert [send(server)] == server.jobs
        assert server.posts == 3
    assert "the cluster has no agent for the job yet; next try in 0 s" in capsys.readouterr().err


def test_a_job_that_was_taken_after_all_is_not_sent_twice() -> None:
    with job_server_that_is(busy=1, takes_silently=True) as server:
        assert [send(server)] == server.jobs
        assert server.posts == 1


def test_at_last_the_remedy_is_told() -> None:
    with (
        job_server_that_is(busy=99) as server,
        pytest.raises(MergeFailed, match=r"no node had a job agent in 4 tries.*submit again when `ray status` answers"),
    ):
        send(server)
    assert server.posts == 4
