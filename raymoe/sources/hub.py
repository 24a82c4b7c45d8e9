"""Reads models on the Hugging Face Hub in place: planning fetches JSON files and weight headers.

    org/name@revision --model_info--> commit + file sizes   one request; what follows is pinned to the commit
    JSON files        --hf_hub_download--> the Hub cache
    headers           --ranged GET--> memory                or from the file's copy in the cache
    whole files       --hf_hub_download--> the Hub cache    by the actors, later; size checked as planned

Only the public API of huggingface_hub is used, from 0.30 (transformers 4) to 2 (transformers 5). So HF_HOME,
HF_HUB_CACHE, HF_TOKEN and HF_ENDPOINT work as everywhere else. Offline (HF_HUB_OFFLINE=1, or `HubOptions`) only the
cache is used. The library is imported on first use: merges of local models do not need it.
"""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from raymoe.config.model_refs import PathRef
from raymoe.sources.facts import SourceFile
from raymoe.sources.folder_protocol import unusable_checkpoint
from raymoe.sources.hub_errors import hub_errors
from raymoe.sources.local_folder import LocalFolder

_LOCATION = re.compile(r"hf://(?P<repo>[^@]+)@(?P<commit>[0-9a-f]{40})/(?P<name>.+)")
_TIMEOUT_S = 30
_RETRIES = 3
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to reach the Hub. None leaves a choice to huggingface_hub and its environment variables."""

    cache_dir: str | None = None
    offline: bool | None = None
    endpoint: str | None = None


class HubLocation(NamedTuple):
    """The parts of `hf://org/name@<commit>/file`."""

    repo: str
    commit: str
    name: str


def parse_location(location: str) -> HubLocation | None:
    """The parts of a Hub file's location; None for a local path."""
    match = _LOCATION.fullmatch(location)
    return HubLocation(**match.groupdict()) if match else None


def is_hub_id(path: str) -> bool:
    """Whether a name can be that of a Hub repository (`org/name`, or the old `name`)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def cache_folders(repo: str, options: HubOptions) -> list[str]:
    """The folders of the Hub's cache that hold files of a repository: snapshots, and the targets of their links."""
    folder = _cache_folder(repo, options)
    return [str(folder / "blobs"), *sorted(map(str, folder.glob("snapshots/*")))]


def partial_downloads(repo: str, options: HubOptions) -> dict[str, tuple[int, int]]:
    """The files of a repository that are being downloaded into the Hub's cache.

    By name: the size in bytes and the blocks on the disk. A preallocated file has its full size, but grows in blocks.
    """
    found = {}
    with contextlib.suppress(OSError):
        for path in _cache_folder(repo, options).glob("blobs/*.incomplete"):
            with contextlib.suppress(OSError):  # it may be complete by now
                status = path.stat()
                found[path.name] = (status.st_size, getattr(status, "st_blocks", 0))
    return found


def _cache_folder(repo: str, options: HubOptions) -> Path:
    from huggingface_hub import constants

    # The cache's documented layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    root = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    return root / f"models--{repo.replace('/', '--')}"


def open_hub_folder(path: PathRef, options: HubOptions) -> HubFolder | CachedHubFolder:
    """A Hub repository at the commit that its revision names now. Raises CheckpointError."""
    if _is_offline(options):
        return _open_cached(path, options)
    from huggingface_hub import HfApi

    with hub_errors(path.path, path.revision):
        info = HfApi(endpoint=options.endpoint).model_info(path.path, revision=path.revision, files_metadata=True)
    if info.sha is None:
        raise unusable_checkpoint(
            str(path), "the Hub gives no commit for this repository", "name a revision: org/name@<commit>"
        )
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    return HubFolder(path, info.sha, sizes, options)


class HubFolder:
    """Implements `Folder` on a repository of the Hub, pinned to a commit."""

    def __init__(self, path: PathRef, commit: str, sizes: dict[str, int | None], options: HubOptions):
        self._path, self._sizes, self._options = path, sizes, options
        self.label = f"{path.path}@{commit}"
        self.revision = commit
        self.names: list[str] = sorted(n for n in sizes if "/" not in n or n.startswith("chat_templates/"))
        self.bin_warning = f"{self.label} has .bin weights only: to be indexed they are downloaded whole"

    def find(self, name: str) -> SourceFile | None:
        if name not in self._sizes:
            return None
        size = self._sizes[name]
        if size is None:
            raise unusable_checkpoint(
                self.label, f"the Hub gives no size for {name}", "download the model and name its folder"
            )
        return SourceFile(location=f"hf://{self.label}/{name}", size=size)

    def read(self, file: SourceFile) -> bytes:
        return self.local_path(file).read_bytes()

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        location = parse_location(file.location)
        assert location is not None, file
        cached = _cached_path(location.repo, location.name, location.commit, self._options)
        if cached is not None and cached.stat().st_size == file.size:
            with open(cached, "rb") as handle:
                handle.seek(start)
                return handle.read(end - start)
        return _get_range(location, start, end, self._options)

    def local_path(self, file: SourceFile) -> Path:
        return download(file, self._options, asked_revision=self._path.revision or "main")

    def missing_remedy(self, name: str) -> str:
        return "name another revision or model; the repository's owner can add the file"


