"""A simulated S3 server for measurements: objects without bytes, requests that take time, and counts of all of them.

    python scripts/simulated_s3.py --mixture l70x8 --latency 0.02 --copy-seconds 1 --complete-seconds 0.3
    python scripts/simulated_s3.py --mixture tiny --copies-per-second 20 --copies-at-once 8     # and 503 above that

The models of a mixture (sparse_models.py) lie in the bucket `models`: s3://models/0, s3://models/1, ... Outputs go to
the bucket `out`. Of what is sent only headers and MD5s are kept (simulated_objects.py), so a merge of any size fits
into memory. Any signature is taken; addresses are path-style. The first line that is printed is the server's URL.

S3's rules are kept: parts of 5 MiB (but the last) to 5 GiB, 10,000 of them; ranges inside their source; `If-Match`,
`If-None-Match`, `x-amz-copy-source-if-match`; `Content-MD5`; 1,000 keys, uploads or parts per page; MD5s as ETags.

The server answers for itself below `/-/` (JSON; these requests are neither slow nor counted):

    GET  /-/stats           counts since the reset: by operation, by operation and kind of object, bytes, copies
    GET  /-/timeline        for each second since the reset: requests by operation, mean and most copies in flight
    POST /-/reset           forget the counts; a copy counts as repeated also if the first one was before
    POST /-/pace?latency=0  change how slow it is: names of the options, with `_` for `-`
    GET  /-/audit?output=out/merge          what is wrong with a merge, tensor by tensor
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import dataclasses
import itertools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from aiohttp import web
from simulated_objects import Audit, Object, Part, Upload, md5, model_objects, sent_part
from sparse_models import MIXTURES, Mixture

MODELS, OUTPUTS = "models", "out"
_MIN_PART, _MAX_PART, _MAX_PARTS, _PAGE = 5 << 20, 5 << 30, 10_000, 1000
_SMALL_BODY = 1 << 20  # larger ones are hashed in a thread
_COPY = "UploadPartCopy"


@dataclass(kw_only=True)
class Pace:
    """How slow the server is. Zero: no delay, no limit."""

    latency: float = 0.0
    copy_seconds: float = 0.0
    copy_bytes_per_second: float = 0.0
    complete_seconds: float = 0.0
    copies_per_second: float = 0.0
    copies_at_once: int = 0


_PACE_HELP = {
    "latency": "seconds that every request waits first",
    "copy_seconds": "seconds that a copied part takes",
    "copy_bytes_per_second": "the rate of each copied part, beside that",
    "complete_seconds": "seconds that it takes to complete an upload",
    "copies_per_second": "answer SlowDown (503) to copies above this rate",
    "copies_at_once": "answer SlowDown (503) to copies above this number in flight",
}


class Counts:
    """What was asked for since the last reset."""

    def __init__(self) -> None:
        self._began = self._changed = time.monotonic()
        self.operations: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._copies = self._copies_repeated = 0
        self._in_flight = self._most_in_flight = 0
        self._first_copy: float | None = None
        self._last_copy: float | None = None
        self._timeline: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def enter(self, operation: str, key: str) -> None:
        now = self._pass_time()
        self.operations[operation] += 1
        self.objects[f"{operation} {_kind(key)}"] += 1
        self._timeline[int(now - self._began)][operation] += 1

    def leave(self, operation: str, status: int) -> None:
        if status >= 400:
            self.errors[f"{operation} {status}"] += 1

    @contextmanager
    def copying(self) -> Iterator[None]:
        """A copy that the server has begun with."""
        now = self._pass_time()
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)
        second = self._timeline[int(now - self._began)]
        second["most copies in flight"] = max(second["most copies in flight"], self._in_flight)
        self._first_copy = self._first_copy or now
        try:
            yield
        finally:
            self._last_copy = self._pass_time()
            self._in_flight -= 1

    def copied(self, size: int, *, is_repeated: bool) -> None:
        self._copies += 1
        self._copies_repeated += is_repeated
        self.bytes["copied"] += size

    def plain(self) -> dict[str, Any]:
        copying = (self._last_copy or 0.0) - (self._first_copy or 0.0)
        seconds = self._pass_time() - self._began
        return {
            "seconds": round(seconds, 3),
            "requests": self.operations.total(),
            "by_operation": dict(self.operations.most_common()),
            "by_object": dict(self.objects.most_common()),
            "errors": dict(self.errors),
            "bytes": dict(self.bytes),
            "copies": self._copies,
            "copies_repeated": self._copies_repeated,
            "first_copy_s": round(self._first_copy - self._began, 3) if self._first_copy else None,
            "copying_s": round(copying, 3),
            "copy_seconds": round(sum(second["copy seconds"] for second in self._timeline.values()), 3),
            "most_copies_in_flight": self._most_in_flight,
            "most_requests_a_second": max(map(_requests, self._timeline.values()), default=0),
        }

    def timeline(self) -> list[dict[str, Any]]:
        """Of each second in which something happened. A second's `copy seconds` are the mean of copies in flight."""
        return [{"second": second, **counts} for second, counts in sorted(self._timeline.items())]

    def _pass_time(self) -> float:
        """Add the seconds of copies in flight since the last change to the seconds that they were spent in."""
        now = time.monotonic()
        at = self._changed - self._began
        while self._in_flight and at < now - self._began:
            end = min(now - self._began, int(at) + 1)
            self._timeline[int(at)]["copy seconds"] += self._in_flight * (end - at)
            at = end
        self._changed = now
        return now


