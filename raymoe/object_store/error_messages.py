"""Translates errors of client libraries for users: which object, what happened, which permission, which remedy.

`storage_error` is the only place that does this. It takes from an error its class, a code, a status, the bucket's
region and the server's own sentence, never the rest: replies hold key ids, tokens and signatures. The exception that it
returns keeps no reference to the error, and is raised outside of any `except` (no `__cause__`, no `__context__`).
"""

from __future__ import annotations

import errno
import os
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from raymoe.object_store.errors import (
    BucketMissing,
    ObjectMissing,
    StorageError,
    StoreRequest,
    UploadNotFound,
    object_changed_error,
    object_exists_error,
    storage_problem,
)
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.retry import Failure, FailureKind, Mismatch, ShortRead, error_code, error_status
from raymoe.object_store.urls import is_s3, s3_location

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
_PERMISSIONS = {
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "upload_part_copy": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_parts": "s3:ListMultipartUploadParts",
}
_BUCKET_OPERATIONS = frozenset({"list_objects_v2", "list_multipart_uploads"})
_ACTIONS = {
    "get_object": "read",
    "head_object": "look at",
    "list_objects_v2": "list",
    "delete_object": "delete",
    "list_multipart_uploads": "list open uploads of",
    "list_parts": "list uploaded parts of",
    "abort_multipart_upload": "abort an upload of",
}
_BAD_KEY_CODES = frozenset({"InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "InvalidClientTokenId"})
_ACCESS_DENIED_CODES = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden"})
_WRONG_REGION_CODES = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"}
)
_BAD_PARTS = frozenset({"EntityTooLarge", "EntityTooSmall", "InvalidPart", "InvalidPartOrder", "NotImplemented"})
# Classes of botocore and aiohttp; a class counts with its bases.
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})
_CREDENTIALS_FAIL = frozenset({"CredentialRetrievalError", "TokenRetrievalError", "SSOError", "ConfigParseError"})
_UNREACHABLE = frozenset({"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"})
_CERTIFICATE = frozenset({"SSLError", "ClientSSLError"})
_BAD_REGION = frozenset({"InvalidRegionError", "NoRegionError", "InvalidEndpointConfigurationError"})
_SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, where the process runs"
_READ_OPERATIONS = frozenset({"get_object", "head_object", "upload_part_copy"})


@dataclass(frozen=True, slots=True)
class _ClientError:
    """The parts of a client library's error that are used."""

    error: Exception
    code: str
    status: int | None
    names: frozenset[str]


def storage_error(failure: Failure, request: StoreRequest, options: StorageOptions) -> StorageError:
    """The error to raise for a call that failed for good."""
    error = failure.error
    names = frozenset(cls.__name__ for cls in type(error).__mro__)
    found = _ClientError(error, error_code(error), error_status(error), names)
    for parts in (_missing_or_changed, _credentials_error, _location_error, _connection_error):
        if (known := parts(found, request, options)) is not None:
            return known
    it = "the bucket" if request.operation in _BUCKET_OPERATIONS else "it"
    what = f"the store can't {_ACTIONS.get(request.operation, 'write')} {it}: {_error_text(found)}"
    if failure.kind is not FailureKind.PERMANENT:
        what = f"{what} (gave up after {failure.tries} tries in {failure.elapsed_s:.0f} s)"
        return storage_problem(request, what, "the store is overloaded or down: run the same command again later")
    if found.code in _BAD_PARTS:
        return storage_problem(
            request, what, "the store does not support this part of S3; see the page on object storage"
        )
    if isinstance(error, ImportError):
        return storage_problem(request, what, "install the package that fsspec needs for this kind of URL")
    if _is_full(found):
        return storage_problem(request, what, "free space in the store, or raise its quota")
    return storage_problem(request, what, "check the URL and the store")


def _missing_or_changed(found: _ClientError, request: StoreRequest, options: StorageOptions) -> StorageError | None:
    if isinstance(found.error, Mismatch):
        return object_changed_error(request, str(found.error))
    if found.code == "NoSuchBucket":
        remedy = "correct the bucket's name, or create it; a bucket elsewhere needs its endpoint"
        return storage_problem(
            request, f"there is no bucket {_bucket(request)} at {_endpoint(options)}", remedy, BucketMissing
        )
    if found.code == "NoSuchUpload":
        what = "the upload is no longer open: it was aborted, or expired"
        return storage_problem(request, what, "run the same command again; it begins a new upload", UploadNotFound)
    if found.status == 412 or found.code == "PreconditionFailed":
        if request.operation in _READ_OPERATIONS:
            return object_changed_error(request, "its ETag is another")
        return object_exists_error(request.url)
    if (
        found.status == 416
        or found.code == "InvalidRange"
        or (found.code == "InvalidArgument" and request.operation == "upload_part_copy")
    ):
        return object_changed_error(request, "it is shorter")
    if found.code == "NoSuchKey" or (found.status == 404 and request.operation in _READ_OPERATIONS):
        what = (
            f"there is no object {request.source_url} to copy from" if request.source_url else "there is no such object"
        )
        return storage_problem(request, what, "correct the name", ObjectMissing)
    if isinstance(found.error, FileExistsError):
        return object_exists_error(request.url)
    if isinstance(found.error, FileNotFoundError):
        return storage_problem(request, "there is nothing of this name", "correct the name", ObjectMissing)
    return None


