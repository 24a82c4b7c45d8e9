"""Pico models, kept from run to run: the unit tests need some 300, and each takes transformers 30 ms to make.

    zoo(family, ...) --> kept in .pytest_cache? --> a copy in the session's folder
                         otherwise save_model, and a copy to .pytest_cache

What is kept is never handed out itself, so that a test that changes its model spoils no later run. Another version of
the libraries, or of tests/pico.py, starts with an empty folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["make_model"]

_MADE_BY = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
_MAX_VERSIONS = 3  # of the folder, for the environments of `make test`: the oldest others are removed


def make_model(target: Path, kept: Path | None, family: str, options: Mapping[str, Any]) -> Path:
    """The model that `save_model(target, family, **options)` makes. `kept` is the folder of what is kept, if any."""
    if kept is None:
        return _save(target, family, options)
    key = json.dumps([family, sorted(options.items())], default=repr)
    place = _of_this_version(kept) / hashlib.sha256(key.encode()).hexdigest()[:20]
    if place.is_dir():
        shutil.copytree(place, target, copy_function=shutil.copyfile)
        return target
    _save(target, family, options)
    begun = place.with_name(f"{place.name}.{os.getpid()}")
    shutil.copytree(target, begun, copy_function=shutil.copyfile)
    try:
        begun.rename(place)
    except OSError:  # another process has made it meanwhile
        shutil.rmtree(begun)
    return target


def _save(target: Path, family: str, options: Mapping[str, Any]) -> Path:
    from tests.pico import save_model  # and with it torch

    return save_model(target, family, **options)


def _of_this_version(kept: Path) -> Path:
    """The folder of models that this tests/pico.py makes with these libraries."""
    folder = kept / _version()
    if not folder.is_dir():
        others = sorted((each for each in kept.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
        for old in others[: max(0, len(others) + 1 - _MAX_VERSIONS)]:
            shutil.rmtree(old, ignore_errors=True)  # another process may be at it too
        folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _version() -> str:
    texts = [(Path(__file__).parent / "pico.py").read_text(encoding="utf-8"), *map(version, _MADE_BY)]
    licence = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")  # the tokenizer's text
    return hashlib.sha256("\0".join([*texts, licence]).encode()).hexdigest()[:20]
