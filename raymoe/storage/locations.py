"""Decides whether two names mean the same place: by identity, not by text.

A local place is identified by device and inode, so links, '..', bind mounts and different letter case do not hide it.
For a path that does not exist yet, the nearest existing folder and the names below it are used. A place in an object
store is its store, bucket and key, whichever of its schemes or addresses a URL uses.

    folders of sources, files that the user named --Inputs--> `overwrite_problem` --> why an output can't be here
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raymoe.config import MergeConfig
from raymoe.config.source_positions import format_loc
from raymoe.errors import Problem
from raymoe.object_store.location import Location, LocationKind
from raymoe.object_store.urls import split_url
from raymoe.sources.facts import SourceFile
from raymoe.storage.file_names import JOURNAL, is_written_by_a_merge

Key = tuple[Hashable, ...]
"""Equal for names of the same place. The key of a path that does not exist yet starts with the key of its folder."""

_MAX_LINKS = 40  # the limit of Linux
_TEMPLATES = "chat_templates"  # the one subfolder, besides the journal, that a merge writes to
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/VirtualHosting.html
_AWS_HOST = re.compile(r"(?:(?P<bucket>.+)\.)?s3(?:[.-](?:dualstack\.)?[a-z0-9-]+)?\.amazonaws\.com(?:\.cn)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The models and files that a command reads. Each entry is its name in messages, and its path or URL.

    No output may be one of the `folders`, or remove or replace one of the `files`.
    """

    folders: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()


def place_key(location: str) -> Key:
    """The identity of an absolute path or a normalized URL."""
    return _enclosing_keys(location)[0]


def _enclosing_keys(location: str) -> list[Key]:
    """The identities of a place and of all folders above it, innermost first."""
    place = Location.of(location)
    if place.kind.is_object:
        parts = _url_parts(location)
        return [parts[:end] for end in range(len(parts), 0, -1)]
    path = os.path.realpath(place.text)
    keys = [_path_key(path)]
    while (parent := os.path.dirname(path)) != path:
        path = parent
        keys.append(_path_key(path))
    return keys


def is_same_place(one: str, other: str) -> bool:
    """Whether two absolute paths or normalized URLs mean the same place."""
    return place_key(one) == place_key(other)


def is_in(inner: str, outer: str) -> bool:
    """Whether a place is `outer` or is in it, at any depth."""
    return place_key(outer) in _enclosing_keys(inner)


def _names_of(file: str) -> Iterator[str]:
    """The name of a file and, if it is a link, all names on its way: replacing any of them loses the file."""
    place = Location.of(file)
    file = place.text
    for _ in range(_MAX_LINKS):
        yield file
        if not place.kind.is_local or not os.path.islink(file):
            return
        target = os.readlink(file)
        file = os.path.join(os.path.dirname(file), target)


def is_in_job_package(path: str) -> bool:
    """Whether a path is in a folder that Ray made from a job's `working_dir`; Ray deletes it after the job."""
    # Ray's own layout (WorkingDirPlugin): SESSION/runtime_resources/working_dir_files/PACKAGE
    return "/runtime_resources/working_dir_files/" in f"{os.path.realpath(path)}/"


def overwrite_problem(output: str, inputs: Inputs, recorded: Iterable[str] = ()) -> Problem | None:
    """The problem of an output (a folder or URL prefix) if the merge would remove or replace one of its own inputs
    there.

    `recorded` are file names in the record of an earlier merge in the output: they are removed too.
    """
    own = {place_key(output): "", place_key(_below(output, _TEMPLATES)): f"{_TEMPLATES}/"}
    named = {(place_key(_folder(path)), _last_name(path)) for path in (_below(output, name) for name in recorded)}
    written = own.keys() | {folder for folder, _ in named}
    journal = place_key(_below(output, JOURNAL))  # removed at any depth
    keys = functools.cache(_enclosing_keys)
    for owner, folder in inputs.folders:
        if keys(folder)[0] in written or journal in keys(folder):
            what = f"the output is the folder of {owner}, which would be overwritten"
            return _conflict_problem(output, what, folder)
    for owner, file in inputs.files:
        for path in _names_of(file):
            above, name = keys(_folder(path)), _last_name(path)
            is_replaced = (above[0], name) in named or (
                above[0] in own and is_written_by_a_merge(f"{own[above[0]]}{name}")
            )
            if is_replaced or journal in above:
                return _conflict_problem(output, f"the merge would remove or replace {owner} there", file)
    return None


