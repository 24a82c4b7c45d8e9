"""Packs what is sent to the cluster: a config with the same meaning there as here, and a command line.

    MergeConfig --> the same, with the prompts of local files drawn and written out, and local models by whole path

Models are never sent. A packed config gives the same plan as the original one, so a merge resumes after another
submission of it, or after a direct run on the cluster, has stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from raymoe._version import __version__
from raymoe.config import MergeConfig
from raymoe.config.model_refs import ModelRef, PathRef, is_local_folder
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import human_bytes
from raymoe.object_store.location import Location, is_relative
from raymoe.sources.prompt_sampling import read_prompts
from raymoe.storage.outputs.open_output import writable_location

CONFIG_NAME = "config.yaml"
_MAX_CONFIG_BYTES = 16 * 2**20  # the limit of load_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`config` is the text of the packed config; `models` are folders that nodes of the cluster must have."""

    config: str
    entrypoint: str
    output: str
    metadata: dict[str, str]
    models: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the packed config's content."""
        return self.metadata["config_digest"]


def make_job(config: MergeConfig, output: str, options: Sequence[str], *, result: str | None = None) -> Job:
    """The job that merges `config` into `output` with these options of `raymoe merge`, `--result` among them.

    Raises ProblemReport for everything in it that has no meaning on another machine.
    """
    problems = [*_location_problems("OUT", output), *_model_problems(config)]
    if result is not None:
        problems += _location_problems("--result", result)
    try:
        packed = _with_whole_paths(read_prompts(config, local_only=True))
    except ProblemReport as report:
        raise ProblemReport([*problems, *report.problems]) from None
    text = yaml.safe_dump(packed.to_plain(), allow_unicode=True, sort_keys=False)
    if len(text.encode()) > _MAX_CONFIG_BYTES:
        what = f"with the prompts of its files it has {human_bytes(len(text.encode()))}, too much for a job's package"
        remedy = (
            "set limit: for the files of prompts, or put them into a bucket and name them as s3://bucket/prompts.jsonl"
        )
        problems.append(Problem(where="config", what=what, remedy=remedy))
    if problems:
        raise ProblemReport(problems)
    location = Location.parse(output).text
    canonical = json.dumps(packed.to_plain(), sort_keys=True, separators=(",", ":"))
    return Job(
        config=text,
        entrypoint=shlex.join(["python", "-m", "raymoe", "merge", CONFIG_NAME, location, *options]),
        output=location,
        metadata={
            "name": "raymoe merge",
            "raymoe_version": __version__,
            "config_digest": hashlib.sha256(canonical.encode()).hexdigest(),
            "output": location,
        },
        models=tuple(path for path in _paths(packed) if os.path.isabs(path)),
    )


def _location_problems(where: str, place: str) -> Iterator[Problem]:
    try:
        writable_location(place, where)
    except ProblemReport as report:
        yield from report.problems
        return
    if is_relative(place):
        what = f"{place} is relative, and the job's working directory is thrown away at its end"
        remedy = "name a URL such as s3://bucket/prefix, or a whole path in a folder that the cluster's nodes share"
        yield Problem(where=where, what=what, remedy=remedy)


def _model_problems(config: MergeConfig) -> Iterator[Problem]:
    for path in _paths(config):
        if path.startswith((".", "~")) and not is_local_folder(path):
            what = f"there is no folder {path} here, so nothing can tell what it would be on the cluster"
            remedy = "name the folder by its whole path on the cluster's nodes, or as s3://bucket/folder"
            yield Problem(where="config", what=what, remedy=remedy)


def _paths(config: MergeConfig) -> list[str]:
    """The models and adapters that the config names, without duplicates."""
    return list(dict.fromkeys(path.path for ref in config.models for path in ref.paths))


def _with_whole_paths(config: MergeConfig) -> MergeConfig:
    """Replace this machine's folders by their absolute paths: elsewhere 'org/name' would be a model of the Hub."""

    def experts(which: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            each.model_copy(update={"source_model": _with_whole_paths_of(each.source_model)}) for each in which
        )

    changed = {
        "base_model": _with_whole_paths_of(config.base_model),
        "experts": experts(config.experts),
        "shared_experts": experts(config.shared_experts),
    }
    return config.model_copy(update=changed)


def _with_whole_paths_of(ref: ModelRef) -> ModelRef:
    adapter = _whole_path(ref.adapter) if ref.adapter else None
    return replace(ref, model=_whole_path(ref.model), adapter=adapter)


def _whole_path(path: PathRef) -> PathRef:
    if path.location is not None or not is_local_folder(path.path):
        return path
    return PathRef(path=os.path.abspath(os.path.expanduser(path.path)), revision=path.revision)
