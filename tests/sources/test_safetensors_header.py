"""Header checks against the safetensors library itself: what it wrote, and what it accepts."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save

from raymoe.errors import CheckpointError
from raymoe.sources.dtypes import DTYPE_BYTES, dtype_code, tensor_nbytes
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.safetensors_header import PREFIX_BYTES, parse_header


def parse(data: bytes) -> tuple[TensorEntry, ...]:
    return parse_header(lambda start, end: data[start:end], SourceFile(location="/x/f.safetensors", size=len(data)))


def build(header: object, data: bytes = b"", raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load
    from safetensors.torch import save as save_torch

    dtypes = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    dtypes += [torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2]
    written = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    written |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    data = save_torch(written, metadata={"format": "pt"})
    entries = {entry.name: entry for entry in parse(data)}
    assert entries.keys() == written.keys()
    for name, expected in load(data).items():
        entry = entries[name]
        assert entry.shape == tuple(expected.shape)
        assert data[entry.start : entry.end] == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert entry.nbytes == expected.numel() * DTYPE_BYTES[entry.dtype]


def test_a_long_header_takes_a_second_read() -> None:
    data = save({f"layer.{i:05d}.weight": np.zeros(1, "float32") for i in range(2000)})
    reads: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        reads.append((start, end))
        return data[start:end]

    assert len(parse_header(read, SourceFile(location="/f", size=len(data)))) == 2000
    assert reads == [(0, PREFIX_BYTES), (PREFIX_BYTES, 8 + int.from_bytes(data[:8], "little"))]


def test_an_equal_header_of_another_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tunes of one model have equal headers. The tensors are those of the file that was asked for."""
    data = build({"a": tensor(), "b": tensor(offsets=(8, 16))}, bytes(16))
    files = [SourceFile(location=f"/model-{number}/f.safetensors", size=len(data)) for number in range(2)]
    one = parse_header(lambda start, end: data[start:end], files[0])
    monkeypatch.setattr("raymoe.sources.safetensors_header._decode", lambda *_: pytest.fail("parsed again"))
    two = parse_header(lambda start, end: data[start:end], files[1])
    assert [entry.file for entry in (*one, *two)] == [files[0]] * 2 + [files[1]] * 2
    assert two == tuple(replace(entry, file=files[1]) for entry in one)


