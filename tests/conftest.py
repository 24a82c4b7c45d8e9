"""Fixtures that several folders of tests share. None starts before a test asks for it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A test run in the background of a shell inherits that Ctrl-C is ignored, and so would the commands that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray cluster of this process. Merges in the same process use it as it is and leave it alone."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_merge(local_ray: None) -> Callable[..., Any]:
    """ray_merge(config, folder, options=None, **settings) is `raymoe.merge` on the session's cluster."""
    import raymoe
    from raymoe.runtime.settings import RuntimeSettings

    def merge(config: Any, folder: Path, options: Any = None, **settings: Any) -> Any:
        settings = {"verbosity": -1, "actors": 1, **settings}
        return raymoe.merge(config, folder, options, settings=RuntimeSettings(**settings), allow_all_same=True)

    return merge


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """zoo(family, seed=0, dtype="float32", **config) is the folder of that pico model, made once. Read-only."""
    from tests.pico import save_model

    root = tmp_path_factory.mktemp("zoo")
    made: dict[str, Path] = {}

    def model(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items(), key=lambda item: item[0])}"
        if key not in made:
            made[key] = save_model(root / f"{family}-{len(made)}", family, **options)
        return made[key]

    return model
