"""Calls a method for many objects, several at a time."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from raymoe.object_store.protocol import ObjectStore

CALLS_AT_ONCE = 8


def delete_each(store: ObjectStore, urls: Iterable[str]) -> None:
    """Delete objects with one request per object."""
    with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="delete") as pool:
        list(pool.map(store.delete, urls))
