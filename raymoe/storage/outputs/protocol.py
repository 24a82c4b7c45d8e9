"""The protocol that a merge is written through, whatever the output is: a local folder or an object store.

    coordinator   problems -> begin -> jobs(shard) ... complete(shard, results) -> write small files -> end
    actors        do(job)

A shard is written by one job or by several, which different actors may do at the same time; nothing of it is visible
before it is whole. Every step can be repeated: after any death the same calls end in the same bytes.

`jobs`, `do` and `complete` may be called from several threads at the same time, for different shards. All other calls
come one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raymoe.errors import Problem
from raymoe.object_store.location import Location
from raymoe.object_store.protocol import ObjectInfo
from raymoe.planning.multipart import UploadPart
from raymoe.planning.plan import Part, Shard
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.storage.file_names import FileRecord, FinishedMerge
from raymoe.storage.shard_stream import RouterBytes
from raymoe.storage.source_reader import SourceReader

# Called with the number of bytes that a worker has sent or written, and of bytes that a store has copied itself.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """A shard to write, or with `upload_id` those `parts` of its upload to send or have copied, or with `read_back` the
    finished object of a shard, whose bytes are to be read for their checksum.

    `asks_store`: there is little more to do than to ask a store for copies.
    `resumes`: another actor may have done a part of this job, and was lost.
    `shared_with_shards`: tensors of objects that other shards are made of too; `keep_cached`: those of them that
    whoever does this job will probably read again.
    """

    shard: Shard
    upload_id: str | None = None
    parts: tuple[UploadPart, ...] = ()
    read_back: ObjectInfo | None = None
    asks_store: bool = False
    resumes: bool = False
    shared_with_shards: tuple[TensorEntry, ...] = ()
    keep_cached: tuple[TensorEntry, ...] = ()

    @property
    def name(self) -> str:
        """Another for each job."""
        if self.read_back is not None:
            return f"{self.shard.file_name} read back"
        return f"{self.shard.file_name} from part {self.parts[0].number}" if self.parts else self.shard.file_name

    def includes(self, part: Part) -> bool:
        """Whether that part of the shard is done by this job."""
        if self.read_back is not None:
            return False
        return not self.parts or any(each.overlaps(part) for each in self.parts)

    @property
    def copies(self) -> int:
        """How many parts the store copies."""
        return sum(part.copy is not None for part in self.parts)

    def slim(self, *, scans_copies: bool) -> ShardJob:
        """The job with only what an actor needs of its shard: header and parts of what it sends, and with
        `scans_copies` of what it has copied. A job without parts is a whole shard, and needs all of it."""
        if not self.parts and self.read_back is None:
            return self
        needed = [part for part in self.parts if part.copy is None or scans_copies]
        parts = tuple(p for p in self.shard.parts if any(each.overlaps(p) for each in needed))
        has_header = any(part.start < len(self.shard.header) for part in needed)
        return replace(self, shard=replace(self.shard, header=self.shard.header if has_header else b"", parts=parts))


class Output(Protocol):
    """One output, and where it is."""

    location: Location

    @property
    def run(self) -> str:
        """The run that writes; an actor's output is made with it."""

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        """What keeps a merge from being written here. Writes nothing."""

    def digest(self) -> str | None:
        """The plan of the unfinished merge that is here; None where there is none."""

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Local source files that were modified since the unfinished merge began."""

    def finished_merge(self) -> FinishedMerge | None:
        """The finished merge that is here, of whichever plan; None where there is none, or one is being replaced."""

    def recorded_files(self) -> Sequence[str]:
        """Names of the files in the record here, also of another merge's: `begin` removes them where it is fresh."""

    def other_model_files(self, own: Container[str], index: Mapping[str, Any]) -> list[str]:
        """Files beside the unfinished merge here that readers take for a part of its model, and that are not of it.

        `own` are the names of its files, `index` is the content of its index. Files that the next run removes in any
        case are left out."""

    def clean_up(self) -> None:
        """Remove what is left of the journal of a merge that is finished. Raises ProblemReport if another merge is at
        work here, else MergeFailed."""

    def lock(self) -> None:
        """Take the output for this process, where it can be locked. Raises ProblemReport if another merge has it."""

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> None:
        """Begin a run: older runs are fenced off first; then, with `fresh`, what an earlier merge left is removed.

        Raises ProblemReport where, without `fresh`, another run has used the output since it was looked at."""

    def invalidate(self) -> None:
        """Have the next run begin again, whatever this one has finished: sources changed while it read them."""

    def same_store(self, file: SourceFile) -> bool:
        """Whether this output's store can copy from that source file itself."""

    def copied_parts(self, shard: Shard) -> int:
        """How many parts of a shard the store copies, where there is little more to do for it; else 0."""

    def is_reachable(self) -> bool:
        """Whether this process sees the output of this run, and the run has not been replaced by another."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """What there is to do for a shard: nothing, if an earlier run finished it."""

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        """Do a job; what it returns is for `complete`. Nothing of it is kept where a source changed meanwhile."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord | ShardJob:
        """All jobs of a shard are done: make it visible. Raises MergeFailed where another run has taken over.

        A job that is returned is to be done by an actor before the shard is finished: the caller gives it out like any
        other, and calls `complete` again with a list of its result alone. `base.write_shard` does so in one process.
        """

    def write_small(self, name: str, content: bytes) -> FileRecord:
        """Write a small file as a whole."""

    def write_index(self, content: bytes) -> FileRecord:
        """Write the file that makes the output a checkpoint, and never over another one. All that this run has written
        is looked at before; MergeFailed is raised if a file is no longer as it was written."""

    def end(self, record: bytes) -> None:
        """Look at all that was written once more and write the record; the merge is complete, and the journal goes."""

    def release(self, *, keep_uploads: bool = False) -> None:
        """Leave the output, finished or not, with nothing half-written. With `keep_uploads`, what has been sent of
        unfinished shards stays for the run that resumes the merge, where the output has such a thing."""
