"""The tables of docs/scale.md, and the shapes that they are of."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from scale_page import MARK, PAGE, TABLES, bound, copy_table, extrapolation_table, update_page  # noqa: E402
from simulated_objects import Audit, Object, Part, model_objects  # noqa: E402
from sparse_models import MIXTURES, Mixture, body_bytes, source_of  # noqa: E402


def entry(nodes: int, shards_s: float, **changes: Any) -> dict[str, Any]:
    phases = {"plan": 1.0, "start of Ray": 2.0, "start of actors": 3.0, "shards": shards_s, "end": 1.0}
    return {
        "shape": "l70x8",
        "nodes": nodes,
        "cpus_per_node": 2,
        "pace": 1.0,
        "set": {"max_requests": 16},
        "shard_size": "5GB",
        "machine_processors": 2,
        "experts": 8,
        "source_tensors": 5784,
        "source_bytes": 1_129_000_000_000,
        "source_file_sizes": [5_000_000_000] * 28,
        "output_tensors": 2483,
        "output_bytes": 1_000_000_000_000,
        "seconds": 7.0 + shards_s,
        "phases": phases,
        "ideal_shards_s": 30.0,
        "times_ideal": round(shards_s / 30.0, 2),
        "copies": 1500,
        "mean_copies_in_flight": 15.0,
        "most_copies_in_flight": 16,
        "requests": 9000,
        "requests_per_gb": 9.0,
        "most_requests_a_second": 500,
        "by_object": {"UploadPartCopy output: weights": 1500},
        "bytes": {"read": 1_000_000_000},
        "driver_bytes": 200_000_000,
        "actor_bytes": [150_000_000, 160_000_000],
        "processors": {"driver": 0.2, "actors": 0.3, "store": 0.2},
        "audit": {"shards": 190},
        **changes,
    }


def test_the_tables_stand_between_the_marks_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    shutil.copy(PAGE, page)
    killed = {"killed_at": 0.5, "first_copy_s": 6.0, "copies_repeated": 4, "requests_repeated": 0.021, "seconds": 60.0}
    entries = [entry(3, 40.0), entry(1, 100.0, killed={**killed, "driver_bytes": 190_000_000})]
    for _ in range(2):
        update_page(entries, page)
    text = page.read_text()
    assert all(text.count(MARK.format(name)) == 2 for name in TABLES)
    assert "| 50% | 6.0 | 4 of 1,500 | 2.1% | 60.0 | 190 MB |" in text
    assert json.dumps(text).count("| l70x8 | 1,000 GB | 3 |") == 3


def test_more_nodes_shorten_what_they_can() -> None:
    """100 s on one node and 40 s on three: 10 s remain and 90 s are shared, per TB."""
    row = extrapolation_table([entry(1, 100.0), entry(3, 40.0)]).splitlines()[-1]
    assert "| 1 and 3 | 10.0 | 90.0 | 190 | 79 |" in row
    assert "| 0.40 |" in copy_table([entry(1, 100.0), entry(3, 40.0)])
    assert len(extrapolation_table([entry(1, 100.0), entry(3, 40.0, set={})]).splitlines()) == 2


def test_what_bounds_the_shards() -> None:
    assert bound(entry(1, 100.0)) == "copies in flight"
    assert bound(entry(1, 100.0, mean_copies_in_flight=6.0)) == "requests between copies"
    assert bound(entry(1, 100.0, processors={"driver": 0.9})) == "the driver's processor"
    assert bound(entry(1, 100.0, processors={"driver": 0.9, "actors": 1.0})) == "this machine's processors"


def test_the_mixtures_have_the_sizes_that_they_stand_for() -> None:
    assert round(MIXTURES["l70x8"].output_bytes / 1e9) == 930
    assert round(MIXTURES["l70x80"].output_bytes / 1e12) == 9
    assert MIXTURES["x1024"].source_tensors > 200_000
    assert MIXTURES["x1024"].experts == 1024


def test_a_body_is_of_its_file_and_place() -> None:
    whole = body_bytes(7, 0, 64)
    assert body_bytes(7, 13, 40) == whole[13:40]
    assert body_bytes(8, 0, 64) != whole and len({whole[i : i + 8] for i in range(0, 64, 8)}) == 8
    assert source_of("model.layers.2.block_sparse_moe.experts.3.w2.weight") == (
        3,
        "model.layers.2.mlp.down_proj.weight",
    )
    assert source_of("model.layers.2.block_sparse_moe.gate.weight") is None
    assert source_of("model.norm.weight") == (0, "model.norm.weight")


def audit(mixture: Mixture, shard: Object, objects: dict[str, Object]) -> list[str]:
    found = Audit(mixture, {**objects, shard.name: shard}, "models")
    found.check("out")
    return [problem for problem in found.problems if shard.name in problem and "is not there" not in problem]


def test_the_audit_finds_a_copy_of_another_place() -> None:
    mixture = MIXTURES["tiny"]
    objects = {each.name: each for each in model_objects(mixture, "models")}
    name, dims = "model.layers.1.block_sparse_moe.experts.2.w3.weight", mixture.output_shapes
    size = 2 * dims[name][0] * dims[name][1]
    file = next(file for file in mixture.files if file.name.endswith(".safetensors"))
    places = json.loads(file.head[8:])
    source = objects[f"models/2/{file.name}"]
    at = len(file.head) + places["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    text = json.dumps({name: {"dtype": "BF16", "shape": dims[name], "data_offsets": [0, size]}}).encode()
    head = len(text).to_bytes(8, "little") + text

    def shard(source: Object, at: int) -> Object:
        header = Part(size=len(head), etag=_md5(head), head=head)
        return Object("out/model.safetensors", "", [header, Part(size=size, etag="", source=source, at=at)])

    def sent(source: Object) -> Object:
        data = head + source.read(at, at + size)
        return Object("out/model.safetensors", "", [Part(size=len(data), etag=_md5(data), head=head)])

    assert audit(mixture, shard(source, at), objects) == []
    assert "are copied from another place" in audit(mixture, shard(source, at + 8), objects)[0]
    other = objects[f"models/1/{file.name}"]
    assert "are copied from another place" in audit(mixture, shard(other, at), objects)[0]
    assert audit(mixture, sent(source), objects) == []
    assert "that were sent from 0 on are others" in audit(mixture, sent(other), objects)[0]


def _md5(data: bytes) -> str:
    from simulated_objects import md5

    return md5(data)
