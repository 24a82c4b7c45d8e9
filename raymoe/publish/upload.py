"""The upload: missing files are sent one by one, and one commit makes them visible.

    listing of the branch --compare--> unchanged files, files to send, another model's files to remove
    shards to send --one at a time--> the Hub's storage        not visible yet, and kept after a kill
    one commit                                                 additions and removals together

Readers of the repository see the old model or the new one, never a mixture. A repeated push finds the data that the
storage has (by LFS's SHA-256, or by Xet's chunks) and does not send it again. If all is committed, it does nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raymoe.formatting import human_bytes
from raymoe.progress_line import Pace, ProgressLine
from raymoe.publish.errors import PushFailed, translate_preflight_errors, translate_upload_errors
from raymoe.publish.manifest import Manifest, ManifestFile
from raymoe.publish.preflight import check_ignored
from raymoe.publish.repository import Repository
from raymoe.results import PushResult
from raymoe.sources.local_folder import has_changed
from raymoe.storage.checksums import hex_digest
from raymoe.storage.file_names import RECORD_NAME, is_part_of_a_model

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The branch compared with the merge. `head` is its commit; `others` are files that stay unchanged."""

    head: str
    unchanged: tuple[ManifestFile, ...]
    missing: tuple[ManifestFile, ...]
    removed: tuple[str, ...]
    others: tuple[str, ...]


def compare(manifest: Manifest, repository: Repository, *, quiet: bool = True) -> Comparison:
    """Compare the branch with the merge. Weights, adapters and tokenizer files of other models are to be removed, since
    a loader would mix two models. Raises ProblemReport, also if the Hub would leave files out.

    Unless `quiet`, the progress of reading files is shown."""
    from huggingface_hub.hf_api import RepoFile

    target, api = repository.target, repository.api
    with translate_preflight_errors(target.repo):
        head = str(api.model_info(target.repo, revision=repository.base).sha)
        listing = api.list_repo_tree(target.repo, recursive=True, revision=head)
        entries = {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}
    same = _same_files(manifest, entries, quiet=quiet)
    foreign = sorted(entries.keys() - {file.name for file in manifest.files})
    removed = tuple(name for name in foreign if is_part_of_a_model(name))
    missing = tuple(file for file in manifest.files if file.name not in same)
    check_ignored(target.repo, repository.base, missing, api)
    return Comparison(
        head=head,
        unchanged=tuple(file for file in manifest.files if file.name in same),
        missing=missing,
        removed=removed,
        others=tuple(name for name in foreign if name not in removed and name != ".gitattributes"),
    )


def _same_files(manifest: Manifest, entries: Mapping[str, RepoFile], *, quiet: bool) -> set[str]:
    """The names of files that are equal on the branch, by size and recorded checksum, or else by their bytes."""
    same, to_read = set(), []
    for file in manifest.files:
        entry = entries.get(file.name)
        if entry is None or entry.size != file.size:
            continue
        if entry.lfs is None or file.sha256 is None:
            to_read.append((file, entry))
        elif file.sha256 == entry.lfs.sha256:
            same.add(file.name)
    total = sum(file.size for file, _ in to_read)
    with ProgressLine(human_bytes, total=total, quiet=quiet) as progress:
        progress.stage("comparing with the files on the Hub", total)
        for file, entry in to_read:
            git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
            hasher, expected = (git, entry.blob_id) if entry.lfs is None else (hashlib.sha256(), entry.lfs.sha256)
            if hex_digest(hasher, _chunks(file, manifest, progress.add)) == expected:
                same.add(file.name)
    return same


def _chunks(file: ManifestFile, manifest: Manifest, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """A file's bytes; those of an object are streamed, without a local copy. `on_read` is called with the bytes of
    each."""
    if file.content is not None:
        yield file.content
        return
    assert file.file is not None
    for start in range(0, file.size, _CHUNK_BYTES):
        chunk = manifest.folder.read_range(file.file, start, min(file.size, start + _CHUNK_BYTES))
        yield chunk
        on_read(len(chunk))


def upload(
    manifest: Manifest, repository: Repository, comparison: Comparison, say: Callable[[str], None]
) -> PushResult:
    """Send missing files and commit. Raises PushFailed; the same call resumes."""
    from huggingface_hub import CommitOperationDelete

    target, api = repository.target, repository.api
    sender = _Sender(manifest, repository, comparison, say)
    if not comparison.missing and not comparison.removed:
        return _push_result(repository, comparison, comparison.head)
    with translate_upload_errors(f"push to {target.repo}", sender.progress):
        additions = sender.send()
        sender.check_unchanged()
        removals = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in comparison.removed]
        commit = api.create_commit(
            target.repo,
            [*additions, *removals],
            commit_message=target.message or f"{manifest.title}, made with raymoe",
            revision=target.branch,
            parent_commit=comparison.head,
        )
    return _push_result(repository, comparison, commit.oid)


