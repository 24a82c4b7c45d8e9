"""What people read when a store refuses: bucket, key, permission, remedy; and never a credential."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raymoe.config import load_config
from raymoe.config.model_refs import parse_model_ref
from raymoe.errors import CheckpointError, ProblemReport
from raymoe.object_store.errors import BucketMissing, StorageError
from raymoe.object_store.fsspec_store import FsspecStore
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.s3_store import S3Store
from raymoe.object_store.urls import join_url, normalize_url, s3_location
from raymoe.safe_text import scrub
from raymoe.sources.resolve import resolve_models
from tests.object_store.canned import Answer, canned
from tests.object_store.servers import Server, environment

KEY, SECRET, TOKEN = "AKIARECOGNISABLEKEY", "Recognisable/Secret+Key/abcdefghij", "RecognisableSessionToken//abc=="
SECRETS = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": TOKEN,
    "AWS_REGION": "eu-west-1",
}

# What real answers hold beside the code. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_TOLD = {
    "AWSAccessKeyId": KEY,
    "Token-0": TOKEN,
    "StringToSign": f"AWS4-HMAC-SHA256 {KEY} {SECRET}",
    "SignatureProvided": "0123456789abcdef" * 4,
    "CanonicalRequest": f"GET x-amz-security-token:{TOKEN}",
}


@pytest.fixture
def secrets() -> Iterator[None]:
    with environment({**SECRETS, "AWS_EC2_METADATA_DISABLED": "true"}):
        yield


def refusal(call: Callable[[S3Store], object], *answers: Answer, **options: Any) -> StorageError:
    """The error of a call that is answered so, looked through for credentials."""
    with canned(*answers) as server:
        store = S3Store(StorageOptions(endpoint=server.url, deadline_s=30, **options))
        with pytest.raises(StorageError) as caught:
            call(store)
        # One; and for bodiless answers one more that asks why, and perhaps botocore's question for the region.
        assert len(server.requests) <= 3
    told = [str(caught.value), repr(caught.value), repr(caught.value.args), *traceback.format_exception(caught.value)]
    told.append(pickle.dumps(caught.value).decode("latin-1"))
    for text in told:
        for secret in (KEY, SECRET, TOKEN, _TOLD["SignatureProvided"]):
            assert secret not in text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value


URL = "s3://bucket/models/a"
READ = ("s3:GetObject", lambda store: store.read(URL, 0, 10))
CALLS: list[tuple[str, Callable[[S3Store], object]]] = [
    READ,
    ("s3:GetObject", lambda store: store.stat(URL)),
    ("s3:GetObject", lambda store: store.read_all(URL)),
    ("s3:ListBucket", lambda store: store.list("s3://bucket/models")),
    ("s3:PutObject", lambda store: store.put(URL, b"x")),
    ("s3:DeleteObject", lambda store: store.delete(URL)),
    ("s3:PutObject", lambda store: store.create_upload(URL)),
    ("s3:PutObject", lambda store: store.upload_part(URL, "id", 1, b"x")),
    ("s3:PutObject", lambda store: store.copy_part(URL, "id", 1, "s3://other/b", 0, 1)),
    ("s3:PutObject", lambda store: store.complete_upload(URL, "id", [])),
    ("s3:AbortMultipartUpload", lambda store: store.abort_upload(URL, "id")),
    ("s3:ListBucketMultipartUploads", lambda store: store.list_uploads("s3://bucket/models")),
    ("s3:ListMultipartUploadParts", lambda store: store.list_parts(URL, "id")),
]


@pytest.mark.parametrize(("permission", "call"), CALLS)
@pytest.mark.s3
def test_refused_access_names_the_permission_and_the_place(
    secrets: None, permission: str, call: Callable[[S3Store], object]
) -> None:
    error = refusal(call, Answer(403, code="AccessDenied", fields=_TOLD))
    on_bucket = permission in ("s3:ListBucket", "s3:ListBucketMultipartUploads")
    place = "bucket" if on_bucket else "bucket/models/a"
    assert f"access is refused: {permission} on {place} is needed" in str(error)
    assert f"allow {permission} on arn:aws:s3:::{place}" in str(error)


@pytest.mark.s3
def test_refused_copies_name_both_places(secrets: None) -> None:
    error = refusal(lambda s: s.copy_part(URL, "id", 1, "s3://other/b", 0, 1), Answer(403, code="AccessDenied"))
    assert "s3:PutObject on bucket/models/a is needed, and s3:GetObject on other/b" in str(error)


@pytest.mark.s3
def test_refused_reads_may_mean_that_nothing_is_there(secrets: None) -> None:
    error = refusal(READ[1], Answer(403, code="AccessDenied"))
    assert "without s3:ListBucket on bucket this can also mean that the object does not exist" in str(error)


REGION = {"x-amz-bucket-region": "ap-south-1"}
REASONS = [
    (Answer(400, code="ExpiredToken"), "the credentials have expired", "aws sso login"),
    (Answer(403, code="InvalidAccessKeyId"), "does not know the access key", "set AWS_ACCESS_KEY_ID"),
    (Answer(403, code="SignatureDoesNotMatch"), "refuses the secret key", "AWS_SECRET_ACCESS_KEY"),
    (Answer(403, code="RequestTimeTooSkewed"), "clock is wrong", "NTP"),
    (Answer(404, code="NoSuchBucket"), "there is no bucket bucket at http://127.0.0.1", "correct the bucket"),
    (Answer(507, code="XMinioStorageFull"), "XMinioStorageFull", "free space"),
    (Answer(400, code="EntityTooSmall"), "EntityTooSmall", "see the page on object storage"),
    (Answer(418, code="Teapot", message=f"by {KEY} with {SECRET}"), "Teapot", "check the URL"),
]


@pytest.mark.parametrize(("answer", "what", "remedy"), REASONS)
@pytest.mark.parametrize("call", [READ[1], lambda store: store.stat(URL)])
@pytest.mark.s3
def test_reasons_and_remedies(
    secrets: None, answer: Answer, what: str, remedy: str, call: Callable[[S3Store], object]
) -> None:
    told = Answer(answer.status, code=answer.code, message=answer.message, fields=_TOLD)
    error = refusal(call, told)
    assert what in str(error)
    assert remedy in str(error).split("->")[1]
    assert URL in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(301, code="PermanentRedirect", headers=REGION, fields={"Endpoint": "bucket.s3.amazonaws.com"}),
        Answer(400, code="AuthorizationHeaderMalformed", fields={"Region": "ap-south-1"}),
        Answer(400, code="IllegalLocationConstraintException", headers=REGION),
    ],
)
@pytest.mark.s3
def test_wrong_regions_are_told_with_the_right_one(secrets: None, answer: Answer) -> None:
    with canned(answer) as server, pytest.raises(StorageError) as caught:
        S3Store(StorageOptions(endpoint=server.url, deadline_s=30)).read(URL, 0, 10)
    assert "the bucket bucket is in region ap-south-1, and it was looked for in eu-west-1" in str(caught.value)
    assert "set storage.region or AWS_REGION to ap-south-1" in str(caught.value)


@pytest.mark.s3
def test_missing_credentials() -> None:
    files = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    with environment({"AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1", **files}):
        error = refusal(READ[1], Answer(200))
    assert "no credentials found for http://127.0.0.1" in str(error)
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in str(error)


def test_wrong_keys_at_a_real_server(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if server.kind == "moto":
        pytest.skip("takes any key")
    for name, value, words in [
        ("AWS_SECRET_ACCESS_KEY", SECRET, "refuses the secret key"),
        ("AWS_ACCESS_KEY_ID", KEY, "does not know the access key"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            store = S3Store(StorageOptions(deadline_s=20))
            for call in (store.stat, store.read_all, store.list):
                with pytest.raises(StorageError, match=words) as caught:
                    call(join_url(bucket, "key"))
                assert value not in str(caught.value)
            assert store.counters.retries == 0


def test_a_wrong_secret_is_told_once_for_all_models(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server.kind == "moto":
        pytest.skip("takes any key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    models = [join_url(bucket, f"m{number}") for number in range(6)]
    with pytest.raises(CheckpointError) as caught:
        resolve_models([parse_model_ref(model) for model in models])
    assert len(caught.value.problems) == 6
    assert str(caught.value).startswith(f"{'; '.join(models[:4])} and 2 more: the store refuses the secret key")


def test_a_bucket_policy_that_denies(server: Server, bucket: str) -> None:
    """A real refusal, where a server has policies for its owner: moto."""
    if server.kind != "moto":
        pytest.skip("the gateway's owner may do everything")
    store, url = S3Store(StorageOptions(deadline_s=20)), join_url(bucket, "key")
    store.put(url, b"x")
    name = s3_location(bucket).bucket
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{name}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    server.client().put_bucket_policy(Bucket=name, Policy=policy)
    with pytest.raises(StorageError, match=rf"s3:GetObject on {name}/key is needed"):
        store.read_all(url)
    assert store.counters.retries == 0


def test_missing_buckets_at_real_servers(server: Server) -> None:
    with pytest.raises(BucketMissing, match="correct the bucket's name"):
        S3Store(StorageOptions()).stat("s3://no-such-bucket-here/key")


# --- credentials in what users write

BAD_URLS = [
    f"s3://{KEY}:{SECRET}@bucket/key",
    f"s3://{KEY}:{SECRET}@bucket/key+s3://bucket/adapter",
    f"s3://bucket/base+s3://{KEY}:{SECRET}@bucket/adapter",
    f"s3a://{KEY}@bucket/key",
    f"s3://{KEY}:{SECRET}",
    f"https://user:{SECRET}@host/folder",
    f"https://host/folder?X-Amz-Signature={SECRET}&X-Amz-Credential={KEY}",
    f"s3://bucket/key?token={TOKEN}@main",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_credentials_in_urls_are_refused_and_not_repeated(url: str) -> None:
    for parse in (normalize_url, parse_model_ref, lambda u: parse_model_ref({"model": {"path": u}})):
        if parse is normalize_url and "+s3://" in url:
            continue
        with pytest.raises(ValueError, match=r"credentials|query") as caught:
            parse(url)  # type: ignore[operator]
        text = "".join(traceback.format_exception(caught.value, chain=True)[-1:])
        assert not any(part in text for part in (KEY, SECRET, SECRET[:12], SECRET[-10:], TOKEN))


@pytest.mark.parametrize(
    "endpoint", [f"http://{KEY}:{SECRET}@host", f"https://host?key={SECRET}", f"{KEY}:{SECRET}@host"]
)
def test_credentials_in_endpoints_are_refused_and_not_repeated(endpoint: str) -> None:
    with pytest.raises(ProblemReport, match=r"storage\.endpoint") as caught:
        StorageOptions(endpoint=endpoint)
    assert SECRET not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", BAD_URLS)
def test_nor_are_they_in_the_problems_of_a_config(url: str, tmp_path: Path) -> None:
    expert = {"source_model": url, "positive_prompts": ["a"]}
    (tmp_path / "config.yaml").write_text(json.dumps({"base_model": url, "experts": [expert, expert]}))
    with pytest.raises(ProblemReport, match=r"credentials|query") as caught:
        load_config(tmp_path / "config.yaml")
    text = "".join(traceback.format_exception(caught.value, chain=True))
    for told in (str(caught.value), text):
        assert not any(part in told for part in (KEY, SECRET, SECRET[:12], SECRET[-10:], TOKEN))


def test_options_hold_no_credentials() -> None:
    names = set(StorageOptions.__dataclass_fields__)
    assert not any(word in name for name in names for word in ("key", "secret", "token", "password", "credential"))
    for bad in ({"max_requests": 0}, {"read_timeout_s": 0}, {"deadline_s": -1}, {"checksum": "md5"}):
        with pytest.raises(ProblemReport, match=f"storage.{next(iter(bad))}"):
            StorageOptions(**bad)  # type: ignore[arg-type]


def test_scrubbing(secrets: None) -> None:
    text = f"at https://u:p@h/x?X-Amz-Credential=abc%2F1&X-Amz-Signature=0f&a=b with {SECRET} for s3://bucket/a"
    scrubbed = scrub(text)
    assert scrubbed == (
        "at https://h/x?X-Amz-Credential=<removed>&X-Amz-Signature=<removed>&a=b with <AWS_SECRET_ACCESS_KEY> for "
        "s3://bucket/a"
    )


def test_unknown_kinds_of_urls() -> None:
    with pytest.raises(
        StorageError, match=r"nosuch://place/a: the store can't read it: ValueError: Protocol not known"
    ):
        FsspecStore("nosuch", StorageOptions()).read_all("nosuch://place/a")
    with pytest.raises(StorageError, match=r"install the package that fsspec needs"):
        FsspecStore("abfs", StorageOptions()).read_all("abfs://place/a")
