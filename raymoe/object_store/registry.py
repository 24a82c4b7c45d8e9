"""The object stores of this process: one per scheme, options and environment."""

from __future__ import annotations

import os
import threading
from dataclasses import fields

from raymoe.object_store.options import StorageOptions
from raymoe.object_store.protocol import ObjectStore, StoreCounters
from raymoe.object_store.urls import is_s3, split_url

_stores: dict[tuple[int, str, StorageOptions, int], ObjectStore] = {}
_stores_lock = threading.Lock()


def open_store(url: str, options: StorageOptions | None = None) -> ObjectStore:
    """The store of a normalized URL: a MultipartStore (`S3Store`) for s3://, another one for other schemes.

    There is one per process, options and AWS_* environment, so connections, pacing and counters are shared. Creating it
    sends no request.
    """
    options = options or StorageOptions()
    scheme = "s3" if is_s3(url) else split_url(url)[0]
    # The process id, since a forked child must not use its parent's connections. The environment (hashed: it holds
    # credentials), since it decides whatever `options` leave open.
    environment = hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = (os.getpid(), scheme, options, environment)
    with _stores_lock:
        if key not in _stores:
            _stores[key] = _build(scheme, options)
        return _stores[key]


def process_counters() -> StoreCounters:
    """Totals of what this process has done through all its stores."""
    with _stores_lock:
        counters = [store.counters for key, store in _stores.items() if key[0] == os.getpid()]
    return StoreCounters(**{f.name: sum(getattr(each, f.name) for each in counters) for f in fields(StoreCounters)})


def _build(scheme: str, options: StorageOptions) -> ObjectStore:
    if scheme == "s3":
        from raymoe.object_store.s3_store import S3Store

        return S3Store(options)
    from raymoe.object_store.fsspec_store import FsspecStore

    return FsspecStore(scheme, options)
