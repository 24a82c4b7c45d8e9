"""URLs in one normal form; what is no URL, and what is refused."""

from __future__ import annotations

import re

import pytest

from raymoe.object_store.urls import (
    check_spelling,
    is_s3,
    is_url,
    join_url,
    local_path,
    normalize_url,
    relative_name,
    s3_location,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("s3://bucket", "s3://bucket"),
        (" s3://bucket/ ", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3A://bucket/Key", "s3://bucket/Key"),
        ("s3://my.bucket-1/a+b/%41/ä ö@1", "s3://my.bucket-1/a+b/%41/ä ö@1"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("memory://a/b", "memory://a/b"),
        ("https://host:8443/a/", "https://host:8443/a"),
        ("file:///abs/path/", "file:///abs/path"),
    ],
)
def test_normal_forms(text: str, normal: str) -> None:
    assert is_url(text)
    assert normalize_url(text) == normal
    assert normalize_url(normal) == normal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bucket/key", "not a URL"),
        ("s3://", "bucket"),
        ("s3:///key", "no valid bucket name"),
        ("s3://bu cket/key", "no valid bucket name"),
        ("memory://", "names no place"),
        ("s3://bucket//key", "segment ''"),
        ("s3://bucket/a/../b", r"segment '\.\.'"),
        ("s3://bucket/./b", r"segment '\.'"),
        ("s3://bucket/a?versionId=1", "query"),
        ("s3://bucket@main/a", "credentials or a revision"),
        ("s3://bucket:80/a", "credentials or a revision"),
        ("simplecache::s3://bucket/a", "not a URL"),
        ("s3://bucket/a::b", "'::'"),
        ("s3://bucket/a\nb", "unprintable"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_url(text)


@pytest.mark.parametrize(
    "text", ["org/name", "./folder", "/abs", "~/x", "C:\\models", "hf://org/name@abc/file", "a:b", ""]
)
def test_what_is_no_url(text: str) -> None:
    assert not is_url(text)


def test_parts() -> None:
    assert s3_location("s3://bucket/a/b") == ("bucket", "a/b")
    assert s3_location("s3://bucket") == ("bucket", "")
    assert join_url("s3://bucket", "a", "b/c") == "s3://bucket/a/b/c"
    assert relative_name("s3://bucket/a/b/c", "s3://bucket/a") == "b/c"
    assert is_s3("s3a://bucket") and is_s3("s3://bucket") and not is_s3("gs://bucket")
    assert local_path("file:///abs/path") == "/abs/path"
    assert local_path("s3://bucket/a") is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("s3:/bucket/x", "s3://bucket/x"),
        ("s3:bucket", "s3://bucket"),
        ("S3:/Bucket", "s3://Bucket"),
        ("s4://bucket/x", "did you mean s3://bucket/x"),
        ("ss3://bucket", "did you mean s3://bucket"),
        ("s3//bucket/x", "s3://bucket/x"),
        ("s3;//bucket", "s3://bucket"),
        ("s3 ://bucket", "s3://bucket"),
        ("s3:\\\\bucket\\x", "s3://bucket/x"),
        ("://bucket/x", "s3://bucket/x"),
        ("http:/host/x", "http://host/x"),
        ("htps://host/x", "did you mean https://host/x"),
        ("gs:/bucket", "gs://bucket"),
        ("file:/abs/x", "file:///abs/x"),
        ("hf:org/name", "write org/name"),
        ("xyz://bucket", "there is no kind of URL xyz://"),
        ("C:/models", "for a local path of this name write ./C:/models"),
    ],
)
def test_what_was_meant_as_a_url(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(meant)):
        check_spelling(text)
    check_spelling(f"./{text}")


@pytest.mark.parametrize(
    "text", ["s3:/KEY:SECRET@bucket/x", "s3:SECRET@bucket", "https//user:SECRET@host", "://SECRET@b"]
)
def test_misspelt_credentials_are_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"this|credentials") as caught:
        check_spelling(text)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("org/name", "a:b", "model:8b", "a//b", "/abs/s3:/x", "~/s3:x", "s3", "s3/x", "local//x", ""),
        *("s3://b/x", "S3A://b", "memory://x", "gs://b", "sftp://host/x", "hf://org/name@abc/file"),
    ],
)
def test_what_is_spelt_right(text: str) -> None:
    check_spelling(text)
