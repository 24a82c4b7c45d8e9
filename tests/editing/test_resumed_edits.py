"""Edits that were interrupted, and edits from bucket to bucket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe
from tests.editing.test_edits import edit_here, same_weights
from tests.object_store.servers import Server
from tests.pico import merge_config, merge_here


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_edit_that_was_interrupted_goes_on(
    zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First before its routers, then before its small files."""
    from raymoe.runtime import coordinator

    base, *models = (zoo("llama", seed=seed) for seed in range(5))
    entries = merge_config(base, models[:4], mode="ridge")["experts"]
    whole: dict[str, Any] = {"base_model": str(base), "gate_mode": "ridge", "experts": entries[:3]}
    merge_here(whole, tmp_path / "old")
    changes: dict[str, Any] = {"add": [entries[3]], "remove": [0]}
    for step in ("_write_router", "_write_small_files"):
        with monkeypatch.context() as patch:
            patch.setattr(coordinator, step, stop)
            with pytest.raises(KeyboardInterrupt):
                edit_here(tmp_path / "old", tmp_path / "new", **changes)
        assert not (tmp_path / "new" / "raymoe.json").exists()
    result = edit_here(tmp_path / "old", tmp_path / "new", **changes)
    weights = [file.size for file in result.files if file.name.endswith(".safetensors")]
    assert result.bytes_kept == sum(weights[:-1])  # the last one is of the router, which the driver writes again
    assert edit_here(tmp_path / "old", tmp_path / "new", **changes).was_complete
    merge_here({**whole, "experts": entries[1:]}, tmp_path / "expected")
    same_weights(tmp_path / "new", tmp_path / "expected")


def download(server: Server, bucket: str, prefix: str, folder: Path) -> Path:
    client, name = server.client(), bucket.removeprefix("s3://")
    folder.mkdir()
    for each in client.list_objects_v2(Bucket=name, Prefix=prefix + "/")["Contents"]:
        path = folder / each["Key"].removeprefix(prefix + "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(client.get_object(Bucket=name, Key=each["Key"])["Body"].read())
    return folder


def test_from_bucket_to_bucket_the_store_copies(
    server: Server, bucket: str, zoo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of 19 MB, as parts of an upload can be copied from 5 MiB on."""
    from raymoe.runtime import coordinator

    shape = {"intermediate_size": 24576, "num_hidden_layers": 1}
    base, *models = (zoo("llama", seed=seed, **shape) for seed in range(4))
    config = merge_config(base, models, mode="hidden")
    client, name = server.client(), bucket.removeprefix("s3://")
    for number, model in enumerate((base, *models)):
        for path in model.iterdir():
            client.put_object(Bucket=name, Key=f"m{number}/{path.name}", Body=path.read_bytes())
    urls = [f"{bucket}/m{number}" for number in range(4)]
    config |= {"base_model": urls[0]}
    config["experts"] = [{**entry, "source_model": url} for entry, url in zip(config["experts"], urls[1:], strict=True)]
    from tests.runtime.in_process import in_this_process

    with in_this_process():
        raymoe.merge({**config, "experts": config["experts"][:2]}, f"{bucket}/old")
        raymoe.merge({**config, "experts": config["experts"][1:]}, f"{bucket}/expected")
    changes: dict[str, Any] = {"add": [config["experts"][2]], "remove": [0]}
    with monkeypatch.context() as patch:
        patch.setattr(coordinator, "_write_small_files", stop)
        with pytest.raises(KeyboardInterrupt):
            edit_here(f"{bucket}/old", f"{bucket}/new", **changes)
    result = edit_here(f"{bucket}/old", f"{bucket}/new", **changes)
    assert result.bytes_kept > 0
    same_weights(*(download(server, bucket, prefix, tmp_path / prefix) for prefix in ("new", "expected")))
    kept = edit_here(f"{bucket}/old", f"{bucket}/kept", replace={0: config["experts"][2]}, keep_routers=True)
    # A part of an upload has 5 MiB or more, so the first 5 MiB of each shard are sent with its header.
    sent = sum(file.size for file in kept.files) - kept.bytes_copied_by_store
    assert sent < 2 * 5 * 2**20 + 500_000, f"{sent:,} bytes were sent"
