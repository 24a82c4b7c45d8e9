"""Turns a config file into a checked `MergeConfig`, or into one report of all its problems.

    bytes --> text --yaml_loader--> values + lines --schema--> MergeConfig --cross_checks--> MergeConfig
                       \\____________________________\\______________________\\___> problems, in the order of the file

A file that cannot be read or is not YAML is reported at once, since its keys are unknown. After that, problems are
collected: values that the schema refuses are set aside, and the checks run on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raymoe.config.cross_checks import find_invalid
from raymoe.config.schema import MergeConfig
from raymoe.config.schema_errors import partial_config, schema_problems
from raymoe.config.source_positions import NO_POSITIONS, Finding, Loc, SourcePositions
from raymoe.config.yaml_loader import NotYaml, parse_tree
from raymoe.config.yaml_repair import find_fix
from raymoe.errors import Problem, ProblemReport

_MAX_CONFIG_BYTES = 16 * 1024 * 1024


def load_config(path: str | Path, *, allow_all_same: bool = False) -> MergeConfig:
    """Read and check a merge config, YAML or JSON.

    Raises ProblemReport with everything that is wrong, in the order of the file. `allow_all_same` permits
    experts that are all the same model, for merges that are to be trained.
    """
    return load_config_with_positions(path, allow_all_same=allow_all_same)[0]


def load_config_with_positions(
    path: str | Path, *, allow_all_same: bool = False
) -> tuple[MergeConfig, SourcePositions]:
    """As `load_config`, with the lines of the file for problems that are found later: `lines.where(loc)`."""
    return _parse(_read(Path(path)), str(path), allow_all_same=allow_all_same)


def parse_config(text: str, *, name: str, allow_all_same: bool = False) -> MergeConfig:
    """As `load_config`, for text; `name` is what messages call it."""
    return _parse(text, name, allow_all_same=allow_all_same)[0]


def make_config(data: Mapping[str, Any], *, allow_all_same: bool = False) -> MergeConfig:
    """As `load_config`, for a config made in Python."""
    return _check(dict(data), NO_POSITIONS, [], allow_all_same=allow_all_same)


def _parse(text: str, name: str, *, allow_all_same: bool) -> tuple[MergeConfig, SourcePositions]:
    try:
        data, positions, found = parse_tree(text, name)
    except NotYaml as report:
        raise _with_fix(report, text, name) from None
    return _check(data, positions, found, allow_all_same=allow_all_same), positions


def _with_fix(report: NotYaml, text: str, name: str) -> ProblemReport:
    """The report, with the change that makes the file valid as its remedy, if one is found."""
    fix = find_fix(text, report.error, _problem_count)
    if fix is None:
        return ProblemReport(report.problems)
    where, what = f"{name}:{fix.first + 1}", f"not valid YAML: {fix.what}"
    return ProblemReport([Problem(where=where, what=what, remedy=fix.remedy)])


def _problem_count(text: str) -> int:
    try:
        _check(*parse_tree(text, ""), allow_all_same=True)
    except ProblemReport as report:
        return len(report.problems)
    return 0


def _check(data: Any, positions: SourcePositions, found: list[Finding], *, allow_all_same: bool) -> MergeConfig:
    """The config in `data`; `found` are the problems known so far."""
    # If an entry has two models, the list has one expert too few.
    unread: set[Loc] = {
        ("experts",) for each in found if each.loc[:1] == ("experts",) and each.loc[2:] == ("source_model",)
    }
    try:
        config = MergeConfig.model_validate(data)
        found += find_invalid(config, allow_all_same=allow_all_same, unread=unread)
    except ValidationError as error:
        found += schema_problems(error, positions)
        if partial := partial_config(data, error):
            found += find_invalid(partial[0], allow_all_same=allow_all_same, unread=unread | partial[1])
    if found:
        raise ProblemReport(positions.problems(found))
    return config


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise _unreadable(path, "no such file", "check the path of the config") from None
    except IsADirectoryError:
        raise _unreadable(path, "this is a folder, not a file", "name the config file in it") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}", "check the path and its permissions") from None
    if len(raw) > _MAX_CONFIG_BYTES:
        raise _unreadable(path, "more than 16 MiB: this is no merge config", "name the YAML file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise _unreadable(f"{path}:{line}", what, "save the file as UTF-8") from None


def _unreadable(where: str | Path, what: str, remedy: str) -> ProblemReport:
    return ProblemReport([Problem(where=str(where), what=what, remedy=remedy)])
