"""Fixtures for the tests of object stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from raymoe.object_store.s3_store import S3Store
from tests.object_store.fixtures import bucket, server, store

__all__ = ["bucket", "page", "server", "store"]

_SERVERS_OWN = 1000
_MOST = {"list_objects_v2": "MaxKeys", "list_multipart_uploads": "MaxUploads", "list_parts": "MaxParts"}


@pytest.fixture(params=[10, pytest.param(_SERVERS_OWN, marks=pytest.mark.soak)])
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many entries the server puts on a page of a listing: as few as it is asked for, or as many as ever."""
    most: int = request.param
    real = S3Store._pages

    def pages(
        self: S3Store, operation: str, url: str, query: Mapping[str, Any], **markers: str
    ) -> Iterator[Mapping[str, Any]]:
        return real(self, operation, url, {**query, _MOST[operation]: most}, **markers)

    if most != _SERVERS_OWN:
        monkeypatch.setattr(S3Store, "_pages", pages)
    return most
