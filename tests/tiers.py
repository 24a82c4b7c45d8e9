"""Which tier a test is of: what it needs beside this process decides, and a test that needs more than it says fails.

    unit        this process alone                              make check
    ray         a Ray cluster                                   make test
    s3          servers of objects or of models, also threads   make test
    processes   commands and servers of their own               make test
    engines     models are run, in transformers or llama.cpp    make test
    slow        this process alone, more cases of a unit test   make test
    soak        long by nature; each has a short version        make soak

Tests with a fixture that starts something have its mark from here; what else starts something has its mark in its file,
and a test without a mark is a unit test. CONTRIBUTING.md tells what each tier proves.

A test of object stores runs on moto. With the mark `every_server` it runs on the others too; without it, those are part
of `make soak`. With the mark `soak_on("moto")`, its cases with that in their name are part of `make soak`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

__all__ = ["MARKS", "has_unit_tests", "mark_tiers", "nothing_outside", "servers_of"]

MARKS: Mapping[str, str] = {
    "ray": "needs a Ray cluster",
    "s3": "needs a server of objects or of models, in this process or another",
    "processes": "starts other processes, or a server that speaks neither S3 nor the Hub's protocol",
    "engines": "runs whole models in an inference engine (transformers, llama.cpp) to compare what they compute",
    "slow": "more or larger cases of what a unit test shows: part of `make test`, not of `make check`",
    "soak": "takes minutes by nature: part of `make soak` only",
}
_BY_FIXTURE: Mapping[str, str] = {"local_ray": "ray", "server": "s3", "hub": "s3"}
_OUTSIDE = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "socket.bind"})

# The statement, to the next line that begins another.
_PYTESTMARK = re.compile(r"^pytestmark = .*?(?=^[^\s\])])", re.MULTILINE | re.DOTALL)

_running: list[str] = []  # the unit test that is running, if one is
_is_watched = False


def mark_tiers(items: list[pytest.Item]) -> None:
    """Give each test the marks of its fixtures, and `unit` to those with no other. Files of what takes longest come
    first, so that two processes end at about the same time."""
    for item in items:
        if any(mark.args[0] in item.name for mark in item.iter_markers("soak_on")):
            item.add_marker("soak")
        for name in set(getattr(item, "fixturenames", ())) & set(_BY_FIXTURE):
            item.add_marker(_BY_FIXTURE[name])
        if not any(item.get_closest_marker(name) for name in MARKS):
            item.add_marker("unit")
    for path in {item.path for item in items if item.get_closest_marker("unit") is not None}:
        assert has_unit_tests(path), f"{path} has unit tests, which `make check` would not collect"
    tiers = (*MARKS, "unit")
    ranks: dict[str, int] = {}
    for item in items:
        rank = min(tiers.index(mark.name) for mark in item.iter_markers() if mark.name in tiers)
        ranks[item.nodeid.partition("::")[0]] = min(rank, ranks.get(item.nodeid.partition("::")[0], len(tiers)))
    items.sort(key=lambda item: ranks[item.nodeid.partition("::")[0]])


def has_unit_tests(path: Path) -> bool:
    """Whether a file of tests may have one: not where `pytestmark` gives all of its tests another tier."""
    found = _PYTESTMARK.search(path.read_text(encoding="utf-8"))
    return found is None or not any(f"mark.{name}" in found.group() for name in MARKS)


def servers_of(metafunc: pytest.Metafunc, servers: tuple[str, ...]) -> list[Any]:
    """The servers that a test's `server` is in turn: the first, and in `make soak` the others."""
    first, *others = servers
    every = metafunc.definition.get_closest_marker("every_server") is not None
    return [first, *(other if every else pytest.param(other, marks=pytest.mark.soak) for other in others)]


def nothing_outside(item: pytest.Item) -> Generator[None, Any, Any]:
    """A unit test starts no process and opens no port, so that `make check` stays quick and needs nothing."""
    global _is_watched
    if item.get_closest_marker("unit") is None:
        return (yield)
    if not _is_watched:
        sys.addaudithook(_refuse)  # which can't be taken back: it looks at what runs
        _is_watched = True
    _running.append(item.nodeid)
    fsync, os.fsync = os.fsync, _fsync
    try:
        return (yield)
    finally:
        os.fsync = fsync
        _running.clear()


def _fsync(descriptor: int) -> None:
    """os.fsync without the wait for a disk, 2 ms for each of 6,000 calls. No unit test can see whether a disk has what
    the kernel has; a test that a file is synced looks at the call. Tests of the other tiers sync."""
    os.fstat(descriptor)  # which raises for a file that is closed, as fsync does


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _running and event in _OUTSIDE:
        raise AssertionError(f"{_running[0]}: {event} {arguments[:1]} in a unit test: give it a mark of tests/tiers.py")
