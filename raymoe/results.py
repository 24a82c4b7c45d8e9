"""What a merge and a verification return."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.formatting import plural
from raymoe.storage.file_names import FileRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """What a finished merge was: files by name, warnings, memory as the processes saw it (bytes), and in words what the
    backbone is and how the routers did on held-out prompts."""

    output: str
    files: tuple[FileRecord, ...]
    warnings: tuple[str, ...]
    bytes_written: int
    bytes_copied_by_store: int
    bytes_kept: int
    peak_driver_bytes: int
    peak_actor_bytes: tuple[int, ...]
    peak_gpu_bytes: tuple[int, ...]
    seconds: float  # since the actors were started
    run_seconds: float  # since the run was
    backbone_lines: tuple[str, ...] = ()
    router_lines: tuple[str, ...] = ()
    was_complete: bool = False  # an earlier run had finished this merge, and nothing was left to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared, and every difference, one line each. `notes`: what differs and may."""

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
