"""Copies folders to a bucket and back with boto3's transfers and their defaults, as the AWS CLI does.

    python scripts/s3_files.py download s3://BUCKET/PREFIX FOLDER
    python scripts/s3_files.py upload FOLDER s3://BUCKET/PREFIX

All files share one pool of 10 requests, in parts of 8 MiB. The endpoint and the keys are those of the environment
(AWS_ENDPOINT_URL and others).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from s3transfer.manager import TransferManager

__all__ = ["client", "download", "stored_bytes", "upload"]


def client() -> Any:
    return boto3.client("s3")


def download(url: str, folder: Path) -> None:
    """All objects below `url`, each at its place below the folder."""
    bucket, prefix = _parts(url)
    started = []
    with TransferManager(client()) as transfers:
        for entry in _objects(bucket, prefix):
            path = folder / entry["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            started.append(transfers.download(bucket, entry["Key"], str(path)))
        for transfer in started:
            transfer.result()  # raises what the transfer did
    assert started, f"{url} is empty"


def upload(folder: Path, url: str) -> None:
    """All files below the folder, each at its place below `url`."""
    bucket, prefix = _parts(url)
    with TransferManager(client()) as transfers:
        started = [
            transfers.upload(str(path), bucket, f"{prefix}{path.relative_to(folder)}")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        for transfer in started:
            transfer.result()


def stored_bytes(url: str) -> int:
    """The size of all objects below `url`."""
    bucket, prefix = _parts(url)
    return sum(entry["Size"] for entry in _objects(bucket, prefix))


def _objects(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def _parts(url: str) -> tuple[str, str]:
    """The bucket, and how the keys below `url` begin."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, f"{prefix.rstrip('/')}/" if prefix else ""


if __name__ == "__main__":
    what, source, target = sys.argv[1:]
    if what == "download":
        download(source, Path(target))
    else:
        upload(Path(source), target)