def _push_result(repository: Repository, comparison: Comparison, commit: str) -> PushResult:
    return PushResult(
        url=repository.url,
        commit=commit,
        commit_url=f"{repository.url}/commit/{commit}",
        sent=tuple(file.name for file in comparison.missing),
        unchanged=tuple(file.name for file in comparison.unchanged),
        removed=comparison.removed,
    )


class _Sender:
    """Sends shards to the Hub's storage, in the order of their names, and counts them."""

    def __init__(
        self, manifest: Manifest, repository: Repository, comparison: Comparison, say: Callable[[str], None]
    ) -> None:
        self._manifest, self._repository, self._say = manifest, repository, say
        self._shards = [file for file in comparison.missing if file.is_shard]
        self._others = [file for file in comparison.missing if not file.is_shard]
        self._sent: list[ManifestFile] = []

    def progress(self) -> str:
        sent = f"{len(self._sent)} of {len(self._shards)} shards are on the Hub, and will not be sent again"
        return sent if self._sent else "the repository is unchanged"

    def send(self) -> list[CommitOperationAdd]:
        """The additions for the commit: shards, which have been sent, and the other files, which have not."""
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(file.name, self._bytes(file)) for file in self._others]
        total, pace = sum(file.size for file in self._shards), Pace()
        pace.start(0, time.monotonic())
        for file in self._shards:
            additions.append(self._send_shard(file))
            self._sent.append(file)
            count, done = f"{len(self._sent)} of {len(self._shards)} shards", sum(each.size for each in self._sent)
            left = pace.text(done, total - done, time.monotonic(), human_bytes) if done < total else ""
            self._say(f"on the Hub: {count}, {human_bytes(done)} of {human_bytes(total)} ({done / total:.0%}{left})")
        return additions

    def _send_shard(self, file: ManifestFile) -> CommitOperationAdd:
        """Send one shard at a time: a kill loses at most one, and Ctrl-C need not wait for threads of the library. (Xet
        sends the chunks of a file in parallel.) An object is copied to this machine's disk while it is sent."""
        assert file.file is not None
        target, path = self._repository.target, self._manifest.folder.local_path(file.file)
        operation = self._add_operation(file, path)
        self._repository.api.preupload_lfs_files(target.repo, [operation], revision=target.branch)
        # The library removes the path of a file that it has sent; a file that it has not sent goes with the commit.
        is_sent = operation.path_or_fileobj == b""
        if is_sent and file.file.kind.is_object:
            path.unlink(missing_ok=True)
        return operation

    def _add_operation(self, file: ManifestFile, path: Path) -> CommitOperationAdd:
        """Raises PushFailed if the shard is not, or no longer, the one in the record."""
        from huggingface_hub import CommitOperationAdd

        try:
            operation = CommitOperationAdd(file.name, str(path))
        except (ValueError, FileNotFoundError):  # raised by the library and, a moment later, by the system
            raise self._changed_error(file, "is gone") from None
        now = operation.upload_info
        if now.size != file.size:
            raise self._changed_error(file, f"has {now.size:,} bytes, and had {file.size:,} when the push began")
        if file.sha256 is not None and now.sha256.hex() != file.sha256:
            raise self._changed_error(
                file, f"is not the file that was merged: its SHA-256 is not that in {RECORD_NAME}"
            )
        self._check(file)
        return operation

    def _changed_error(self, file: ManifestFile, what: str) -> PushFailed:
        where = f"push to {self._repository.target.repo}: {self._manifest.folder.label}/{file.name}"
        remedy = (
            "let no merge write there during a push; put the file back, or merge again (with --overwrite), and push"
        )
        return PushFailed(f"{where} {what}, and was not sent; {self.progress()}\n    -> {remedy}")

    def check_unchanged(self) -> None:
        """Check all files again before the commit, including those that are on the Hub already: another merge of the
        same shapes may have replaced them. Raises PushFailed, or CheckpointError for an object."""
        for file in self._manifest.files:
            self._check(file)

    def _check(self, file: ManifestFile) -> None:
        if file.content is not None or file.file is None:
            return
        if not file.file.kind.is_object:
            if not os.path.exists(file.file.location):
                raise self._changed_error(file, "is gone")
            if has_changed(file.file):
                raise self._changed_error(file, "has changed since the push began")
        elif file.size:
            self._manifest.folder.read_range(file.file, 0, 1)  # fails if its ETag has changed

    def _bytes(self, file: ManifestFile) -> bytes:
        if file.content is not None:
            return file.content
        assert file.file is not None
        self._check(file)
        return self._manifest.folder.read(file.file)
