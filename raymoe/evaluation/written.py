"""The files that an evaluation leaves: eval.json and the page. Whether they can be written is asked at the start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymoe.errors import Problem, ProblemReport

__all__ = ["check_writable", "write_evaluation"]


def check_writable(files: Mapping[str, Path | None]) -> None:
    """`files` by the option that names them. Raises ProblemReport for those that can't be written."""
    problems = []
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            problems.append(Problem(where=f"{option} {path}", what="this is a folder", remedy="name a file"))
        elif not path.absolute().parent.is_dir():
            problems.append(Problem(where=f"{option} {path}", what="there is no such folder", remedy="make it first"))
        elif (error := _opening(path)) is not None:
            problems.append(_not_written(f"{option} {path}", error))
    if problems:
        raise ProblemReport(problems)


def write_evaluation(result: Mapping[str, Any], json_file: Path | None, html: Path | None) -> None:
    """Raises ProblemReport if a file can't be written after all."""
    if json_file is not None:
        _write(json_file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if html is not None:
        from raymoe.report.eval_page import evaluation_page

        _write(html, evaluation_page(result))


def _opening(path: Path) -> OSError | None:
    """What opening the file for writing says: permission bits alone know nothing of read-only and special mounts."""
    existed = os.path.lexists(path)
    if path.exists() and not path.is_file():
        return None  # a pipe would take the first close for the end
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        return error
    return None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProblemReport([_not_written(str(path), error)]) from None


def _not_written(where: str, error: OSError) -> Problem:
    what = f"it can't be written: {error.strerror or error}"
    return Problem(where=where, what=what, remedy="name a file in a folder that you may write to, with space left")
