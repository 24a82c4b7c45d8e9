"""A finished merge to a repository of the Hub, or what that would do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymoe.console import say
from raymoe.errors import ProblemReport
from raymoe.formatting import human_bytes, some
from raymoe.object_store.options import StorageOptions
from raymoe.publish.manifest import Published, open_published
from raymoe.publish.repository import PushTarget, Repository, open_repository, source_problem, target_problems
from raymoe.publish.upload import Comparison, Pushed, compare, upload
from raymoe.sources.hub import HubOptions

__all__ = ["look_at_push", "push_merge", "push_published"]


def push_merge(
    place: str | Path, target: PushTarget, hub: HubOptions, storage: StorageOptions, *, quiet: bool = False
) -> Pushed:
    """Publish the finished merge at a folder or URL. Raises ProblemReport before anything is sent, else PushFailed."""
    if problems := target_problems(target):
        raise ProblemReport(problems)
    published = open_published(place, target.repo, storage)
    _refuse_source(target, published)
    return push_published(published, open_repository(target, hub, card=published.card), quiet=quiet)


def look_at_push(place: str | Path, target: PushTarget, hub: HubOptions, storage: StorageOptions) -> Iterator[str]:
    """Lines that say what `push_merge` would do. Nothing is made or sent. Raises ProblemReport."""
    if problems := target_problems(target):
        raise ProblemReport(problems)
    published = open_published(place, target.repo, storage)
    _refuse_source(target, published)
    repository = open_repository(target, hub, make=False, card=published.card)
    if repository.is_new:
        yield f"{repository.url} would be made{', private' if target.private else ''}"
    if repository.lacks_branch:
        yield f"its branch {target.branch} would be made from {repository.base}"
    nothing = Comparison(head="", there=(), missing=published.files, removed=(), others=())
    comparison = nothing if repository.is_new else compare(published, repository)
    _refuse_source(target, published, comparison.head)
    yield from _plan_lines(published, repository, comparison)
    yield from (f"  would send {file.name}, {human_bytes(file.size)}" for file in comparison.missing)
    yield from (f"  names {path}" for path in published.local_sources)
    yield "nothing was sent (--dry-run)"


def _refuse_source(target: PushTarget, published: Published, head: str | None = None) -> None:
    if problem := source_problem(target, published.hub_sources, head):
        raise ProblemReport([problem])


def push_published(published: Published, repository: Repository, *, quiet: bool) -> Pushed:
    def tell(text: str) -> None:
        if not quiet:
            say(text)

    comparison = compare(published, repository)
    _refuse_source(repository.target, published, comparison.head)
    for line in _plan_lines(published, repository, comparison):
        tell(line)
    with _library_bars(shown=not quiet and sys.stderr.isatty()):
        return upload(published, repository, comparison, tell)


def _plan_lines(published: Published, repository: Repository, comparison: Comparison) -> Iterator[str]:
    """What is about to happen, and what of it may surprise."""
    branch = repository.target.branch
    sending = sum(file.size for file in comparison.missing)
    there = f"; {len(comparison.there)} are there already" if comparison.there else ""
    count = f"{len(comparison.missing)} files, {human_bytes(sending)}" if comparison.missing else "no file to send"
    yield f"push to {repository.url} (branch {branch}): {count}{there}"
    if comparison.removed:
        names = some(comparison.removed, most=3)
        yield f"note: files of another model there are removed by the commit, and stay in its history: {names}"
    if comparison.others and not repository.is_new:
        yield f"note: the repository has other files, which stay: {some(comparison.others, most=3)}"
    if published.local_sources:
        example = published.local_sources[-1]
        yield f"note: raymoe.json and the card name files of this machine, such as {example}"


@contextmanager
def _library_bars(*, shown: bool) -> Iterator[None]:
    """The library's progress bars, where there is somebody to see them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
