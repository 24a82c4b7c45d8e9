"""`push_merge`: a finished merge to a repository; `merge_and_push`: a merge and its push as one thing that goes on.

A merge that is to be pushed is checked against the Hub before it starts. Run again, it goes on where it stopped: in the
merge, or, where the output holds this very merge finished, in the push.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raymoe.config import MergeConfig
from raymoe.errors import Problem, ProblemReport
from raymoe.objects.options import StorageOptions
from raymoe.planning.types import MergePlan
from raymoe.publish.content import Published, open_published, recorded_digest
from raymoe.publish.failures import refusals, server_message
from raymoe.publish.target import PushTarget, Repository, open_repository, target_problems
from raymoe.publish.upload import Comparison, Pushed, compare, upload
from raymoe.report.display import say
from raymoe.runtime.memory import peak_rss_bytes
from raymoe.runtime.merge import MergeResult, output_of, output_problems, run_merge
from raymoe.runtime.run_report import RunReport
from raymoe.runtime.settings import RuntimeSettings
from raymoe.sources.hub import HubOptions
from raymoe.storage.records import FileRecord
from raymoe.text import human_bytes

__all__ = ["merge_and_push", "push_merge"]

_NAMED = 3


def push_merge(
    place: str | Path, target: PushTarget, hub: HubOptions, storage: StorageOptions, *, quiet: bool = False
) -> Pushed:
    """Publish the finished merge at a folder or URL. Raises ProblemReport before anything is sent, else PushFailed."""
    if problems := target_problems(target):
        raise ProblemReport(problems)
    published = open_published(place, target.repo, storage)
    return _push(published, open_repository(target, hub), quiet=quiet)


def merge_and_push(
    plan: MergePlan,
    config: MergeConfig,
    output: str | Path,
    target: PushTarget,
    settings: RuntimeSettings,
    report: RunReport,
    on_merged: Callable[[MergeResult], None],
) -> Pushed:
    """Merge, call `on_merged`, and publish.

    Raises ProblemReport before the merge starts, for all that keeps either from being done.
    """
    started = time.monotonic()
    out = output_of(output, settings)
    is_merged = not settings.overwrite and recorded_digest(output, settings.storage) == plan.digest
    problems = [*target_problems(target), *([] if is_merged else output_problems(plan, out, settings))]
    if problems:
        raise ProblemReport(problems)
    quiet = settings.verbosity < 0
    repository = open_repository(target, settings.hub)
    if is_merged:
        if not quiet:
            say(f"{out.location} holds this merge, finished")
        published = open_published(output, target.repo, settings.storage)
        report.output, report.plan_digest = out.location, plan.digest
        report.bytes_kept = published.nbytes
        on_merged(_kept(out.location, published, plan, time.monotonic() - started))
    else:
        on_merged(run_merge(plan, config, output, settings, report))
        published = open_published(output, target.repo, settings.storage)
    with report.phase("push"):
        return _push(published, repository, quiet=quiet)


def _kept(location: str, published: Published, plan: MergePlan, seconds: float) -> MergeResult:
    """The result of a merge that was finished before."""
    return MergeResult(
        output=location,
        files=tuple(FileRecord(name=f.name, size=f.size, checksum="") for f in published.files),
        warnings=plan.warnings,
        bytes_written=0,
        bytes_copied_by_store=0,
        bytes_kept=published.nbytes,
        peak_driver_bytes=peak_rss_bytes(),
        peak_actor_bytes=(),
        peak_gpu_bytes=(),
        seconds=seconds,
    )


def _push(published: Published, repository: Repository, *, quiet: bool) -> Pushed:
    def tell(text: str) -> None:
        if not quiet:
            say(text)

    if published.card is not None:
        _check_card(published.card)
    comparison = compare(published, repository)
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
        names = _some(comparison.removed)
        yield f"note: weights of another model there are removed by the commit, and stay in its history: {names}"
    if comparison.others and not repository.is_new:
        yield f"note: the repository has other files, which stay: {_some(comparison.others)}"
    if published.local_sources:
        yield f"note: raymoe.json names folders of this machine: {_some(published.local_sources)}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _check_card(card: str) -> None:
    """Have the Hub look at the card before anything is sent: it would refuse the commit after all is."""
    import yaml
    from huggingface_hub import ModelCard

    with refusals("README.md"):
        try:
            ModelCard(card).validate()
        except (ValueError, yaml.YAMLError) as error:
            what = f"the Hub refuses its metadata: {server_message(error.__context__) or error}"
            remedy = "correct the lines between '---' at its head, in the output"
            raise ProblemReport([Problem(where="README.md", what=what, remedy=remedy)]) from None


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
