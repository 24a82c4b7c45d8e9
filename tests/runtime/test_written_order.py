"""In which order a merge's files get their names: a reader that finds the index finds all that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymoe.planning import MergeOptions
from raymoe.storage.file_names import INDEX_NAME, RECORD_NAME
from raymoe.storage.outputs.local import LocalOutput
from tests.pico import merge_config


def test_shards_then_small_files_then_the_index_then_the_record(
    zoo: Callable[..., Path], merge_in_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, real = list[str](), LocalOutput.write

    def write(self: LocalOutput, name: str, *arguments: Any, **named: Any) -> Any:
        record = real(self, name, *arguments, **named)
        written.append(name)
        return record

    monkeypatch.setattr(LocalOutput, "write", write)
    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode="cheap_embed")
    result = merge_in_process(config, tmp_path / "out", MergeOptions(max_shard_bytes=300_000))
    shards = [name for name in written if name.endswith(".safetensors")]
    assert len(shards) > 3 and written[: len(shards)] == shards
    assert written[-2:] == [INDEX_NAME, RECORD_NAME]
    assert sorted(written) == sorted([*(file.name for file in result.files), RECORD_NAME]), "each once"
