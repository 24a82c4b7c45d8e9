"""An expert of a mixture in a bucket: read by range, and copied by the store where it is written to the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load

import raymoe
from tests.object_store.servers import Server
from tests.pico import merge_config, merge_without_ray, tensors_of
from tests.runtime.in_process import in_this_process


def _upload(server: Server, bucket: str, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        server.client().put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())


def _download(server: Server, bucket: str, prefix: str) -> dict[str, bytes]:
    client = server.client()
    names = [each["Key"] for each in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")["Contents"]]
    return {name.rpartition("/")[2]: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}


def test_an_expert_is_copied_by_the_store(
    server: Server, bucket: str, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    """Gate and up of an expert are one range of the tensor with all experts of a layer: 12 MiB here, which an upload
    copies as parts. The 6 MiB of down lie between smaller tensors, and are sent with them."""
    name = bucket.removeprefix("s3://")
    models = [zoo("granite", seed=seed, intermediate_size=24576, num_hidden_layers=1) for seed in (0, 1)]
    config = merge_config(models[0], [models[1], models[0]], mode="random", architecture="granitemoe")
    merge_without_ray(config, tmp_path / "mixture")
    _upload(server, name, tmp_path / "mixture", "mixture")
    with in_this_process():
        result = raymoe.extract(f"{bucket}/mixture", 0, f"{bucket}/expert")
        again = raymoe.extract(f"{bucket}/mixture", 0, f"{bucket}/expert")
    assert again.was_complete
    files = _download(server, name, "expert")
    written = {
        key: tensor
        for file, data in files.items()
        if file.endswith(".safetensors")
        for key, tensor in load(data).items()
    }
    base, expert = tensors_of(models[0]), tensors_of(models[1])
    assert written.keys() == base.keys()
    assert all(torch.equal(written[key], (expert if ".mlp." in key else base)[key]) for key in written)
    assert json.loads(files["raymoe.json"])["extracted"] == f"{bucket}/mixture#0"
    share = result.bytes_copied_by_store / sum(len(data) for data in files.values())
    assert share > 0.6, f"{share:.0%} of the bytes were copied by the store"


def test_experts_in_a_bucket_are_merged(server: Server, bucket: str, zoo: Callable[..., Path], tmp_path: Path) -> None:
    models = [zoo("llama", seed=seed) for seed in range(3)]
    merge_without_ray(merge_config(models[0], models[1:], mode="random"), tmp_path / "mixture")
    _upload(server, bucket.removeprefix("s3://"), tmp_path / "mixture", "mixture")
    url = f"{bucket}/mixture"
    merge_without_ray(
        merge_config(Path(tmp_path / "mixture"), [f"{url}#0", f"{url}#1"], mode="random"), tmp_path / "new"
    )
    before, after = tensors_of(tmp_path / "mixture"), tensors_of(tmp_path / "new")
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
