"""Fixtures that several folders of tests share. None starts before a test asks for it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.kept_models import make_model
from tests.object_store.servers import STARTERS, environment
from tests.tiers import MARKS, has_unit_tests, mark_tiers, nothing_outside, servers_of

# A test run in the background of a shell inherits that Ctrl-C is ignored, and so would the commands that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes side by side share the cores: with a thread per core in each, torch's threads wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    for name, says in {
        **MARKS,
        "unit": "needs this process alone",
        "every_server": "runs on every S3 server",
        "soak_on(text)": "its cases with that text in their name are long",
    }.items():
        config.addinivalue_line("markers", f"{name}: {says}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make check` does not import files of other tiers, and with them inference engines and servers."""
    is_file = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if config.option.markexpr == "unit" and is_file and not has_unit_tests(collection_path) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_given = any("server" in str(mark.args[0]).split(",") for mark in metafunc.definition.iter_markers("parametrize"))
    if (
        "server" in metafunc.fixturenames
        and not is_given
        and "tests.object_store.fixtures" in _module_of(metafunc, "server")
    ):
        metafunc.parametrize("server", servers_of(metafunc, STARTERS), indirect=True)


def _module_of(metafunc: pytest.Metafunc, name: str) -> str:
    """Where the fixture of that name is defined that a test uses."""
    found = metafunc._arg2fixturedefs.get(name)
    return found[-1].func.__module__ if found else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_tiers(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: looking through it again and again for garbage took a tenth of the time."""
    _files_with_ray.update(item.path for item in session.items if item.get_closest_marker("ray") is not None)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


_files_with_ray: set[Path] = set()
_requests_of_ray: list[Any] = []  # the one that has brought up `local_ray`, while that is up


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for each test, whatever the one before has computed with. No cluster beside files that need none: it
    takes a twentieth of a core while it idles."""
    if item.path not in _files_with_ray:
        for request in list(_requests_of_ray):
            request._fixturedef.finish(request)  # and all fixtures that use it; a later file would start it again
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from nothing_outside(item))


@pytest.fixture(scope="session")
def local_ray(request: pytest.FixtureRequest, _aws_files: Path) -> Iterator[None]:
    """A Ray cluster of this process. Merges in the same process use it as it is and leave it alone."""
    import ray

    with environment({"AWS_CONFIG_FILE": str(_aws_files), "AWS_SHARED_CREDENTIALS_FILE": str(_aws_files)}):
        _start_ray(tries=3)
    _requests_of_ray.append(request)
    yield
    _requests_of_ray.clear()
    ray.shutdown()


def _start_ray(tries: int) -> None:
    """Ray gives up a start that takes half a minute, as on a busy machine: then it is started again."""
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.WARNING, "log_to_driver": False}
    try:
        ray.init(address="local", num_cpus=2, **options)
    except Exception as error:  # a bare one
        if tries == 1 or "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        _start_ray(tries - 1)


@pytest.fixture(scope="session")
def _aws_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aws") / "config"
    path.touch()
    return path


@pytest.fixture(scope="module")
def ray_has_access(local_ray: None, _aws_files: Path) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """ray_has_access(variables) gives the session's cluster the AWS_* variables, as a node's profile would, till the
    end of the file."""

    def give(variables: Mapping[str, str]) -> None:
        lines = [f"{name.removeprefix('AWS_').lower()} = {value}" for name, value in variables.items()]
        lines = [f"aws_{line}" if "_key" in line.partition(" ")[0] else line for line in lines]
        _aws_files.write_text("\n".join(["[default]", *lines, ""]))

    yield give
    _aws_files.write_text("")


@pytest.fixture(scope="session")
def ray_merge(local_ray: None) -> Callable[..., Any]:
    """ray_merge(config, folder, options=None, **settings) is `raymoe.merge` on the session's cluster."""
    import raymoe
    from raymoe.runtime.settings import RuntimeSettings

    def merge(config: Any, folder: Path, options: Any = None, **settings: Any) -> Any:
        settings = {"verbosity": -1, "actors": 1, **settings}
        return raymoe.merge(config, folder, options, settings=RuntimeSettings(**settings), allow_all_same=True)

    return merge


@pytest.fixture
def without_ray() -> Iterator[None]:
    """Merges and verifications of the test run in this process, with one worker (tests/runtime/in_process.py)."""
    from tests.runtime.in_process import in_this_process

    with in_this_process():
        yield


@pytest.fixture
def merge_in_process(without_ray: None) -> Callable[..., Any]:
    """`ray_merge` without Ray: merge_in_process(config, folder, options=None, **settings) is `raymoe.merge`."""
    import raymoe
    from raymoe.runtime.settings import RuntimeSettings

    def merge(config: Any, folder: Path, options: Any = None, **settings: Any) -> Any:
        made = RuntimeSettings(**{"verbosity": -1, **settings})
        return raymoe.merge(config, folder, options, settings=made, allow_all_same=True)

    return merge


@pytest.fixture(scope="session")
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """zoo(family, seed=0, dtype="float32", **config) is the folder of that pico model, made once. Read-only."""
    root, cache = tmp_path_factory.mktemp("zoo"), getattr(request.config, "cache", None)
    kept = cache.mkdir("zoo") if cache is not None else None
    made: dict[str, Path] = {}

    def model(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items(), key=lambda item: item[0])}"
        if key not in made:
            made[key] = make_model(root / f"{family}-{len(made)}", kept, family, options)
        return made[key]

    return model


@pytest.fixture(scope="session")
def mixture(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """mixture(pair) is the merge of three models that differ, with random routers, made once. Read-only."""
    from tests.architectures.pairs import make_mixture

    root = tmp_path_factory.mktemp("mixtures")
    made: dict[str, Any] = {}

    def merge(pair: Any) -> Any:
        name = f"{pair} {sorted(pair.options.items())}"
        if name not in made:
            made[name] = make_mixture(pair, zoo, root / str(len(made)))
        return made[name]

    return merge
