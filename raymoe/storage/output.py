"""The protocol that a merge is written through, whatever the output is: a local folder or an object store.

    coordinator   problems -> begin -> jobs(shard) ... complete(shard, results) -> write small files -> end
    actors        do(job)

A shard is written by one job or by several, which different actors may do at the same time; nothing of it is visible
before it is whole. Every step can be repeated: after any death the same calls end in the same bytes.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raymoe.errors import Problem, ProblemReport
from raymoe.objects.options import StorageOptions
from raymoe.objects.problems import StorageError
from raymoe.objects.store import open_store
from raymoe.objects.urls import check_spelling, is_s3, is_url, join, local_path, normalise
from raymoe.outgoing import json_text
from raymoe.planning.types import MergePlan, Part, Shard, Source
from raymoe.planning.upload import UploadPart
from raymoe.sources.local import recorded_sample
from raymoe.sources.types import SourceFile, TensorEntry
from raymoe.storage.places import Inputs, is_in_job_package, overwritten, source_folders
from raymoe.storage.reader import SourceReader
from raymoe.storage.records import (
    CARD_NAME,
    INDEX_NAME,
    JOURNAL,
    PROBE,
    RECORD_NAME,
    FileRecord,
    FinishedMerge,
    json_object,
)
from raymoe.storage.stream import RouterBytes
from raymoe.text import some

__all__ = [
    "Output",
    "Progress",
    "ShardJob",
    "clash",
    "complete_merge",
    "open_output",
    "output_location",
    "refusals",
    "rewritten_sources",
    "unwritable",
    "writable_location",
    "write_problems",
]

_EXAMPLE = "name a folder, or a URL such as s3://bucket/prefix"

# Called with the number of bytes that a worker has sent or written, and of bytes that a store has copied itself.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """A shard to write, or with `upload_id` those `parts` of its upload to send or have copied.

    `shared`: tensors of objects that other shards are made of too; `later`: those of them that whoever does this job
    will probably read again.
    """

    shard: Shard
    upload_id: str | None = None
    parts: tuple[UploadPart, ...] = ()
    shared: tuple[TensorEntry, ...] = ()
    later: tuple[TensorEntry, ...] = ()

    @property
    def name(self) -> str:
        """Another for each job."""
        return f"{self.shard.file_name} from part {self.parts[0].number}" if self.parts else self.shard.file_name

    def does(self, part: Part) -> bool:
        """Whether that part of the shard is done by this job."""
        return not self.parts or any(each.start < part.end and part.start < each.end for each in self.parts)


class Output(Protocol):
    """One output. `location` is its absolute path or URL."""

    location: str

    @property
    def run(self) -> str:
        """The run that writes; an actor's output is made with it."""

    def problems(self, *, digest: str | None, output_bytes: int, overwrite: bool) -> list[Problem]:
        """What keeps a merge from being written here. Writes nothing."""

    def digest(self) -> str | None:
        """The plan of the unfinished merge that is here; None where there is none."""

    def changed_sources(self, stamps: Mapping[str, str]) -> list[str]:
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

    def begin(self, digest: str, stamps: Mapping[str, str], *, fresh: bool) -> None:
        """Begin a run: older runs are fenced off first; then, with `fresh`, what an earlier merge left is removed.

        Raises ProblemReport where, without `fresh`, another run has used the output since it was looked at."""

    def spoil(self) -> None:
        """Have the next run begin again, whatever this one has finished: sources changed while it read them."""

    def same_store(self, file: SourceFile) -> bool:
        """Whether this output's store can copy from that source file itself."""

    def is_reachable(self) -> bool:
        """Whether this process sees the output of this run, and the run has not been replaced by another."""

    def jobs(self, shard: Shard) -> Sequence[ShardJob]:
        """What there is to do for a shard: nothing, if an earlier run finished it."""

    def do(self, job: ShardJob, reader: SourceReader, progress: Progress, router: RouterBytes | None = None) -> Any:
        """Do a job; what it returns is for `complete`. Nothing of it is kept where a source changed meanwhile."""

    def complete(self, shard: Shard, results: Sequence[Any]) -> FileRecord:
        """All jobs of a shard are done: make it visible. Raises MergeFailed where another run has taken over."""

    def write_small(self, name: str, content: bytes) -> FileRecord:
        """Write a small file as a whole."""

    def write_index(self, content: bytes) -> FileRecord:
        """Write the file that makes the output a checkpoint, and never over another one. All that this run has written
        is looked at before; MergeFailed is raised if a file is no longer as it was written."""

    def end(self, record: bytes) -> None:
        """Look at all that was written once more and write the record; the merge is complete, and the journal goes."""

    def release(self) -> None:
        """Leave the output, finished or not, with nothing half-written."""


