"""Outputs of a soak as an outsider sees them: read directly, without the proxy and without the package.

An S3 place has neighbours: an object beside the prefix and an open multipart upload under it, both somebody else's.
They have to survive every merge.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tests.soak.fsspec_store import SCHEME

__all__ = ["FolderPlace", "FsspecPlace", "Place", "S3Place"]

_FOREIGN = b"somebody else's\n" * 100
_CHUNK_BYTES = 1 << 22


class Place(Protocol):
    """An output. `name` is what the command line calls it."""

    name: str

    def at(self, endpoint: str | None) -> str:
        """What a command line calls it that reaches its server by this endpoint."""

    def files(self) -> dict[str, int]:
        """Sizes of all files, `.raymoe/` included, by name."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file."""

    def content(self, name: str) -> bytes:
        """The content of a small file; empty where there is none."""

    def etag(self, name: str) -> str | None:
        """The ETag of an object; None for a file."""

    def leftovers(self) -> list[str]:
        """What is wrong around it: uploads left open, neighbours that were touched."""

    def download(self, folder: Path) -> None:
        """Copy all files into a new folder."""

    def remove(self) -> None:
        """Remove it and its neighbours."""


class _Base:
    name: str

    def at(self, endpoint: str | None) -> str:
        return self.name

    def files(self) -> dict[str, int]:
        raise NotImplementedError

    def chunks(self, name: str) -> Iterator[bytes]:
        raise NotImplementedError

    def download(self, folder: Path) -> None:
        for name in self.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as file:
                for chunk in self.chunks(name):
                    file.write(chunk)


class FolderPlace(_Base):
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def files(self) -> dict[str, int]:
        found = {}
        for path in sorted(self.path.rglob("*")) if self.path.exists() else ():
            with contextlib.suppress(FileNotFoundError):  # a merge is at work here
                if stat.S_ISREG((about := path.stat()).st_mode):
                    found[str(path.relative_to(self.path))] = about.st_size
        return found

    def chunks(self, name: str) -> Iterator[bytes]:
        with open(self.path / name, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def content(self, name: str) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return (self.path / name).read_bytes()
        return b""

    def etag(self, name: str) -> str | None:
        return None

    def leftovers(self) -> list[str]:
        return []

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class S3Place(_Base):
    """A prefix of a bucket."""

    def __init__(self, client: Any, bucket: str, prefix: str, foreign: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self.name = f"s3://{bucket}/{prefix}"
        self._beside = f"{prefix}-notes.txt"
        self._foreign_key = f"{prefix}/{foreign}"
        client.put_object(Bucket=bucket, Key=self._beside, Body=_FOREIGN)
        begun = client.create_multipart_upload(Bucket=bucket, Key=self._foreign_key)
        self._foreign_id = begun["UploadId"]
        self._client.upload_part(**self._upload(), PartNumber=1, Body=_FOREIGN)

    def files(self) -> dict[str, int]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/")
        found = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}
        return {key.removeprefix(f"{self._prefix}/"): size for key, size in sorted(found.items())}

    def chunks(self, name: str) -> Iterator[bytes]:
        body = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}")["Body"]
        yield from body.iter_chunks(_CHUNK_BYTES)

    def content(self, name: str) -> bytes:
        with contextlib.suppress(self._client.exceptions.NoSuchKey):
            return b"".join(self.chunks(name))
        return b""

    def etag(self, name: str) -> str | None:
        answer = self._client.head_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}")
        return str(answer["ETag"]).strip('"')

    def leftovers(self) -> list[str]:
        problems = []
        open_uploads = self._open_uploads()
        ours = {key for key, upload_id in open_uploads if upload_id != self._foreign_id}
        problems += [f"upload left open: {key}" for key in sorted(ours)]
        if (self._foreign_key, self._foreign_id) not in open_uploads:
            problems.append("foreign upload is gone")
        elif [p["Size"] for p in self._client.list_parts(**self._upload()).get("Parts", ())] != [len(_FOREIGN)]:
            problems.append("foreign upload has other parts")
        if self._client.get_object(Bucket=self._bucket, Key=self._beside)["Body"].read() != _FOREIGN:
            problems.append("foreign object was changed")
        return problems

    def remove(self) -> None:
        for key, upload_id in self._open_uploads():
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
        for name in self.files():
            self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}")
        self._client.delete_object(Bucket=self._bucket, Key=self._beside)

    def _upload(self) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._foreign_key, "UploadId": self._foreign_id}

    def _open_uploads(self) -> list[tuple[str, str]]:
        """(key, upload id) of all open uploads under this prefix, whoever began them."""
        query: dict[str, str] = {}
        found: list[tuple[str, str]] = []
        while True:
            page = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=f"{self._prefix}/", **query)
            found += [(item["Key"], item["UploadId"]) for item in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return [upload for upload in found if upload[0].startswith(f"{self._prefix}/")]
            query = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}


class FsspecPlace(S3Place):
    """The same by a URL that only fsspec knows (fsspec_store.py)."""

    def __init__(self, client: Any, bucket: str, prefix: str, foreign: str, endpoint: str) -> None:
        super().__init__(client, bucket, prefix, foreign)
        self.name = self.at(endpoint)

    def leftovers(self) -> list[str]:
        # A file system of fsspec may upload a file in parts. Of those raymoe knows nothing, nor can a later run.
        return [problem for problem in super().leftovers() if not problem.startswith("upload left open")]

    def at(self, endpoint: str | None) -> str:
        assert endpoint is not None, "an output of fsspec is in a server"
        return f"{SCHEME}://{endpoint.removeprefix('http://')}/{self._bucket}/{self._prefix}"