def test_an_equal_header_of_a_truncated_file_is_refused() -> None:
    data = build({"a": tensor(), "c": tensor(offsets=(8, 16))}, bytes(16))
    assert len(parse(data)) == 2
    with pytest.raises(CheckpointError, match="truncated"):
        parse(data[:-8])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, too few for a safetensors file"),
        (b"1234567", "has 7 bytes, too few"),
        ((50).to_bytes(8, "little") + b"{}", "should end at byte 58, but the file has only 10"),
        ((2**63).to_bytes(8, "little") + b"{}", r"header length 9223372036854775808 is over the format's"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*\n.*git lfs pull"),
        (build(None, raw=b'{"a":'), "the header is not valid JSON"),
        (build(None, raw=b'{"a":"\xff"}'), "the header is not valid JSON"),
        (build(None, raw=b'{"a":' + b"[" * 100_000), "the header is not valid JSON|is not a JSON object"),
        (build(None, raw=b"[1, 2]"), "the header is not a JSON object"),
        (build(None, raw=b'{"a":1,"a":2}'), "key 'a' occurs twice"),
        (build({"a": tensor() | {"dtype": "F33"}}, b"8" * 8), "tensor 'a': unknown dtype 'F33'; known: BOOL"),
        (build({"a": tensor(None)}, b"8" * 8), "tensor 'a': unknown dtype None"),
        (build({"a": 3}), "tensor 'a': expected an object"),
        (build({"": tensor()}, b"8" * 8), "tensor name '' is empty"),
        (build({"\ud800": tensor()}, b"8" * 8), "unprintable"),
        (build({"a": tensor(shape=[-2])}, b"8" * 8), r"tensor 'a': shape \[-2\] is not a list of sizes"),
        (build({"a": tensor(shape=[True])}, b"8" * 8), "tensor 'a': shape"),
        (build({"a": tensor(shape=2)}, b"8" * 8), "tensor 'a': shape 2"),
        (build({"a": tensor(shape=[3])}, b"8" * 8), r"data_offsets span 8 bytes, but F32 \[3\] takes 12"),
        (build({"a": tensor("F4", [3], [0, 1])}, b"8"), r"span 1 bytes, but F4 \[3\] takes"),
        (build({"a": tensor(offsets=[8, 0])}, b"8" * 8), "span -8 bytes"),
        (build({"a": tensor(offsets=[0])}, b"8" * 8), "are not two offsets"),
        (build({"a": tensor(offsets=[-8, 0])}, b"8" * 8), "are not two offsets"),
        (build({"a": tensor()}, b"8" * 7), r"describes a file of \d+ bytes, but it has \d+ \(truncated\)"),
        (build({"a": tensor()}, b"8" * 9), "1 bytes are left over at the end"),
        (build({}, b"8"), "1 bytes are left over at the end"),
        (build({"a": tensor(), "b": tensor(offsets=[4, 12])}, b"8" * 12), "'b' .* overlaps tensor 'a'"),
        (
            build({"a": tensor(), "b": tensor(offsets=[12, 20])}, b"8" * 20),
            "'b' .* leaves a gap after tensor 'a'",
        ),
        (build({"a": tensor(offsets=[4, 12])}, b"8" * 12), "'a' .* leaves a gap after the header"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(data)
    assert all(problem.where == "/x/f.safetensors" and problem.remedy for problem in caught.value.problems)


def test_several_problems_at_once_but_not_thousands() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(build({f"t{i}": tensor("F99") for i in range(100)}))
    assert len(caught.value.problems) == 6
    assert re.search("and 95 more problems", str(caught.value))


def test_zero_size_tensors_are_fine() -> None:
    header = {
        "a": tensor(shape=[0, 5], offsets=[0, 0]),
        "b": tensor(),
        "c": tensor(shape=[0], offsets=[8, 8]),
    }
    entries = parse(build(header, b"8" * 8))
    assert [(entry.name, entry.nbytes) for entry in entries] == [("a", 0), ("b", 8), ("c", 0)]


@pytest.mark.parametrize(("seed", "times"), [(0, 600), pytest.param(1, 3400, marks=pytest.mark.slow)])
def test_damaged_headers_never_raise_anything_else(tmp_path: Path, seed: int, times: int) -> None:
    """Whatever is flipped or cut: an error of ours, or what the safetensors library reads as well."""
    data = save(
        {
            "a.w": np.arange(6, dtype="float32").reshape(2, 3),
            "b": np.zeros(3, "int8"),
            "e": np.zeros((0, 2), "f4"),
        }
    )
    header_end = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(seed)
    parsed = 0
    for _ in range(times):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(header_end)] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del broken[rng.randrange(len(broken)) :]
        try:
            entries = parse(bytes(broken))
        except CheckpointError:
            continue
        parsed += 1
        theirs = dict(deserialize(bytes(broken)))
        assert {entry.name: list(entry.shape) for entry in entries} == {n: t["shape"] for n, t in theirs.items()}
        for entry in entries:
            assert bytes(broken[entry.start : entry.end]) == bytes(theirs[entry.name]["data"])
    assert 0 < parsed < times  # renamed tensors parse, most damage does not


def test_dtype_names() -> None:
    assert [dtype_code(n) for n in ("bfloat16", "torch.float16", "bf16", "F32", "half")] == [
        "BF16",
        "F16",
        "BF16",
        "F32",
        "F16",
    ]
    with pytest.raises(ValueError, match="unknown dtype 'float12'; known: bfloat16, float16"):
        dtype_code("float12")
    assert tensor_nbytes("BF16", (2, 3)) == 12
    assert tensor_nbytes("F4", (3,)) is None


def test_dimensions_and_names_that_are_too_many() -> None:
    assert parse(build({"w" * 1000: tensor(shape=[1] * 15 + [2])}, b"\0" * 8))[0].name == "w" * 1000
    for header, words in (
        ({"w": tensor(shape=[2**62] * 40_000)}, "has 40000 dimensions \\(at most 16\\)"),
        ({"w" * 1001: tensor()}, "has 1001 characters \\(at most 1000\\)"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            parse(build(header, b"\0" * 8))
        assert len(str(caught.value)) < 500


def test_problems_of_many_tensors_are_counted() -> None:
    with pytest.raises(CheckpointError, match="and 35 more problems of this kind") as caught:
        parse(build({f"t{number}": 0 for number in range(40)}))
    assert len(caught.value.problems) == 6