def output_location(text: str | Path) -> str:
    """An output as a user names it, as an absolute path or a URL in normal form. Raises ValueError for a bad URL."""
    check_spelling(str(text))
    if not is_url(str(text)):
        return str(Path(text).expanduser().absolute())
    url = normalise(str(text))
    return local_path(url) or url


def writable_location(text: str | Path, where: str, *, example: str = _EXAMPLE) -> str:
    """The same for a place that is to be written to. Raises ProblemReport for one that can't be, whatever is there.

    `where` is the argument or option that names it; `example` is what to name instead.
    """
    try:
        location = output_location(text)
    except ValueError as error:
        raise ProblemReport([Problem(where=where, what=str(error), remedy=example)]) from None
    if problem := unwritable(str(text), location, where, example):
        raise ProblemReport([problem])
    return location


def unwritable(text: str, location: str, where: str, example: str) -> Problem | None:
    """What is wrong with a kind of place for anything that is to stay."""
    if location.startswith(("http://", "https://")):
        remedy = f"{example}; the address of an S3 server is set as storage.endpoint or AWS_ENDPOINT_URL"
        return Problem(where=where, what=f"nothing can be written to {location}: HTTP is for reading", remedy=remedy)
    if text.strip().lower().startswith("hf://"):
        what = "files are not written to the Hub one by one"
        return Problem(where=where, what=what, remedy=f"{example}, and publish it with `raymoe push`")
    if not is_url(location) and is_in_job_package(location):
        what = f"{location} is in the working directory of a Ray job, which Ray deletes when the job has ended"
        remedy = "name a URL in a bucket, or the whole path of a place that stays, in a folder that the nodes share"
        return Problem(where=where, what=what, remedy=remedy)
    return None


def open_output(location: str, storage: StorageOptions, run: str = "") -> Output:
    """The output at a location; an actor names the `run` that it works for."""
    if not is_url(location):
        from raymoe.storage.local import LocalOutput

        return LocalOutput(Path(location), run)
    if is_s3(location):
        from raymoe.storage.s3_output import S3Output

        return S3Output(location, storage, run)
    from raymoe.storage.stream_output import StreamOutput

    return StreamOutput(location, storage, run)


def refusals(plan: MergePlan, output: Output, *, overwrite: bool, inputs: Inputs | None = None) -> list[Problem]:
    """What keeps this plan from being written there, as far as the output and the sources' places show it.

    `inputs` are what a merge reads besides the plan's models. An output that would take the place of something that is
    read is refused before anything else is said of it: what else is wrong has remedies that would lose the source.
    """
    inputs = inputs or Inputs()
    folders = [*inputs.folders, *(entry for source in plan.sources for entry in _folders_of(source))]
    files = [side.file.location for side in (*plan.side_files, *plan.gates.tokenizer_files)]
    folders += source_folders("base", (), files)
    if problem := clash(output, Inputs(folders=tuple(folders), files=inputs.files)):
        return [problem]
    problems = output.problems(digest=plan.digest, output_bytes=plan.totals.output_bytes, overwrite=overwrite)
    if not problems and not overwrite and (finished := complete_merge(plan, output)) is not None:
        problems = [*_missing_card(plan, output, finished), *_newer_sources(plan, output.location, finished)]
    elif not problems and not overwrite and output.digest() == plan.digest:
        problems = _other_files(plan, output)
    return problems


def _other_files(plan: MergePlan, output: Output) -> list[Problem]:
    own = {INDEX_NAME, *(shard.file_name for shard in plan.shards), *(side.name for side in plan.side_files)}
    names = output.other_model_files(own, json_object(json_text(plan.index)))
    if not names:
        return []
    what = f"files of another model are beside the unfinished merge here: {some(names, most=3)}"
    remedy = "use --overwrite to remove them and begin again, or remove them yourself to go on"
    return [Problem(where=output.location, what=what, remedy=remedy)]


