"""Fixtures for the tests of object stores."""

from tests.object_store.fixtures import bucket, server, store

__all__ = ["bucket", "server", "store"]