class CachedHubFolder:
    """Implements `Folder` on the cached files of a commit (offline). Locations are the same as online."""

    def __init__(self, path: PathRef, snapshot: Path, options: HubOptions):
        self._path, self._local, self._options = path, LocalFolder(str(snapshot)), options
        self.revision = snapshot.name
        self.label = f"{path.path}@{self.revision}"
        self.names = self._local.names
        self.bin_warning: str | None = None

    def find(self, name: str) -> SourceFile | None:
        file = self._local.find(name)
        return SourceFile(location=f"hf://{self.label}/{name}", size=file.size) if file else None

    def read(self, file: SourceFile) -> bytes:
        return self.read_range(file, 0, file.size)

    def read_range(self, file: SourceFile, start: int, end: int) -> bytes:
        cached = SourceFile(location=str(self.local_path(file)), size=file.size)
        return self._local.read_range(cached, start, end)

    def local_path(self, file: SourceFile) -> Path:
        return download(file, self._options)

    def missing_remedy(self, name: str) -> str:
        return f"offline, and not in the Hub cache: fetch it once online, `hf download {self._path.path}`"


def download(file: SourceFile, options: HubOptions, asked_revision: str | None = None) -> Path:
    """The local path of a Hub file, downloaded into the cache if needed. Raises CheckpointError.

    `asked_revision` is the branch or tag that led to the file's commit. A download by that name makes the cache
    remember its commit, which an offline run needs.
    """
    from huggingface_hub import hf_hub_download

    location = parse_location(file.location)
    assert location is not None, file
    revisions = [location.commit] if asked_revision is None else [asked_revision, location.commit]
    for revision in revisions:
        with hub_errors(location.repo, revision, location.name):
            got = hf_hub_download(
                location.repo,
                location.name,
                revision=revision,
                cache_dir=options.cache_dir,
                endpoint=options.endpoint,
                local_files_only=_is_offline(options),
            )
        path = Path(str(got))
        # A branch may have moved since its commit was resolved: then the commit itself is requested.
        if location.commit in path.parts:
            break
    if path.stat().st_size != file.size:
        what = f"the file has {path.stat().st_size} bytes, but {file.size} were expected"
        raise unusable_checkpoint(file.location, what, f"remove {path} from the cache and try again")
    return path


def _is_offline(options: HubOptions) -> bool:
    from huggingface_hub import constants

    # Under HF_HUB_OFFLINE the library never goes online, whatever its arguments are.
    return bool(options.offline) or bool(constants.HF_HUB_OFFLINE)


def _open_cached(path: PathRef, options: HubOptions) -> CachedHubFolder:
    for name in ("config.json", "adapter_config.json"):
        if (cached := _cached_path(path.path, name, path.revision, options)) is not None:
            return CachedHubFolder(path, cached.parent, options)
    what = f"offline, and the model is not in the Hub cache; no folder {path.path!r} here either"
    raise unusable_checkpoint(
        str(path), what, f"fetch it once online: `hf download {path.path}`, or unset HF_HUB_OFFLINE"
    )


def _cached_path(repo: str, name: str, revision: str | None, options: HubOptions) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=options.cache_dir, revision=revision)
    return Path(found) if isinstance(found, str) else None  # otherwise None, or a marker for 'known not to exist'


def _get_range(location: HubLocation, start: int, end: int, options: HubOptions) -> bytes:
    """Bytes [start, end) of a Hub file, by one range request with the library's session and token."""
    from huggingface_hub import hf_hub_url

    # Documented (package_reference/utilities), but not re-exported for type checkers.
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(location.repo, location.name, revision=location.commit, endpoint=options.endpoint)
    # 'identity': ranges of a compressed reply would be useless.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with hub_errors(location.repo, location.commit, location.name):
        tries = 1 + _RETRIES
        while not isinstance(got := _try_range(url, headers, start, end), bytes):
            tries -= 1
            if not tries:
                raise got
        return got


def _try_range(url: str, headers: dict[str, str], start: int, end: int) -> bytes | Exception:
    """The range, or the error that broke off its reply.

    The error must not leave the library's context, which would treat it as a failed request and repeat it.
    """
    from huggingface_hub.utils import hf_raise_for_status

    with _open_stream(url, headers) as response:
        hf_raise_for_status(response)
        # 206 is the range; a server without range support answers 200 with the whole file, a shard of gigabytes.
        skipped = 0 if response.status_code == 206 else start
        try:
            return _read_prefix(response, skipped + end - start)[skipped:]
        except Exception as error:
            return error


def _open_stream(url: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
    """A response with an unread body: from requests, or since huggingface_hub 1 from httpx."""
    from huggingface_hub import utils

    if hasattr(utils, "http_stream_backoff"):
        get, more = utils.http_stream_backoff, {}
    else:
        get, more = utils.http_backoff, {"stream": True}
    response: AbstractContextManager[Any] = get(
        "GET", url, headers=headers, timeout=_TIMEOUT_S, max_retries=_RETRIES, **more
    )
    return response


def _read_prefix(response: Any, count: int) -> bytes:
    """The first bytes of a response's body; the rest is not read from the server."""
    data = bytearray()
    chunks = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
    for chunk in chunks(_CHUNK_BYTES):
        data += chunk
        if len(data) >= count:
            break
    return bytes(data[:count])