def write_problems(output: Output, storage: StorageOptions) -> list[Problem]:
    """What keeps this process from writing to an output that is in order otherwise, found by trying: an object of a few
    bytes is put there and deleted. What a folder allows its `problems` tell without."""
    if not is_url(output.location):
        return []
    store, name = open_store(output.location, storage), f"{JOURNAL}/{PROBE}{uuid.uuid4().hex[:12]}"
    url = join(output.location, name)
    problems: list[Problem] = []
    try:
        store.put(url, b"raymoe: may be deleted")
    except StorageError as error:
        problems += error.problems
    finally:  # also where the put was stopped, or got through and its answer did not
        try:
            store.delete(url)
        except StorageError as error:
            problems += [] if problems else error.problems
    # The permissions are needed on all that is to be written, not on this name.
    return [
        Problem(where=output.location, what=p.what.replace(name, "*"), remedy=p.remedy.replace(name, "*"))
        for p in problems
    ]


def clash(output: Output, inputs: Inputs) -> Problem | None:
    """The problem of an output whose merge would remove or replace something that it reads."""
    return overwritten(output.location, inputs, output.recorded_files())


def _folders_of(source: Source) -> Iterable[tuple[str, str]]:
    return source_folders(source.owner, source.folders, (file.location for file in source.files))


def complete_merge(plan: MergePlan, output: Output) -> FinishedMerge | None:
    """The finished merge of this very plan, where the output holds it: then nothing is left to do.

    The one rule for `raymoe merge`, its jobs and its push, for `raymoe plan` and for `raymoe.merge()`. The plan is told
    by its digest. Files that are missing or have another size are in `output.problems`, which is to be called first.
    """
    found = output.finished_merge()
    return found if found is not None and found.digest == plan.digest else None


def rewritten_sources(plan: MergePlan, location: str, finished: FinishedMerge) -> list[str]:
    """Local weights that were written after the finished merge, although their recorded samples are unchanged.

    They may have been copied or touched only; a small change between the sampled blocks can't be told from that. None
    beside an output in an object store, whose times are of another clock.
    """
    if is_url(location):
        return []
    when = os.stat(os.path.join(location, RECORD_NAME)).st_mtime_ns
    names = {file.location for source in plan.sources for file in source.files} & finished.local_files.keys()
    return sorted(name for name in names if os.path.exists(name) and os.stat(name).st_mtime_ns > when)


def _missing_card(plan: MergePlan, output: Output, finished: FinishedMerge) -> list[Problem]:
    if not plan.options.model_card or any(file.name == CARD_NAME for file in finished.files):
        return []
    what, remedy = "the finished merge here has no model card", "use --no-write-model-card, or --overwrite"
    return [Problem(where=output.location, what=what, remedy=remedy)]


def _newer_sources(plan: MergePlan, location: str, finished: FinishedMerge) -> list[Problem]:
    """Local models that are others now than those that the finished merge was made of.

    Their samples are compared (1 MiB of each file): a file that was only touched or copied is the same, and so is one
    with a change between the sampled blocks (`rewritten_sources`). What the record of an older raymoe
    has no sample of is judged by its time, but not beside an output in an object store, whose times are of another
    clock.
    """
    files = [file for source in plan.sources for file in source.files]
    known = {file.location for file in files if file.location in finished.local_files}
    samples = {file.location: recorded_sample(file) for file in files if file.location in known}
    other = {name for name, now in samples.items() if now is not None and now != finished.local_files[name]}
    if not is_url(location):
        when = os.stat(os.path.join(location, RECORD_NAME)).st_mtime_ns
        judged = [file for file in files if file.location not in known]
        if not known:
            judged += [side.file for side in plan.side_files]
        names = {file.location for file in judged if not is_url(file.location) and os.path.exists(file.location)}
        other |= {name for name in names if os.stat(name).st_mtime_ns > when}
    if not other:
        return []
    what = f"the merge here was made of other sources than are there now: {some(sorted(other), most=3)}"
    remedy = "use --overwrite to merge them again, or keep it as it is (`raymoe push` publishes it)"
    return [Problem(where=location, what=what, remedy=remedy)]


def read_stream(chunks: Iterable[memoryview], size: int) -> bytearray:
    """A bounded stream in one buffer of `size` bytes."""
    buffer, filled = bytearray(size), 0
    for chunk in chunks:
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    assert filled == size, f"a stream of {filled} bytes, expected {size}"
    return buffer
