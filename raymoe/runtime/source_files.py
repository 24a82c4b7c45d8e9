"""Checks that a merge's local source files, as all nodes see them, are still the files that it was planned with.

planning          each file is stamped before its header is read (`SourceFile.stamp`); small files have a checksum
before the merge  `changed`: nothing has been written since, on this node or on the node that read the header
in an actor       each opening compares the stamp, each end of reading the time (see storage/open_files.py)
after the merge   `check_unchanged`: the same again, and the copies of other nodes are what they were at the beginning
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from raymoe.errors import MergeFailed, RaymoeError
from raymoe.formatting import short_list
from raymoe.planning.plan import MergePlan
from raymoe.runtime.placement import Placement
from raymoe.sources.local_folder import has_changed, is_in_view
from raymoe.storage.local_journal import source_fingerprints


class SourcesChanged(MergeFailed):
    """Source files were written while the merge was running. Its output is of no use."""


class SourceFiles:
    """`placement` has the nodes' answers, if they were queried."""

    def __init__(self, plan: MergePlan, placement: Placement | None) -> None:
        self._weights = [file for source in plan.sources for file in source.files]
        self._small = [side.file for side in (*plan.side_files, *plan.gates.tokenizer_files)]
        self._placement = placement

    def fingerprints(self) -> dict[str, str]:
        """Times and samples of weights by location, for the journal."""
        far = self._placement.fingerprints() if self._placement is not None else {}
        return {**far, **source_fingerprints(self._weights)}

    def changed(self) -> list[str]:
        """Files that have been written since the merge was planned."""
        here = {f.location for f in (*self._weights, *self._small) if is_in_view(f) and has_changed(f)}
        return sorted(here.union(self._placement.changed() if self._placement is not None else ()))

    def check_unchanged(self) -> None:
        """Raises SourcesChanged if a file was written while the merge was running. Every node is queried again."""
        changed = set(self.changed())
        if self._placement is not None:
            changed.update(self._placement.refresh().changed(self._placement))
        if changed:
            raise _sources_changed(sorted(changed))

    @contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Attribute a failure in the context to changed source files, if there are any."""
        try:
            yield
        except RaymoeError as error:
            if changed := self.changed():
                raise _sources_changed(changed) from error
            raise


def _sources_changed(changed: Sequence[str]) -> SourcesChanged:
    return SourcesChanged(
        f"source files changed while they were merged: {short_list(changed, most=3)}. The output is of no use; run the "
        "same command with --overwrite when they no longer change."
    )
