"""What a merge, a verification and a push return. In a notebook, results are displayed as small tables."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.formatting import human_bytes, human_time, plural
from raymoe.html_repr import html_table
from raymoe.storage.file_names import FileRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """A push that is done. `commit` is where the branch is now; `sent` and `unchanged` are names of files."""

    url: str
    commit: str
    commit_url: str
    sent: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for people."""
        if not self.sent and not self.removed:
            return f"nothing to push: {self.url} has these files (commit {self.commit[:8]})"
        return f"pushed: {self.commit_url}"

    def __repr__(self) -> str:
        return f"PushResult({self.summary!r})"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("commit", self.commit),
            ("sent", len(self.sent)),
            ("there already", len(self.unchanged)),
        ]
        rows += [("removed", name) for name in self.removed]
        return html_table(f"Push to {self.url}", rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """The result of a finished merge: its files, warnings, and peak memory of its processes (bytes). `backbone_lines`
    and `router_lines` describe the backbone, and the routers' accuracy on held-out prompts."""

    output: str
    model_type: str  # of the merged model's config.json
    files: tuple[FileRecord, ...]
    warnings: tuple[str, ...]
    bytes_written: int
    bytes_copied_by_store: int
    bytes_kept: int
    peak_driver_bytes: int
    peak_actor_bytes: tuple[int, ...]
    peak_gpu_bytes: tuple[int, ...]
    seconds: float  # since the actors were started
    run_seconds: float  # since the run was started
    backbone_lines: tuple[str, ...] = ()
    router_lines: tuple[str, ...] = ()
    was_complete: bool = False  # an earlier run had finished this merge, and nothing was left to do
    pushed: PushResult | None = None  # what was published, if the merge was to be pushed

    @property
    def output_bytes(self) -> int:
        """The size of all files."""
        return sum(record.size for record in self.files)

    def __repr__(self) -> str:
        count = len(self.files)
        facts = [repr(self.output), f"{count} {plural('file', count)}", human_bytes(self.output_bytes), self._time]
        facts += [f"{len(self.warnings)} {plural('warning', len(self.warnings))}"] if self.warnings else []
        return f"MergeResult({', '.join(facts)})"

    def _repr_html_(self) -> str:
        rows = [("files", f"{len(self.files)}, {human_bytes(self.output_bytes)}"), ("time", self._time)]
        rows += [("routers", line) for line in self.router_lines]
        if self.peak_actor_bytes:
            peaks = f"driver {human_bytes(self.peak_driver_bytes)}, actors {human_bytes(max(self.peak_actor_bytes))}"
            rows.append(("peak memory", peaks))
        rows += [("published", self.pushed.summary)] if self.pushed else []
        rows += [("warning", warning) for warning in self.warnings]
        return html_table(f"Merge in {self.output}", rows)

    @property
    def _time(self) -> str:
        return "complete before" if self.was_complete else human_time(self.run_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared, and every difference, one line each. `notes`: differences that are allowed."""

    tensors: int
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences

    @property
    def summary(self) -> str:
        if self.ok:
            return f"verified: {self.tensors} tensors equal to what the sources give, byte for byte"
        count = len(self.differences)
        return f"NOT verified: {count} {plural('difference', count)}"

    def __repr__(self) -> str:
        return f"Verification({self.summary!r})"

    def _repr_html_(self) -> str:
        rows = [("difference", line) for line in self.differences] + [("note", line) for line in self.notes]
        return html_table(self.summary, rows)