def replaced_input(path: str, inputs: Inputs) -> str | None:
    """A description of what a new file at an absolute path would replace: an input file under any name, or an existing
    file in one of the folders. Links are followed."""
    if os.path.lexists(path):
        for owner, folder in inputs.folders:
            if is_in(os.path.realpath(path), folder) or is_in(os.path.dirname(path), folder):
                return f"a file in the folder of {owner}"
    key = place_key(path)
    return next((owner for owner, file in inputs.files if place_key(file) == key), None)


def source_folders(owner: str, folders: Iterable[str], files: Iterable[SourceFile]) -> Iterator[tuple[str, str]]:
    """Entries of `Inputs.folders` for a model: its own folders, and the folders of all names that lead to its files."""
    found = dict.fromkeys(folders)
    for file in files:
        if file.kind is not LocationKind.HUB:  # Hub files are in the Hub's cache, which is among `folders`
            found |= dict.fromkeys(_folder(name) for name in _names_of(file.location))
    return ((owner, folder) for folder in found)


def input_paths(config: MergeConfig, source: object, extra: Inputs | None = None) -> Inputs:
    """The files that a merge reads besides its models: the config, if `source` is its path, and files of prompts."""
    files = dict.fromkeys(extra.files if extra else ())
    if isinstance(source, (str, Path)):
        files["the config", os.path.abspath(source)] = None
    for key, prompts in config.prompt_files.items():
        files[f"the file of {format_loc(key)}", prompts.absolute_name] = None
    return Inputs(folders=extra.folders if extra else (), files=tuple(files))


def _conflict_problem(output: str, what: str, input_: str) -> Problem:
    names = "" if input_ == output or _folder(input_) == output else f" ({input_})"
    return Problem(where=output, what=f"{what}{names}", remedy="choose another output")


def _path_key(path: str) -> Key:
    """The key of a path without links."""
    names: list[str] = []
    while True:
        try:
            found = os.stat(path)
        except OSError:  # it does not exist, or is not readable
            path, name = os.path.split(path)
            names.insert(0, name)
            if not name:
                return tuple(names)
        else:
            return (found.st_dev, found.st_ino, *names)


def _url_parts(url: str) -> Key:
    """Store, bucket or host, and the segments of the key."""
    scheme, rest = split_url(url)
    if scheme in ("http", "https"):
        return _web_parts(url)
    if scheme in ("s3", "s3a"):
        return ("s3", *_segments(rest))
    from fsspec import get_filesystem_class

    try:
        kind = get_filesystem_class(scheme)  # one class may have several schemes: gs and gcs, abfs and az
        return (kind.__name__, *_segments(str(kind._strip_protocol(url))))
    except (ImportError, ValueError):
        return (scheme, *_segments(rest))


def _web_parts(url: str) -> Key:
    """Parts of an http(s) address; the address of an S3 object gives the object's parts."""
    parts = urlsplit(url)
    segments = _segments(unquote(parts.path))
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if (endpoint := os.environ.get(variable)) and urlsplit(endpoint).netloc.lower() == parts.netloc.lower():
            return ("s3", *segments)
    if (match := _AWS_HOST.fullmatch((parts.hostname or "").lower())) is not None:
        return ("s3", *((match["bucket"],) if match["bucket"] else ()), *segments)
    return ("http", parts.netloc.lower().removesuffix(":443").removesuffix(":80"), *segments)


def _segments(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _folder(location: str) -> str:
    return location.rpartition("/")[0] or "/"


def _below(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _last_name(location: str) -> str:
    return location.rpartition("/")[2]
