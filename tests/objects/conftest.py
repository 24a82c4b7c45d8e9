"""Fixtures for the tests of object stores."""

from tests.objects.fixtures import bucket, server, store

__all__ = ["bucket", "server", "store"]
