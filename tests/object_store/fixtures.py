"""Fixtures for tests with object stores. Import the ones you need into a conftest.py; the servers are shared.

server     one of the servers (see tests/tiers.py); its environment variables are set for the test
bucket     the URL of an empty bucket in it, and only of this test's
store      an S3Store on it that gives up early
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from raymoe.object_store.options import StorageOptions
from raymoe.object_store.s3_store import S3Store
from tests.object_store.servers import Server, environment, running_server


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    running = running_server(request.param)
    with environment(running.environment):
        yield running


@pytest.fixture
def bucket(server: Server) -> str:
    name = f"test-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def store(server: Server) -> S3Store:
    return S3Store(StorageOptions(deadline_s=30, read_timeout_s=20))
