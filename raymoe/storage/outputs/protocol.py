"""The protocol of outputs: a merge writes through it to a local folder or an object store.

    coordinator   problems -> begin -> jobs(shard) ... complete(shard, results) -> write small files -> end
    actors        do(job)

A shard is written by one or several jobs, which different actors may do at the same time; none of it is visible before
it is complete. Every step can be repeated: after any death the same calls give the same bytes.

`jobs`, `do` and `complete` may be called from several threads at the same time, for different shards. All other calls
are made one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
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

# Called with the number of bytes that a worker has sent or written, and of bytes that a store has copied server-side.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """A shard to write; or with `upload_id`, the `parts` of its upload to send or to have copied; or with `read_back`,
    the finished object of a shard, to be read for its checksum.

    `asks_store`: almost all of its work is to request copies from a store. `resumes`: another actor may have done a
    part of this job, and was lost. `shared_with_shards`: tensors in object stores that other shards need too;
    `keep_cached`: those of them that this actor will probably read again. `matrices`: by layer, references to the
    matrices of the backbone that were merged before and that the shard holds.
    """

    shard: Shard
    upload_id: str | None = None
    parts: tuple[UploadPart, ...] = ()
    read_back: ObjectInfo | None = None
    asks_store: bool = False
    resumes: bool = False
    shared_with_shards: tuple[TensorEntry, ...] = ()
    keep_cached: tuple[TensorEntry, ...] = ()
    matrices: Mapping[int, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name that is unique among the jobs."""
        if self.read_back is not None:
            return f"{self.shard.file_name} read back"
        return f"{self.shard.file_name} from part {self.parts[0].number}" if self.parts else self.shard.file_name

    def includes(self, part: Part) -> bool:
        """Whether this job covers that part of the shard."""
        if self.read_back is not None:
            return False
        return not self.parts or any(each.overlaps(part) for each in self.parts)

    @property
    def copies(self) -> int:
        """How many parts the store copies."""
        return sum(part.copy is not None for part in self.parts)

    def slim(self, *, scans_copies: bool) -> ShardJob:
        """The job with only the parts of its shard that an actor needs: the header and the parts that it sends, and
        with `scans_copies` also the parts that are copied. A job without parts is a whole shard, and needs all of
        it."""
        if not self.parts and self.read_back is None:
            return self
        needed = [part for part in self.parts if part.copy is None or scans_copies]
        parts = tuple(p for p in self.shard.parts if any(each.overlaps(p) for each in needed))
        has_header = any(part.start < len(self.shard.header) for part in needed)
        return replace(self, shard=replace(self.shard, header=self.shard.header if has_header else b"", parts=parts))


class Output(Protocol):
    """One output, and its location."""

    location: Location

    @property
    def run(self) -> str:
        """The run that writes; an actor's output is created with it."""

    def one_look(self) -> AbstractContextManager[None]:
        """A context of checks that are about one moment: an object store is asked for each thing once."""

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        """Problems that prevent a merge from being written here. Writes nothing."""

    def digest(self) -> str | None:
        """The plan digest of the unfinished merge that is here; None if there is none."""

    def changed_sources(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Local source files that were modified since the unfinished merge began."""

    def finished_merge(self) -> FinishedMerge | None:
        """The finished merge that is here, of any plan; None if there is none, or if one is being replaced."""

    def recorded_files(self) -> Sequence[str]:
        """Names of the files in the record here, even of another merge: `begin` with `fresh` removes them."""

    def other_model_files(self, own: Container[str], index: Mapping[str, Any]) -> list[str]:
        """Files next to the unfinished merge here that readers would take for a part of its model, and that are not.

        `own` are the names of its files, `index` is the content of its index. Files that the next run removes in any
        case are left out."""

    def clean_up(self) -> None:
        """Remove the rest of the journal of a finished merge. Raises ProblemReport if another merge is active here,
        else MergeFailed."""

    def lock(self) -> None:
        """Lock the output for this process, if it has locks. Raises ProblemReport if another merge holds the lock."""

    def begin(self, digest: str, fingerprints: Mapping[str, str], *, fresh: bool) -> None:
        """Begin a run: older runs are fenced off first; then, with `fresh`, the files of an earlier merge are removed.

        Raises ProblemReport if, without `fresh`, another run has used the output since the first check."""

    def kept_reads(self) -> bytes:
        """What a run of the unfinished merge here has kept by `keep_reads`; empty if there is nothing. Raises
        StorageError."""

    def keep_reads(self, content: bytes) -> None:
        """Keep what planning has read (`KeptReads.content`) for the runs that resume this merge, if the output is in an
        object store. It goes with the journal."""

    def invalidate(self) -> None:
        """Make the next run start again, whatever this one has finished: sources changed while it read them."""

    def same_store(self, file: SourceFile) -> bool:
        """Whether this output's store can copy from that source file server-side."""

    def copied_parts(self, shard: Shard) -> int:
        """How many parts of a shard the store copies, if little else has to be done for it; else 0."""

    def is_reachable(self) -> bool:
        """Whether this process sees the output of this run, and no other run has taken over."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """The jobs of a shard; empty if an earlier run finished it."""

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        """Do a job; the result is for `complete`. If a source changed meanwhile, nothing is kept."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord | ShardJob:
        """All jobs of a shard are done: make it visible. Raises MergeFailed if another run has taken over.

        If a job is returned, an actor must do it before the shard is finished: the caller gives it out like any other,
        and calls `complete` again with only its result, in a list. `base.write_shard` does this in one process.
        """

    def write_small(self, name: str, content: bytes) -> FileRecord:
        """Write a small file as a whole."""

    def write_index(self, content: bytes) -> FileRecord:
        """Write the file that makes the output a checkpoint; never replace another one. All files that this run has
        written are checked first; raises MergeFailed if one is no longer as it was written."""

    def end(self, record: bytes) -> None:
        """Check all written files once more, write the record, and remove the journal: the merge is complete."""

    def release(self, *, keep_uploads: bool = False) -> None:
        """Leave the output, finished or not, without half-written files. With `keep_uploads`, uploaded parts of
        unfinished shards stay for the run that resumes the merge, if the output has such parts."""