def _requests(second: Mapping[str, float]) -> float:
    return sum(count for name, count in second.items() if not name.endswith(("in flight", "copy seconds")))


def _kind(key: str) -> str:
    """What an object is to a merge: a note of its journal by kind, weights, or a small file."""
    if match := re.search(r"/\.raymoe/([a-z]+)", key):
        return f"journal: {match[1]}"
    side = "source" if key.startswith(f"{MODELS}/") else "output"
    return f"{side}: {'weights' if key.endswith('.safetensors') else 'small file or prefix'}"


class S3Error(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code


class CopyLimit:
    """Which copies are answered with SlowDown: those above a rate (a second's worth may come at once), or a number."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self._left, self._looked = pace, pace.copies_per_second, time.monotonic()
        self.in_flight = 0

    def check(self) -> None:
        rate, now = self._pace.copies_per_second, time.monotonic()
        self._left, self._looked = min(rate, self._left + rate * (now - self._looked)), now
        is_over = 0 < self._pace.copies_at_once <= self.in_flight
        if is_over or (rate and self._left < 1):
            raise S3Error(503, "SlowDown", "Please reduce your request rate.")
        self._left -= 1


class SimulatedS3:
    """Answers requests. `handle` takes them all."""

    def __init__(self, mixture: Mixture, pace: Pace) -> None:
        self._mixture, self._pace = mixture, pace
        self._counts, self._copy_limit = Counts(), CopyLimit(pace)
        self._objects = {each.name: each for each in model_objects(mixture, MODELS)}
        self._names = sorted(self._objects)
        self._uploads: dict[str, Upload] = {}
        self._copied: set[tuple[str, int]] = set()  # (name, part), since the start
        self._ids = itertools.count(1)
        self._answers: dict[str, Callable[[web.Request, str], Awaitable[web.StreamResponse]]] = {
            "ListObjects": self._list_objects,
            "HeadObject": self._head_object,
            "GetObject": self._get_object,
            "PutObject": self._put_object,
            "DeleteObject": self._delete_object,
            "DeleteObjects": self._delete_objects,
            "CreateUpload": self._create_upload,
            "UploadPart": self._upload_part,
            _COPY: self._upload_part_copy,
            "CompleteUpload": self._complete_upload,
            "AbortUpload": self._abort_upload,
            "ListUploads": self._list_uploads,
            "ListParts": self._list_parts,
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = unquote(request.rel_url.raw_path).lstrip("/")
        if name.startswith("-/"):
            return await self._answer_about_itself(request, name[2:])
        operation, counts, status = _operation(request, name), self._counts, 500
        counts.enter(operation, name if "/" in name.rstrip("/") else f"{name}/{request.query.get('prefix', '')}")
        try:
            await asyncio.sleep(self._pace.latency)
            if name.partition("/")[0] not in (MODELS, OUTPUTS):
                raise S3Error(404, "NoSuchBucket")
            response = await self._answers[operation](request, name)
            status = response.status
            return response
        except S3Error as error:
            status = error.status
            await request.read()  # what was sent, or the connection could not be used again
            body = f"<Error><Code>{error.code}</Code><Message>{escape(str(error))}</Message></Error>"
            return _xml("" if request.method == "HEAD" else body, status=status)
        finally:
            counts.leave(operation, status)

    async def _answer_about_itself(self, request: web.Request, what: str) -> web.Response:
        if what == "stats":
            plain = self._counts.plain() | {"open_uploads": len(self._uploads), "objects": len(self._objects)}
            return web.json_response(plain | {"pace": dataclasses.asdict(self._pace)})
        if what == "timeline":
            return web.json_response(self._counts.timeline())
        if what == "reset":
            self._counts = Counts()
            return web.json_response({})
        if what == "pace":
            for name, value in request.query.items():
                setattr(self._pace, name, type(getattr(self._pace, name))(float(value)))
            self._copy_limit = CopyLimit(self._pace)
            return web.json_response(dataclasses.asdict(self._pace))
        if what == "audit":
            audit = Audit(self._mixture, dict(self._objects), MODELS)
            await asyncio.to_thread(audit.check, request.query["output"])
            return web.json_response({**audit.counts, "problems": audit.problems})
        return web.Response(status=404)

    # --- objects

    async def _list_objects(self, request: web.Request, name: str) -> web.Response:
        bucket, query = name.partition("/")[0], request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        begin = bisect.bisect_left(self._names, f"{bucket}/{prefix}")
        begin = max(begin, bisect.bisect_right(self._names, f"{bucket}/{after}") if after else 0)
        items, folders, last, is_cut = list[str](), dict[str, None](), "", False
        for full in itertools.islice(self._names, begin, None):
            if not full.startswith(f"{bucket}/{prefix}"):
                break
            if len(items) + len(folders) >= int(query.get("max-keys", _PAGE)):
                is_cut = True
                break
            last = full[len(bucket) + 1 :]
            folder, found, _ = last[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                folders[f"{prefix}{folder}{delimiter}"] = None
            else:
                items.append(_listed(last, self._objects[full]))
        common = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if is_cut else ""
        return _xml(
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(items)}</KeyCount>"
            f"<IsTruncated>{_word(is_cut)}</IsTruncated>{more}{''.join(items)}{common}</ListBucketResult>"
        )

    async def _head_object(self, request: web.Request, name: str) -> web.StreamResponse:
        found = self._found(name)
        response = web.StreamResponse(headers=_headers(found))
        response.content_length = found.size
        await response.prepare(request)
        await response.write_eof()
        return response

    async def _get_object(self, request: web.Request, name: str) -> web.StreamResponse:
        found = self._found(name)
        _check_etag(request.headers.get("If-Match"), found)
        start, end, status, headers = 0, found.size, 200, _headers(found)
        if asked := request.headers.get("Range"):
            start, end = _range(asked, found.size)
            status, headers["Content-Range"] = 206, f"bytes {start}-{min(end, found.size) - 1}/{found.size}"
            end = min(end, found.size)
            if start >= found.size:
                raise S3Error(416, "InvalidRange")
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - start
        await response.prepare(request)
        for block in found.blocks(start, end):
            await response.write(block)
        self._counts.bytes["read"] += end - start
        await response.write_eof()
        return response

    async def _put_object(self, request: web.Request, name: str) -> web.Response:
        data, etag = await _body(request)
        self._check_absent(request, name)
        self._counts.bytes["put"] += len(data)
        self._keep(Object(name, etag, [sent_part(data, etag, keep_all=True)], _metadata(request)))
        return web.Response(headers={"ETag": f'"{etag}"'})

    async def _delete_object(self, request: web.Request, name: str) -> web.Response:
        self._forget(name)
        return web.Response(status=204)

    async def _delete_objects(self, request: web.Request, name: str) -> web.Response:
        document = ElementTree.fromstring(await request.read())
        for element in document.iter():
            if element.tag.rpartition("}")[2] == "Key":
                self._forget(f"{name.partition('/')[0]}/{element.text}")
        return _xml("<DeleteResult/>")

    def _forget(self, name: str) -> None:
        if self._objects.pop(name, None) is not None:
            del self._names[bisect.bisect_left(self._names, name)]

    # --- multipart uploads

    async def _create_upload(self, request: web.Request, name: str) -> web.Response:
        upload_id = f"upload-{next(self._ids)}"
        self._uploads[upload_id] = Upload(name, _metadata(request))
        bucket, _, key = name.partition("/")
        return _xml(
            f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
            f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
        )

    async def _upload_part(self, request: web.Request, name: str) -> web.Response:
        upload, number = self._upload(request, name)
        data, etag = await _body(request)
        self._counts.bytes["sent"] += len(data)
        upload.parts[number] = sent_part(data, etag)
        return web.Response(headers={"ETag": f'"{etag}"'})

    async def _upload_part_copy(self, request: web.Request, name: str) -> web.Response:
        self._copy_limit.check()
        upload, number = self._upload(request, name)
        source = self._found(unquote(request.headers["x-amz-copy-source"]).lstrip("/"))
        _check_etag(request.headers.get("x-amz-copy-source-if-match"), source)
        asked = request.headers.get("x-amz-copy-source-range")
        start, end = _range(asked, source.size) if asked else (0, source.size)
        if not 0 <= start < end <= source.size or end - start > _MAX_PART:
            raise S3Error(400, "InvalidArgument", f"range {start}-{end - 1} of {source.size} bytes")
        limit, rate, counts = self._copy_limit, self._pace.copy_bytes_per_second, self._counts
        limit.in_flight += 1
        try:
            with counts.copying():
                await asyncio.sleep(self._pace.copy_seconds + ((end - start) / rate if rate else 0.0))
        finally:
            limit.in_flight -= 1
        etag = md5(f"{source.name} {source.etag} {start} {end}".encode())
        upload.parts[number] = Part(size=end - start, etag=etag, source=source, at=start)
        counts.copied(end - start, is_repeated=(name, number) in self._copied)
        self._copied.add((name, number))
        return _xml(f"<CopyPartResult><ETag>&quot;{etag}&quot;</ETag></CopyPartResult>")

    async def _complete_upload(self, request: web.Request, name: str) -> web.Response:
        upload, _ = self._upload(request, name)
        listed = _listed_parts(await request.read())
        parts = [upload.parts.get(number) for number, _ in listed]
        if not parts or [number for number, _ in listed] != sorted({number for number, _ in listed}):
            raise S3Error(400, "InvalidPartOrder")
        for part, (number, etag) in zip(parts, listed):
            if part is None or part.etag != etag:
                raise S3Error(400, "InvalidPart", f"part {number}")
            if part.size < _MIN_PART and number != listed[-1][0]:
                raise S3Error(400, "EntityTooSmall", f"part {number} has {part.size} bytes")
        await asyncio.sleep(self._pace.complete_seconds)
        self._check_absent(request, name)
        etag = f"{md5(b''.join(bytes.fromhex(etag) for _, etag in listed))}-{len(listed)}"
        self._keep(Object(name, etag, [part for part in parts if part is not None], upload.metadata))
        self._uploads.pop(request.query["uploadId"], None)
        return _xml(f"<CompleteMultipartUploadResult><ETag>&quot;{etag}&quot;</ETag></CompleteMultipartUploadResult>")

    async def _abort_upload(self, request: web.Request, name: str) -> web.Response:
        self._upload(request, name)
        del self._uploads[request.query["uploadId"]]
        return web.Response(status=204)

    async def _list_uploads(self, request: web.Request, name: str) -> web.Response:
        full = f"{name.partition('/')[0]}/{request.query.get('prefix', '')}"
        after = request.query.get("key-marker", ""), request.query.get("upload-id-marker", "")
        open_ones = ((each.name.partition("/")[2], key) for key, each in self._uploads.items() if each.name >= full)
        found = sorted(each for each in open_ones if f"{name.partition('/')[0]}/{each[0]}".startswith(full))
        found = [each for each in found if each > after]
        page, is_cut = found[:_PAGE], len(found) > _PAGE
        items = "".join(f"<Upload><Key>{escape(key)}</Key><UploadId>{i}</UploadId></Upload>" for key, i in page)
        marks = ""
        if is_cut:
            key, upload_id = page[-1]
            marks = f"<NextKeyMarker>{escape(key)}</NextKeyMarker><NextUploadIdMarker>{upload_id}</NextUploadIdMarker>"
        return _xml(
            f"<ListMultipartUploadsResult><IsTruncated>{_word(is_cut)}</IsTruncated>{marks}{items}"
            "</ListMultipartUploadsResult>"
        )

    async def _list_parts(self, request: web.Request, name: str) -> web.Response:
        upload, _ = self._upload(request, name)
        after = int(request.query.get("part-number-marker", 0))
        numbers = sorted(number for number in upload.parts if number > after)
        items = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{upload.parts[number].etag}&quot;</ETag>"
            f"<Size>{upload.parts[number].size}</Size></Part>"
            for number in numbers[:_PAGE]
        )
        is_cut = len(numbers) > _PAGE
        mark = f"<NextPartNumberMarker>{numbers[_PAGE - 1]}</NextPartNumberMarker>" if is_cut else ""
        return _xml(f"<ListPartsResult><IsTruncated>{_word(is_cut)}</IsTruncated>{mark}{items}</ListPartsResult>")

    # --- helpers

    def _found(self, name: str) -> Object:
        if name not in self._objects:
            raise S3Error(404, "NoSuchKey", name)
        return self._objects[name]

    def _upload(self, request: web.Request, name: str) -> tuple[Upload, int]:
        """The open upload that a request names, and the number of its part (if it names one)."""
        upload, number = self._uploads.get(request.query["uploadId"]), int(request.query.get("partNumber", 1))
        if upload is None or upload.name != name:
            raise S3Error(404, "NoSuchUpload")
        if not 1 <= number <= _MAX_PARTS:
            raise S3Error(400, "InvalidArgument", f"part number {number}")
        return upload, number

    def _check_absent(self, request: web.Request, name: str) -> None:
        if request.headers.get("If-None-Match") == "*" and name in self._objects:
            raise S3Error(412, "PreconditionFailed")

    def _keep(self, new: Object) -> None:
        if new.name not in self._objects:
            bisect.insort(self._names, new.name)
        self._objects[new.name] = new


# --- requests and answers


def _operation(request: web.Request, name: str) -> str:
    method, query = request.method, request.query
    if method == "GET":
        if "uploads" in query:
            return "ListUploads"
        return "ListParts" if "uploadId" in query else "GetObject" if name.partition("/")[2] else "ListObjects"
    if method == "PUT" and "partNumber" in query:
        return _COPY if "x-amz-copy-source" in request.headers else "UploadPart"
    if method == "POST" and "delete" in query:
        return "DeleteObjects"
    if method == "POST":
        return "CreateUpload" if "uploads" in query else "CompleteUpload"
    if method == "DELETE":
        return "AbortUpload" if "uploadId" in query else "DeleteObject"
    return "HeadObject" if method == "HEAD" else "PutObject"


async def _body(request: web.Request) -> tuple[bytes, str]:
    """What was sent, and its MD5, which has to be that of the request."""
    if request.headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        raise S3Error(501, "NotImplemented", "aws-chunked bodies")
    data = await request.read()
    etag = md5(data) if len(data) <= _SMALL_BODY else await asyncio.to_thread(md5, data)
    told = request.headers.get("Content-MD5")
    if told is not None and base64.b64decode(told).hex() != etag:
        raise S3Error(400, "BadDigest")
    return data, etag


def _range(asked: str, size: int) -> tuple[int, int]:
    first, _, last = asked.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1 if last else size


def _check_etag(wanted: str | None, found: Object) -> None:
    if wanted and wanted.strip('"') != found.etag:
        raise S3Error(412, "PreconditionFailed")


def _listed_parts(body: bytes) -> list[tuple[int, str]]:
    """(number, ETag) of the parts that an upload is to be completed with."""
    found = []
    for part in ElementTree.fromstring(body):
        values = {child.tag.rsplit("}")[-1]: child.text or "" for child in part}
        found.append((int(values["PartNumber"]), values["ETag"].strip('"')))
    return found


def _listed(key: str, found: Object) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><Size>{found.size}</Size><ETag>&quot;{found.etag}&quot;</ETag>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
    )


def _metadata(request: web.Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items() if name.lower().startswith("x-amz-meta-")}


def _headers(found: Object) -> dict[str, str]:
    return {"ETag": f'"{found.etag}"', "Accept-Ranges": "bytes", **found.metadata}


def _word(value: bool) -> str:
    return "true" if value else "false"


def _xml(body: str, status: int = 200) -> web.Response:
    return web.Response(text=body, status=status, content_type="application/xml")


async def serve(mixture: Mixture, pace: Pace, port: int) -> None:
    """Serve on loopback until cancelled. Prints the URL when requests are taken."""
    app = web.Application(client_max_size=_MAX_PART)
    app.router.add_route("*", "/{path:.*}", SimulatedS3(mixture, pace).handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", choices=MIXTURES, default="tiny", help="the models that are there")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    for field in dataclasses.fields(Pace):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help=_PACE_HELP[field.name])
    options = parser.parse_args()
    pace = Pace(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Pace)})
    asyncio.run(serve(MIXTURES[options.mixture], pace, options.port))


if __name__ == "__main__":
    main()
