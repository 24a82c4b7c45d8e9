"""Fixtures for the tests of edits."""

from __future__ import annotations

from tests.object_store.fixtures import bucket, server

__all__ = ["bucket", "server"]
