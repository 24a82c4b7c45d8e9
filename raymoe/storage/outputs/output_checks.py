"""Checks an output before a merge writes to it: obstacles, and files that exist already."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable

from raymoe.errors import Problem
from raymoe.formatting import short_list
from raymoe.object_store.errors import StorageError
from raymoe.object_store.location import Location, LocationKind
from raymoe.object_store.options import StorageOptions
from raymoe.object_store.registry import open_store
from raymoe.planning.multipart import upload_problems
from raymoe.planning.owner import BASE
from raymoe.planning.plan import MergePlan, Source
from raymoe.safe_text import json_text
from raymoe.sources.local_folder import recorded_sample
from raymoe.storage.file_names import CARD_NAME, INDEX_NAME, JOURNAL, PROBE, RECORD_NAME, FinishedMerge, json_object
from raymoe.storage.locations import Inputs, overwrite_problem, source_folders
from raymoe.storage.outputs.protocol import Output


def plan_output_problems(
    plan: MergePlan, output: Output, *, overwrite: bool, inputs: Inputs | None = None
) -> list[Problem]:
    """Problems that prevent writing this plan to the output, as far as the output and the source locations show them.

    `inputs` are what a merge reads besides the plan's models. If the output would replace one of its inputs, only that
    problem is reported: the remedies of the other problems would lose the source.
    """
    inputs = inputs or Inputs()
    folders = [*inputs.folders, *(entry for source in plan.sources for entry in _folders_of(source))]
    files = [side.file for side in (*plan.side_files, *plan.gates.tokenizer_files)]
    folders += source_folders(str(BASE), (), files)
    if problem := input_conflict(output, Inputs(folders=tuple(folders), files=inputs.files)):
        return [problem]
    if output.location.kind is LocationKind.S3 and (problems := upload_problems(plan.shards, output.location.text)):
        return problems
    problems = output.problems(digest=plan.digest, output_bytes=plan.totals.output_bytes, overwrite=overwrite)
    if not problems and not overwrite and (finished := find_complete_merge(plan, output)) is not None:
        problems = [
            *_missing_card_problem(plan, output, finished),
            *_newer_source_problems(plan, output.location, finished),
        ]
    elif not problems and not overwrite and output.digest() == plan.digest:
        problems = _other_file_problems(plan, output)
    return problems


def _other_file_problems(plan: MergePlan, output: Output) -> list[Problem]:
    own = {INDEX_NAME, *(shard.file_name for shard in plan.shards), *(side.name for side in plan.side_files)}
    names = output.other_model_files(own, json_object(json_text(plan.index)))
    if not names:
        return []
    what = f"files of another model are beside the unfinished merge here: {short_list(names, most=3)}"
    remedy = "use --overwrite to remove them and begin again, or remove them yourself to go on"
    return [Problem(where=output.location.text, what=what, remedy=remedy)]


def write_problems(output: Output, storage: StorageOptions) -> list[Problem]:
    """Problems that prevent this process from writing to an output that has no others. They are found by a test: an
    object of a few bytes is put there and deleted. For a folder, `problems` checks its permissions without a test."""
    if not output.location.kind.is_object:
        return []
    store, name = open_store(output.location.text, storage), f"{JOURNAL}/{PROBE}{uuid.uuid4().hex[:12]}"
    url = output.location.join(name).text
    problems: list[Problem] = []
    try:
        store.put(url, b"raymoe: may be deleted")
    except StorageError as error:
        problems += error.problems
    finally:  # also if the put was interrupted, or its reply was lost
        try:
            store.delete(url)
        except StorageError as error:
            problems += [] if problems else error.problems
    # The permissions are needed for all files, not for this name.
    return [
        Problem(where=output.location.text, what=p.what.replace(name, "*"), remedy=p.remedy.replace(name, "*"))
        for p in problems
    ]


def input_conflict(output: Output, inputs: Inputs) -> Problem | None:
    """The problem of an output if the merge would remove or replace one of its inputs there."""
    return overwrite_problem(output.location.text, inputs, output.recorded_files())


def _folders_of(source: Source) -> Iterable[tuple[str, str]]:
    return source_folders(str(source.owner), source.folders, source.files)


def find_complete_merge(plan: MergePlan, output: Output) -> FinishedMerge | None:
    """The finished merge of this very plan, if the output holds it: then nothing is left to do.

    This is the only rule, for `raymoe merge`, its jobs and its push, for `raymoe plan` and for `raymoe.merge()`. Plans
    are compared by digest. Missing files and other sizes are reported by `output.problems`, which has to be called
    first.
    """
    found = output.finished_merge()
    return found if found is not None and found.digest == plan.digest else None


def rewritten_sources(plan: MergePlan, location: Location, finished: FinishedMerge) -> list[str]:
    """Local weights that were written after the finished merge, although their recorded samples are unchanged.

    They may only have been copied or touched, or have a small change between the sampled blocks. Empty for an output in
    an object store, since its times come from another clock.
    """
    if not location.kind.is_local:
        return []
    when = os.stat(location.join(RECORD_NAME).text).st_mtime_ns
    names = {file.location for source in plan.sources for file in source.files} & finished.local_files.keys()
    return sorted(name for name in names if os.path.exists(name) and os.stat(name).st_mtime_ns > when)


def _missing_card_problem(plan: MergePlan, output: Output, finished: FinishedMerge) -> list[Problem]:
    if not plan.options.model_card or any(file.name == CARD_NAME for file in finished.files):
        return []
    what, remedy = "the finished merge here has no model card", "use --no-write-model-card, or --overwrite"
    return [Problem(where=output.location.text, what=what, remedy=remedy)]


def _newer_source_problems(plan: MergePlan, location: Location, finished: FinishedMerge) -> list[Problem]:
    """Local models that have changed since the finished merge was made of them.

    Samples are compared (1 MiB per file): a file that was only touched or copied counts as unchanged. A change between
    the sampled blocks is not seen (`rewritten_sources`). Files without a sample (in the record of an older
    raymoe) are compared by time, unless the output is in an object store, since its times come from another clock.
    """
    files = [file for source in plan.sources for file in source.files]
    known = {file.location for file in files if file.location in finished.local_files}
    samples = {file.location: recorded_sample(file) for file in files if file.location in known}
    other = {name for name, now in samples.items() if now is not None and now != finished.local_files[name]}
    if location.kind.is_local:
        when = os.stat(location.join(RECORD_NAME).text).st_mtime_ns
        judged = [file for file in files if file.location not in known]
        if not known:
            judged += [side.file for side in plan.side_files]
        names = {file.location for file in judged if file.kind.is_local and os.path.exists(file.location)}
        other |= {name for name in names if os.stat(name).st_mtime_ns > when}
    if not other:
        return []
    what = f"the merge here was made of other sources than are there now: {short_list(sorted(other), most=3)}"
    remedy = "use --overwrite to merge them again, or keep it as it is (`raymoe push` publishes it)"
    return [Problem(where=location.text, what=what, remedy=remedy)]
