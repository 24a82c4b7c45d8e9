"""The files that an evaluation leaves: eval.json and the page. Whether they can be written is asked at the start.

Each is written beside its place and moved there whole: a full disk or a kill leaves the file that was there before.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport
from raymoe.outgoing import json_text

__all__ = ["check_writable", "write_evaluation"]


def check_writable(files: Mapping[str, Path | None]) -> None:
    """`files` by the option that names them. Raises ProblemReport for those that can't be written, and for one that two
    options name: the second would take the place of the first."""
    problems = []
    owners: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            problems.append(Problem(where=f"{option} {path}", what="this is a folder", remedy="name a file"))
        elif not path.absolute().parent.is_dir():
            problems.append(Problem(where=f"{option} {path}", what="there is no such folder", remedy="make it first"))
        elif (error := _opening(path)) is not None:
            problems.append(_not_written(f"{option} {path}", error))
        elif not _is_special(path) and (owner := owners.setdefault(_place(path), option)) != option:
            what = f"{owner} is to be written to this file too"
            problems.append(Problem(where=f"{option} {path}", what=what, remedy="name two files"))
    if problems:
        raise ProblemReport(problems)


def write_evaluation(result: Mapping[str, Any], json_file: Path | None, html: Path | None) -> None:
    """Raises ProblemReport if a file can't be written after all."""
    if json_file is not None:
        _write(json_file, json_text(result) + "\n")
    if html is not None:
        from raymoe.report.eval_page import evaluation_page

        _write(html, evaluation_page(result))


def _opening(path: Path) -> OSError | None:
    """What the filesystem says to opening the file for writing, and to a new one beside it: permission bits alone know
    nothing of read-only and special mounts."""
    if _is_special(path):
        return None  # a pipe would take the first close for the end
    try:
        if path.exists():
            path.open("a").close()
        part = _part(_place(path))
        part.open("w").close()
        part.unlink()
    except OSError as error:
        return error
    return None


def _is_special(path: Path) -> bool:
    """A pipe or a device: bytes are sent there, and nothing can take its place."""
    return path.exists() and not path.is_file()


def _place(path: Path) -> Path:
    """Where the file is, through links: those stay."""
    return Path(os.path.realpath(path))


def _part(place: Path) -> Path:
    """The file under its name of the meantime, which no other process has."""
    return place.with_name(f"{place.name}.{os.getpid()}.part")


def _write(path: Path, text: str) -> None:
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(_place(path), text)
    except OSError as error:
        raise ProblemReport([_not_written(str(path), error)]) from None


def _replace(place: Path, text: str) -> None:
    part = _part(place)
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if place.exists():
            part.chmod(stat.S_IMODE(place.stat().st_mode))
        part.replace(place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _not_written(where: str, error: OSError) -> Problem:
    what = f"it can't be written: {error.strerror or error}"
    return Problem(where=where, what=what, remedy="name a file in a folder that you may write to, with space left")
