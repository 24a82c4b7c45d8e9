"""A file system of fsspec that every process of a soak has: `soak://HOST:PORT/bucket/key`, in the S3 server there.

raymoe takes it for what gs:// and abfs:// are to it: a store of which it knows no more than fsspec tells, with streams
that are committed. fsspec finds the scheme by an entry point, so what is needed is one folder on PYTHONPATH.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from s3fs import S3FileSystem

__all__ = ["SCHEME", "SoakFileSystem", "install"]

SCHEME = "soak"
_ROOT = Path(__file__).resolve().parents[2]
_ADDRESS = re.compile(rf"^{SCHEME}://(?P<address>[^/]+)/?")


class SoakFileSystem(S3FileSystem):  # type: ignore[misc]
    """S3's objects under the name of another store. Credentials are those of the environment."""

    protocol = SCHEME

    def __init__(self, endpoint_url: str, **options: Any) -> None:
        plain = {"s3": {"addressing_style": "path"}}
        super().__init__(endpoint_url=endpoint_url, config_kwargs=plain, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return _ADDRESS.sub("", str(path)).rstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        match = _ADDRESS.match(path)
        return {"endpoint_url": f"http://{match['address']}"} if match else {}


def install(folder: Path) -> str:
    """Write the entry point into a folder. The PYTHONPATH with which processes find it, and this package."""
    about = folder / "soak_filesystem-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: soak-filesystem\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[fsspec.specs]\n{SCHEME} = {__name__}:{SoakFileSystem.__name__}\n")
    return f"{folder}:{_ROOT}"
