"""URLs of objects and of folders of objects, as text in one normal form.

    s3://bucket/key/of/object      s3a:// means the same
    gs://, memory://, https://...  any scheme that fsspec knows
    file:///absolute/path          a local path in other words; see `local_path`

In normal form a URL has no trailing slash and no empty, '.' or '..' segment, so that equal locations are equal strings.
A key is taken literally: '%41' is not 'A', '+' is not a space. URLs hold no credentials and no queries, since they
appear in messages, plans and records. If a URL is rejected for that reason, the message does not repeat it.

A name such as s3:/bucket would be a folder called 's3:'. It is rejected wherever a user names a location, because a URL
was meant. ./s3:/bucket is that folder.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import NamedTuple

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9.\-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]*")
_AUTHORITY = re.compile(r"://([^/]*)")
_ONE_SLASH = re.compile(r"\w:/[^/\s]*:[^/\s]*@")  # 's3:/KEY:SECRET@bucket', with one slash missing
# Hub models are named by their id; hf:// is raymoe's own scheme for a file of one (sources/hub.py).
_FOREIGN_SCHEMES = ("hf",)
# Schemes of fsspec that may need Python packages that are not installed.
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "hf")
_SCHEMES = (*_OBJECT_STORES, "file", "local", "memory")
# Misspellings of '://': 's3:/b', 's3:b', 's3//b', 's3;//b', 's3 ://b', and backslashes.
_ALMOST_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*?)\s*(?P<sign>:[/\\]*|[;,.]*//)(?P<rest>.*)", re.DOTALL)
_CREDENTIALS = "credentials belong in the environment or ~/.aws, as for the AWS CLI"


class S3Location(NamedTuple):
    """The parts of `s3://bucket/key`; the key of a whole bucket is empty."""

    bucket: str
    key: str


def split_url(text: str) -> tuple[str, str]:
    """The scheme of a URL, in lower case, and the text after its '://'; the scheme of a path is empty."""
    text = text.strip()
    match = _SCHEME.match(text)
    return (match["scheme"].lower(), text[match.end() :]) if match else ("", text)


def is_url(text: str) -> bool:
    """Whether a path as a user writes it is a URL of an object store (or any other fsspec file system)."""
    return split_url(text)[0] not in ("", *_FOREIGN_SCHEMES)


def is_s3(url: str) -> bool:
    """Whether a URL (also one not yet normalized) is S3's."""
    return split_url(url)[0] in ("s3", "s3a")


def normalize_url(text: str) -> str:
    """The normal form of a URL. Raises ValueError with a message for the user."""
    text = text.strip()
    check_no_secrets(text)
    scheme, rest = split_url(text)
    if not scheme:
        raise ValueError(f"{text!r} is not a URL such as s3://bucket/prefix")
    scheme = "s3" if scheme == "s3a" else scheme
    authority, _, key = rest.partition("/")
    if "::" in text or not text.isprintable() or "\\" in text:
        raise ValueError(f"the URL {text!r} has '::', a backslash or unprintable characters")
    if scheme == "s3" and not _BUCKET.fullmatch(authority):
        raise ValueError(f"{text!r} has no valid bucket name; write s3://bucket/prefix")
    if not rest.strip("/"):
        raise ValueError(f"{text!r} names no place; write {scheme}://bucket/prefix")
    key = key.rstrip("/")
    bad = next((part for part in key.split("/") if part in ("", ".", "..")), None) if key else None
    if bad is not None:
        raise ValueError(f"{text!r} has the path segment {bad!r}; write the URL without it")
    return f"{scheme}://{authority}/{key}" if key else f"{scheme}://{authority}"


def check_spelling(text: str) -> None:
    """Raise ValueError, with a correction, for a location that looks like a URL but is not a valid one."""
    text = text.strip()
    check_no_secrets(text)
    match = _ALMOST_URL.match(text)
    if match is None:
        if text.startswith("://"):
            raise ValueError(
                f"{_show_text(text)} is a URL without its kind; write s3{_hide_secrets(text)}, for example"
            )
        return
    scheme, sign = match["scheme"].lower(), match["sign"]
    if text.lower().startswith(f"{scheme}://") and _is_scheme(scheme):
        return
    near = get_close_matches(scheme, _SCHEMES, n=1, cutoff=0.5) if len(scheme) > 1 else []
    url = _suggest_url(near[0], _hide_secrets(match["rest"])) if near else ""
    if sign == "://":
        remedy = f"did you mean {url}?" if near else "write s3://bucket/prefix, for example"
        raise ValueError(f"{_show_text(text)}: there is no kind of URL {scheme}://; {remedy}")
    # 'a:b' and 'a//b' may be names; 'a:/b' is at most a drive of Windows.
    names = _SCHEMES if sign.startswith(":") else _OBJECT_STORES
    if scheme not in names and not sign.startswith((":/", ":\\")):
        return
    write = f"write {url}, or for a local path of this name" if near else "for a local path of this name write"
    path = f"./{text}" if _hide_secrets(text) == text else "./ before it"
    raise ValueError(f"{_show_text(text)} looks like a URL, and is none; {write} {path}")


def _suggest_url(scheme: str, rest: str) -> str:
    rest = rest.replace("\\", "/").lstrip("/")
    return rest if scheme == "hf" else f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def _is_scheme(scheme: str) -> bool:
    if scheme in _SCHEMES:
        return True
    from fsspec.registry import available_protocols, registry

    return scheme in available_protocols() or scheme in registry  # protocols registered in this process


def _show_text(text: str) -> str:
    return repr(text) if _hide_secrets(text) == text else "this"


def _hide_secrets(text: str) -> str:
    """The text of a misspelt URL for messages, without credentials and queries."""
    return "..." if "@" in text or "?" in text else text


def check_no_secrets(text: str) -> None:
    """Raise ValueError, without repeating the text, if a URL in it has credentials or a query.

    Call it before any other use of text from outside: a secret key may itself contain '/', '+' and '@'.
    """
    if _ONE_SLASH.search(text):
        raise ValueError(f"a URL has one '/' after its scheme, and credentials in it; {_CREDENTIALS}")
    for match in _AUTHORITY.finditer(text):
        authority, scheme = match[1], text[: match.start()].lower()
        colon = ":" in authority and (scheme.endswith(("s3", "s3a")) or not authority.rpartition(":")[2].isdigit())
        if "@" in authority or colon:
            raise ValueError(f"a URL has credentials or a revision where its bucket or host should be; {_CREDENTIALS}")
        if "?" in text[match.end() :]:
            raise ValueError(f"a URL has a query ('?...'); leave it out: {_CREDENTIALS}")


def s3_location(url: str) -> S3Location:
    """Bucket and key of a normalized S3 URL."""
    assert url.startswith("s3://"), url
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return S3Location(bucket, key)


def join_url(url: str, *names: str) -> str:
    """The URL of a file (`names`, with '/' for subfolders) in the folder `url`."""
    return "/".join([url.rstrip("/"), *(name.strip("/") for name in names)])


def relative_name(url: str, folder: str) -> str:
    """The name of `url` inside `folder`."""
    prefix = folder.rstrip("/") + "/"
    assert url.startswith(prefix), (url, folder)
    return url.removeprefix(prefix)


def local_path(url: str) -> str | None:
    """The absolute path of a file:// URL; None for any other URL."""
    scheme, rest = split_url(url)
    return f"/{rest.lstrip('/')}" if scheme in ("file", "local") else None
