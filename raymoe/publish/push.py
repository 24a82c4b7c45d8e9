"""Pushes a finished merge to a repository on the Hub, or shows what a push would do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymoe.console import say
from raymoe.errors import ProblemReport
from raymoe.formatting import human_bytes, short_list
from raymoe.object_store.options import StorageOptions
from raymoe.publish.manifest import Manifest, open_manifest
from raymoe.publish.repository import PushTarget, Repository, open_repository, source_problem, target_problems
from raymoe.publish.upload import Comparison, compare, upload
from raymoe.results import PushResult
from raymoe.sources.hub import HubOptions


def push_merge(
    place: str | Path, target: PushTarget, hub: HubOptions, storage: StorageOptions, *, quiet: bool = False
) -> PushResult:
    """Publish the finished merge at a folder or URL. Raises ProblemReport before anything is sent, and PushFailed
    afterwards."""
    manifest = _open_manifest(place, target, storage)
    return push_published(manifest, open_repository(target, hub, card=manifest.card), quiet=quiet)


def push_dry_run(place: str | Path, target: PushTarget, hub: HubOptions, storage: StorageOptions) -> Iterator[str]:
    """Lines that say what `push_merge` would do. Nothing is created or sent. Raises ProblemReport."""
    manifest = _open_manifest(place, target, storage)
    repository = open_repository(target, hub, make=False, card=manifest.card)
    if repository.is_new:
        yield f"{repository.url} would be created{', private' if target.private else ''}"
    if repository.lacks_branch:
        yield f"its branch {target.branch} would be created from {repository.base}"
    nothing = Comparison(head="", unchanged=(), missing=manifest.files, removed=(), others=())
    comparison = nothing if repository.is_new else compare(manifest, repository)
    _refuse_source(target, manifest, comparison.head)
    yield from _plan_lines(manifest, repository, comparison)
    yield from (f"  would send {file.name}, {human_bytes(file.size)}" for file in comparison.missing)
    if manifest.local_sources:
        yield "raymoe.json names these local paths, which are published with it:"
    yield from (f"  {path}" for path in manifest.local_sources)
    yield "nothing was sent (--dry-run)"


def _open_manifest(place: str | Path, target: PushTarget, storage: StorageOptions) -> Manifest:
    """The files to push. Raises ProblemReport with all problems that are known without the Hub."""
    if problems := target_problems(target):
        raise ProblemReport(problems)
    manifest = open_manifest(place, target.repo, storage)
    _refuse_source(target, manifest)
    return manifest


def _refuse_source(target: PushTarget, manifest: Manifest, head: str | None = None) -> None:
    if problem := source_problem(target, manifest.hub_sources, head):
        raise ProblemReport([problem])


def push_published(manifest: Manifest, repository: Repository, *, quiet: bool) -> PushResult:
    def tell(text: str) -> None:
        if not quiet:
            say(text)

    comparison = compare(manifest, repository, quiet=quiet)
    _refuse_source(repository.target, manifest, comparison.head)
    for line in _plan_lines(manifest, repository, comparison):
        tell(line)
    with _progress_bars(enabled=not quiet and sys.stderr.isatty()):
        return upload(manifest, repository, comparison, tell)


def _plan_lines(manifest: Manifest, repository: Repository, comparison: Comparison) -> Iterator[str]:
    """What the push will do, with notes about effects that may be unexpected."""
    branch = repository.target.branch
    sending = sum(file.size for file in comparison.missing)
    unchanged = f"; {len(comparison.unchanged)} are there already" if comparison.unchanged else ""
    count = f"{len(comparison.missing)} files, {human_bytes(sending)}" if comparison.missing else "no file to send"
    yield f"push to {repository.url} (branch {branch}): {count}{unchanged}"
    if comparison.removed:
        names = short_list(comparison.removed, most=3)
        yield f"note: the commit removes files of another model there, which stay in its history: {names}"
    if comparison.others and not repository.is_new:
        yield f"note: the repository has other files, which stay: {short_list(comparison.others, most=3)}"
    yield from (f"note: {note}" for note in manifest.notes)
    if manifest.local_sources:
        example = manifest.local_sources[-1]
        yield f"note: raymoe.json names local files, such as {example}"


@contextmanager
def _progress_bars(*, enabled: bool) -> Iterator[None]:
    """The library's progress bars, shown only if `enabled`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if enabled or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
