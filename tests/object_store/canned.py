"""A server of canned answers, for errors of S3 that no local server gives (expired tokens, other regions, ...).

    with canned(Answer(403, code="ExpiredToken"), Answer(200, body=b"data")) as server:
        server.url, server.requests, server.most_at_once

Answers are given in turn, the last one for ever. Bodies are S3's XML, with the fields that real ones have.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.http_server import HttpServer
from tests.object_store.servers import read_service_files_once


@dataclass(frozen=True)
class Answer:
    """`code` makes an error body of S3; `fields` are further elements of it."""

    status: int
    code: str = ""
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    length: int | None = None  # said in the head, if not the body's
    message: str = "The message of the server."

    def content(self, bodiless: bool) -> bytes:
        if not self.code:
            return self.body
        fields = {"Code": self.code, "Message": self.message, "RequestId": "4442587FB7D0A2F9", **self.fields}
        elements = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error>{elements}</Error>'
        return b"" if bodiless else text.encode()


class Canned:
    def __init__(self, answers: tuple[Answer, ...]):
        self.answers, self.requests = list(answers), list[tuple[str, str]]()
        self.agents: set[str] = set()  # what clients call themselves
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def next(self, method: str, path: str) -> Answer:
        with self.lock:
            self.requests.append((method, path))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def done(self) -> None:
        with self.lock:
            self.at_once -= 1


@contextmanager
def canned(*answers: Answer) -> Iterator[Canned]:
    read_service_files_once()
    state = Canned(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.agents.add(self.headers.get("User-Agent") or "")
            answer = state.next(self.command, self.path)
            time.sleep(answer.seconds)
            state.done()
            content = answer.content(bodiless=self.command == "HEAD")
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if answer.length is None else answer.length))
            self.end_headers()
            self.wfile.write(content)
            if answer.length is not None:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = HttpServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