def _credentials_error(found: _ClientError, request: StoreRequest, options: StorageOptions) -> StorageError | None:
    if found.code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"):
        remedy = "renew them (as in `aws sso login`) and run the same command again"
        return storage_problem(request, "the credentials have expired", remedy)
    if found.code in ("RequestTimeTooSkewed", "RequestExpired"):
        what = "this machine's clock is wrong: the store refuses the time of the request"
        return storage_problem(request, what, "set the clock (NTP)")
    if found.code in _BAD_KEY_CODES:
        what = f"{_endpoint(options)} does not know the access key, or refuses its token"
        return storage_problem(request, what, f"{_SET_CREDENTIALS}; check that they belong to this endpoint")
    if found.code == "SignatureDoesNotMatch":
        what = "the store refuses the secret key (or a proxy changed the request)"
        return storage_problem(request, what, _SET_CREDENTIALS)
    if found.names & _NO_CREDENTIALS:
        remedy = f"{_SET_CREDENTIALS}; for a public bucket set storage.anonymous"
        return storage_problem(request, f"no credentials found for {_endpoint(options)}", remedy)
    if "ProfileNotFound" in found.names:
        profile = options.profile or os.environ.get("AWS_PROFILE", "")
        return storage_problem(
            request, f"there is no profile {profile!r} in ~/.aws", "correct storage.profile or AWS_PROFILE"
        )
    if found.names & _CREDENTIALS_FAIL:
        what = f"no credentials could be obtained ({type(found.error).__name__})"
        return storage_problem(request, what, "log in again, or check ~/.aws")
    if found.code in _ACCESS_DENIED_CODES or found.status in (401, 403) or isinstance(found.error, PermissionError):
        return _access_denied(request)
    return None


def _access_denied(request: StoreRequest) -> StorageError:
    permission = _PERMISSIONS.get(request.operation)
    if permission is None or not is_s3(request.url):
        return storage_problem(request, "access is refused", "check the credentials' permissions")
    bucket = _bucket(request)
    place = bucket if request.operation in _BUCKET_OPERATIONS else f"{bucket}/{s3_location(request.url).key}"
    what = f"access is refused: {permission} on {place} is needed"
    remedy = f"allow {permission} on arn:aws:s3:::{place} for the credentials in use"
    if request.source_url is not None:
        source = s3_location(request.source_url)
        what += f", and s3:GetObject on {source.bucket}/{source.key}"
    elif permission == "s3:GetObject":
        # Without it S3 answers 403 instead of 404 for a missing object.
        remedy += f"; without s3:ListBucket on {bucket} this can also mean that the object does not exist"
    return storage_problem(request, what, remedy)


def _location_error(found: _ClientError, request: StoreRequest, options: StorageOptions) -> StorageError | None:
    if found.names & _BAD_REGION:
        return storage_problem(request, "the region is missing or not valid", "set storage.region or AWS_REGION")
    if found.code not in _WRONG_REGION_CODES and found.status not in (301, 307):
        return None
    response = getattr(found.error, "response", {})
    region = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    region = region or response.get("Error", {}).get("Region")
    used = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    right = f"is in region {region}, and" if region else "is elsewhere:"
    what = f"the bucket {_bucket(request)} {right} it was looked for in {used or 'the default region'}"
    return storage_problem(request, what, f"set storage.region or AWS_REGION to {region or 'the region of the bucket'}")


def _connection_error(found: _ClientError, request: StoreRequest, options: StorageOptions) -> StorageError | None:
    if not is_s3(request.url) and "ClientConnectorError" in found.names:
        host = urlsplit(request.url).hostname
        if isinstance(getattr(found.error, "os_error", None), socket.gaierror):
            what, remedy = f"the host {host} was not found", "correct the host's name in the URL, or check the network"
        else:
            what, remedy = f"the host {host} can't be reached", "check host and port in the URL, and the network"
        return storage_problem(request, what, remedy)
    if found.names & _UNREACHABLE:
        what = f"{_endpoint(options)} can't be reached"
        return storage_problem(request, what, "check the network, and storage.endpoint or AWS_ENDPOINT_URL")
    if found.names & _CERTIFICATE:
        remedy = "for an authority of your own set AWS_CA_BUNDLE; or the endpoint is http:// and not https://"
        return storage_problem(request, f"the certificate of {_endpoint(options)} is not accepted", remedy)
    return None


def _error_text(found: _ClientError) -> str:
    """The server's own sentence, or else what the library did."""
    error, status = found.error, found.status
    response = getattr(error, "response", None)
    answer = response.get("Error", {}) if isinstance(response, dict) else {}
    if answer:
        message = str(answer.get("Message") or "").strip()
        return " ".join(filter(None, (f"HTTP {status}" if status else "", found.code, message and f"({message})")))
    if isinstance(error, ShortRead):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]:.300}" if text else type(error).__name__


def _is_full(found: _ClientError) -> bool:
    codes = ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "DiskFull", "NoSpace")
    return any(word in found.code for word in codes) or getattr(found.error, "errno", None) == errno.ENOSPC


def _bucket(request: StoreRequest) -> str:
    return s3_location(request.url).bucket if is_s3(request.url) else request.url


def _endpoint(options: StorageOptions) -> str:
    used = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return re.sub(r"//[^/@]*@", "//", used.split("?")[0]) if used else "the S3 endpoint of AWS"
