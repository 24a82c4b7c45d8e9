"""raymoe in Python: the same as the commands, cheap to import, and a good guest in a process that uses Ray itself."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.config import MergeConfig
from raymoe.errors import ProblemReport
from raymoe.planning import MergeOptions
from raymoe.planning.owner import BASE
from raymoe.runtime.settings import RuntimeSettings
from tests.cli.commands import hashes
from tests.cli.commands import raymoe as command
from tests.runtime.conftest import FLAGS, OPTIONS, Merge

QUIET = RuntimeSettings(verbosity=-1, actors=1)


@pytest.mark.processes
def test_import_is_light() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pydantic', 'numpy', 'yaml', 'rich', 'typer'}"
    script = f"import sys, raymoe; raymoe.__version__; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_unknown_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        raymoe.marge  # noqa: B018


def test_same_as_the_command(many_shards: Merge, without_ray: None, tmp_path: Path) -> None:
    """`many_shards` was made by `raymoe.merge`."""
    done = command("merge", many_shards.config, tmp_path / "out", *FLAGS)
    assert done.returncode == 0
    assert hashes(tmp_path / "out") == many_shards.files


def test_result_and_plan_agree(many_shards: Merge, local_ray: None, tmp_path: Path) -> None:
    import ray

    config = raymoe.load_config(many_shards.config)
    plan = raymoe.plan(config, OPTIONS)
    result = raymoe.merge(config, tmp_path / "out", OPTIONS, settings=QUIET)
    assert ray.is_initialized(), "Ray was running before, and has to be after"
    assert ray.get(ray.put(1)) == 1
    assert hashes(tmp_path / "out") == many_shards.files
    assert str(result.output) == str(tmp_path / "out")
    assert {file.name for file in result.files} | {"raymoe.json"} == many_shards.files.keys()
    sizes = {file.name: file.size for file in result.files}
    assert {shard.file_name: shard.nbytes for shard in plan.shards}.items() <= sizes.items()
    assert (result.bytes_written, result.bytes_kept) == (
        sum(shard.nbytes for shard in plan.worker_shards),
        0,
    )


def test_config_as_path_mapping_or_object(many_shards: Merge) -> None:
    config = raymoe.load_config(many_shards.config)
    digests = {raymoe.plan(form, OPTIONS).digest for form in (config, config.to_plain(), str(many_shards.config))}
    assert len(digests) == 1


@pytest.mark.parametrize("form", [dict, MergeConfig.model_validate])
def test_problems_of_a_config_object(zoo: Callable[..., Path], tmp_path: Path, form: Callable[[Any], Any]) -> None:
    from tests.pico import merge_config

    same = form(merge_config(zoo("llama"), [zoo("llama", seed=1)] * 2, mode="cheap_embed"))
    with pytest.raises(ProblemReport, match="all 2 experts are the same model"):
        raymoe.plan(same)
    with pytest.raises(ProblemReport, match="all 2 experts are the same model"):
        raymoe.merge(same, tmp_path / "out", settings=QUIET)
    assert not (tmp_path / "out").exists()


def test_not_in_the_main_thread(many_shards: Merge, local_ray: None, tmp_path: Path) -> None:
    """Signal handlers can't be set there, and none are needed."""
    errors: list[BaseException] = []

    def merge() -> None:
        try:
            raymoe.merge(many_shards.config, tmp_path / "out", OPTIONS, settings=QUIET)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=merge)
    thread.start()
    thread.join(60)
    assert not errors
    assert hashes(tmp_path / "out") == many_shards.files


def test_an_error_gives_the_output_back(
    many_shards: Merge, without_ray: None, tmp_path: Path, monkeypatch: Any
) -> None:
    """A caller that catches an error, or Ctrl-C in a notebook, may call again: the lock is not held for ever."""
    import raymoe.runtime.coordinator as merge_module

    def stop(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "run_on_actors", stop)
        with pytest.raises(KeyboardInterrupt):
            raymoe.merge(many_shards.config, tmp_path / "out", OPTIONS, settings=QUIET)
    raymoe.merge(many_shards.config, tmp_path / "out", OPTIONS, settings=QUIET)
    assert hashes(tmp_path / "out") == many_shards.files


def test_another_seed_is_another_merge(many_shards: Merge, without_ray: None, tmp_path: Path) -> None:
    """Else the comparisons of this folder would prove nothing."""
    options = MergeOptions(max_shard_bytes=OPTIONS.max_shard_bytes, model_card=False, seed=1)
    raymoe.merge(many_shards.config, tmp_path / "out", options, settings=QUIET)
    found = hashes(tmp_path / "out")
    assert found.keys() == many_shards.files.keys()
    changed = {name for name in found if found[name] != many_shards.files[name]}
    plan = raymoe.plan(many_shards.config, options)
    # The experts have noise and the gates are random; the base is neither.
    assert changed == {shard.file_name for shard in plan.shards if shard.owner != BASE} | {"raymoe.json"}
