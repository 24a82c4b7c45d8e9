"""The output files of an evaluation: eval.json and the page. At the start it is checked that they can be written.

Each is written to a temporary file and then moved to its path, so a full disk or a kill leaves the old file intact.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raymoe.checkpoints.open_checkpoint import read_object
from raymoe.config.model_refs import is_local_folder, parse_model_ref, without_expert
from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.location import Location
from raymoe.safe_text import json_text
from raymoe.sources.local_folder import LocalFolder
from raymoe.storage.atomic_file import check_writable_file, is_special, resolve_links, write_atomic
from raymoe.storage.file_names import RECORD_NAME, is_written_by_a_merge
from raymoe.storage.locations import Inputs, replaced_input
from raymoe.storage.outputs.open_output import unwritable_problem


def check_writable(files: Mapping[str, Path | None], inputs: Inputs | None = None) -> None:
    """Check `files`, by the option that names them. Raises ProblemReport if one can't be written, if two options name
    the same file (the second would replace the first), or if it is one of the `inputs`."""
    problems = []
    owners: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        if problem := _output_path_problem(option, path):
            problems.append(problem)
        elif owner := replaced_input(os.path.abspath(path), inputs or Inputs()):
            what = f"this is {owner}, which would be replaced"
            problems.append(Problem(where=f"{option} {path}", what=what, remedy="name another file"))
        elif path.is_dir():
            problems.append(Problem(where=f"{option} {path}", what="this is a folder", remedy="name a file"))
        elif not path.absolute().parent.is_dir():
            problems.append(Problem(where=f"{option} {path}", what="there is no such folder", remedy="make it first"))
        elif (error := check_writable_file(path)) is not None:
            problems.append(_write_problem(f"{option} {path}", error))
        elif not is_special(path) and (owner := owners.setdefault(resolve_links(path), option)) != option:
            what = f"{owner} would be written to this file too"
            problems.append(Problem(where=f"{option} {path}", what=what, remedy="name two files"))
    if problems:
        raise ProblemReport(problems)


def _output_path_problem(option: str, path: Path) -> Problem | None:
    try:
        location = Location.parse(path)
    except ValueError as error:
        return Problem(where=option, what=str(error), remedy="name a local file")
    return unwritable_problem(location, option, "name a local file")


def evaluation_input_paths(
    checkpoint: str, data: Path | None, tasks: str | None, further: Iterable[str] = ()
) -> Inputs:
    """The local files that an evaluation reads: the model's own files, those of a merge's sources and of `further`
    models, the texts, and task files. Problems of the models are not reported here."""
    files = [("the file of texts", os.path.abspath(data))] if data is not None else []
    files += [("a task file", os.path.abspath(name)) for name in (tasks or "").split(",") if name.strip()]
    folders = [(f"the model {name}", folder) for name in further for folder in _local_folders(name)]
    own_files, own_folders = _own_paths(checkpoint)
    return Inputs(files=(*files, *own_files), folders=(*folders, *own_folders))


def _own_paths(checkpoint: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Files and folders of the evaluated model. Results may be replaced in the folder of a merge."""
    try:
        location = Location.parse(checkpoint)
    except ValueError:
        return [], []
    folder = location.text
    if not location.kind.is_local or not os.path.isdir(folder):
        return [], [("the model", each) for each in _local_folders(checkpoint)]
    if not os.path.exists(os.path.join(folder, RECORD_NAME)):
        return [], [("the model", folder)]
    record: Mapping[str, Any] = {}
    with suppress(ProblemReport):
        record = read_object(LocalFolder(folder), RECORD_NAME, "", "")
    recorded = record.get("files")
    own = dict.fromkeys(recorded if isinstance(recorded, Mapping) else ())
    own |= dict.fromkeys(name for name in os.listdir(folder) if is_written_by_a_merge(name))
    files = [("a file of the merge", os.path.join(folder, name)) for name in own]
    prompts = record.get("prompt_files")
    names = [each.get("file") for each in (prompts if isinstance(prompts, list) else ()) if isinstance(each, Mapping)]
    files += [
        ("a file of prompts of the merge", name) for name in names if isinstance(name, str) and os.path.isabs(name)
    ]
    return files, list(_recorded_folders(record.get("sources")))


def _local_folders(name: str) -> list[str]:
    """The local folders of a model as a config names it, its adapter's included."""
    try:
        ref = parse_model_ref(name)
    except ValueError:
        return []
    return [os.path.abspath(os.path.expanduser(each.path)) for each in ref.paths if is_local_folder(each.path)]


def _recorded_folders(sources: object) -> Iterator[tuple[str, str]]:
    """The local folders among a record's sources. The record may have any content."""
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, Mapping):
            owner, adapter = str(source.get("owner")), str(source.get("adapter") or "")
            model = without_expert(str(source.get("model")).removesuffix(f"+{adapter}"))
            yield from ((owner, folder) for folder in (model, adapter) if os.path.isabs(folder))


def write_evaluation(result: Mapping[str, Any], json_file: Path | None, html: Path | None) -> None:
    """Write the files. Raises ProblemReport if one can't be written after all."""
    if json_file is not None:
        _write(json_file, json_text(result) + "\n")
    if html is not None:
        from raymoe.report.eval_page import evaluation_page

        _write(html, evaluation_page(result))


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise ProblemReport([_write_problem(str(path), error)]) from None


def _write_problem(where: str, error: OSError) -> Problem:
    what = f"it can't be written: {error.strerror or error}"
    return Problem(where=where, what=what, remedy="name a file in a folder that you may write to, with space left")
