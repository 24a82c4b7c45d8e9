"""`.bin` files: where their tensors lie, and that nothing in them can run."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from raymoe.errors import CheckpointError
from raymoe.sources.facts import SourceFile, TensorEntry
from raymoe.sources.local_folder import LocalFolder
from raymoe.sources.torch_pickle import parse_pickled
from raymoe.sources.weight_index import index_model_weights
from tests.sources.checkpoints import write_json

torch = pytest.importorskip("torch")


def parse(path: Path) -> dict[str, TensorEntry]:
    entries = parse_pickled(path, SourceFile(location=str(path), size=path.stat().st_size))
    return {entry.name: entry for entry in entries}


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(path)
    assert all(problem.where == str(path) for problem in caught.value.problems)
    assert all(problem.remedy for problem in caught.value.problems[:5])
    return str(caught.value)


def state_dict() -> dict[str, Any]:
    big = torch.arange(40, dtype=torch.float32)
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8]
    dtypes += [torch.uint8, torch.bool]
    return {
        **{f"t.{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes},
        "view": big[7:19].reshape(3, 4),  # a part of a storage
        "tied": big[7:19].reshape(3, 4),
        "whole": big,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "one": torch.arange(6.0).reshape(2, 3).t()[:1, :1],  # strides of sizes 1 don't matter
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }


@pytest.mark.parametrize("as_module", [False, True])
def test_bytes_at_the_entries_are_the_tensors(tmp_path: Path, as_module: bool) -> None:
    # A module's state dict is an OrderedDict with an attribute, _metadata, which a pickle sets by itself.
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    written = module.state_dict() if as_module else state_dict()
    path = save(tmp_path / "m.bin", written)
    data, entries = path.read_bytes(), parse(path)
    assert list(entries) == list(written)
    for name, tensor in torch.load(path, weights_only=True).items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        expected = flat.view(torch.uint8).numpy().tobytes()
        assert data[entry.start : entry.end] == expected, name


def test_shards_and_index(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for index, name in enumerate(names):
        save(tmp_path / name, {f"t{index}": torch.ones(2)})
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": {"t0": names[0], "t1": names[1]}})
    index = index_model_weights(LocalFolder(str(tmp_path)))
    assert {name: entry.file.name for name, entry in index.tensors.items()} == {
        "t0": names[0],
        "t1": names[1],
    }


def test_safetensors_come_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save(tmp_path / "pytorch_model.bin", {"a": torch.ones(2)})
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert index_model_weights(LocalFolder(str(tmp_path))).files[0].name == "model.safetensors"


@pytest.mark.processes
def test_torch_is_not_imported(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", state_dict())
    code = (
        "import sys; from pathlib import Path; from raymoe.sources.torch_pickle import parse_pickled as p; "
        "from raymoe.sources.facts import SourceFile; f = Path(sys.argv[1]); "
        "print(len(p(f, SourceFile(location=str(f), size=f.stat().st_size))), 'torch' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(state_dict())), "False"]


class _Payload:
    def __init__(self, function: Any, *args: Any):
        self._reduced = (function, args)

    def __reduce__(self) -> Any:
        return self._reduced


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "m.bin", {"a": torch.ones(2), "b": _Payload(os.mkdir, str(mark))})
    assert "the pickle asks for the name 'posix.mkdir', which a plain state dict does not need" in refusal(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the payload is a real one: it acts where it is let
    assert mark.exists()


@pytest.mark.parametrize("function", [eval, getattr, torch.load, OrderedDict.fromkeys, io.open])
def test_other_names_are_refused(tmp_path: Path, function: Any) -> None:
    assert "the pickle asks for the name" in refusal(save(tmp_path / "m.bin", {"b": _Payload(function, "1")}))


def archive(path: Path, pickled: bytes, *, compress: bool = False, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as handle:
        handle.writestr("m/data.pkl", pickled)
        for name, data in records.items():
            handle.writestr(f"m/{name.replace('__', '/')}", data)
    return path


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        # setting attributes of the stand-ins, or of a type
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NtX\x01\x00\x00\x00a}tb.", "the pickle"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "the pickle"),
        (b"ccollections\nOrderedDict\n(N}X\x08\x00\x00\x00__init__K\x01stb.", "the pickle asks for an attribute"),
        # a memo index that would take gigabytes
        (b"Nr\xff\xff\xff\x7f.", "the pickle is damaged .*memo"),
        (b"", "the pickle is damaged"),
        (b"garbage", "the pickle is damaged"),
        (b"X\x03\x00\x00\x00abcQ.", "the pickle asks for the storage 'abc'"),
        (pickle.dumps([1, 2]), "holds a list where a state dict"),
        (pickle.dumps({"a": 1}), "'a' is a int, not a tensor"),
        (pickle.dumps({"model": {"a": 1}}), "'model' is a dict, not a tensor"),
        (pickle.dumps({1: 1}), "the name 1 is not the name of a tensor"),
    ],
)
def test_hand_made_pickles(tmp_path: Path, pickled: bytes, message: str) -> None:
    text = refusal(archive(tmp_path / "m.bin", pickled))
    assert all(part in text for part in message.split(".*"))


def test_archives_that_are_no_state_dict(tmp_path: Path) -> None:
    empty = pickle.dumps({})
    assert "the tensors are big-endian" in refusal(archive(tmp_path / "a", empty, byteorder=b"big"))
    assert "a TorchScript program" in refusal(archive(tmp_path / "b", empty, **{"constants.pkl": b""}))
    with zipfile.ZipFile(tmp_path / "c", "w") as handle:
        handle.writestr("readme.txt", "hello")
    assert "not one that torch.save wrote" in refusal(tmp_path / "c")


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    legacy = save(tmp_path / "legacy.bin", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert "not in the zip format of torch.save (a legacy file" in refusal(legacy)
    (tmp_path / "lfs.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refusal(tmp_path / "lfs.bin")
    assert "not contiguous: shape (3, 2), strides (1, 3)" in refusal(
        save(tmp_path / "strided.bin", {"a": torch.arange(6.0).reshape(2, 3).t()})
    )
    assert "the pickle asks for the name 'torch." in refusal(
        save(tmp_path / "c.bin", {"a": torch.ones(2, dtype=torch.cfloat)})
    )
    assert "the pickle asks for the name" in refusal(
        save(tmp_path / "f8.bin", {"a": torch.ones(2).to(torch.float8_e4m3fn)})
    )


def test_compressed_storages(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"a": torch.ones(64)})
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "compressed or encrypted" in refusal(tmp_path / "z.bin")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated(tmp_path: Path, kept: float) -> None:
    path = save(tmp_path / "m.bin", state_dict())
    os.truncate(path, int(path.stat().st_size * kept))
    assert "truncated" in refusal(path) if kept else "not in the zip format" in refusal(path)


@pytest.mark.parametrize(("seed", "times"), [(0, 100), pytest.param(1, 500, marks=pytest.mark.slow)])
def test_damage_never_raises_anything_else(tmp_path: Path, seed: int, times: int) -> None:
    data = save(tmp_path / "m.bin", state_dict()).read_bytes()
    rng, broken_path, parsed = random.Random(seed), tmp_path / "broken.bin", 0
    with zipfile.ZipFile(tmp_path / "m.bin") as handle:
        pickle_end = handle.getinfo("m/data.pkl").header_offset + 64 + handle.getinfo("m/data.pkl").file_size
    for _ in range(times):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            # in the pickle and its zip header, or in the zip directory at the end
            at = rng.randrange(pickle_end) if rng.random() < 0.5 else rng.randrange(len(data) - 2000, len(data))
            broken[at] ^= 1 << rng.randrange(8)
        broken_path.write_bytes(broken)
        try:
            entries = parse(broken_path)
        except CheckpointError:
            continue
        parsed += 1
        assert all(0 <= entry.start <= entry.end <= len(data) for entry in entries.values())
    assert parsed < times


def doubled(levels: int, first: bytes, between: bytes = b"") -> bytes:
    """Operations that leave a tuple of two equal ones on the stack, as many levels deep."""
    noted = first + b"q\x00"
    for level in range(levels):
        noted += b"h" + bytes([level]) + b"\x86" + between + b"q" + bytes([level + 1])
    return noted


@pytest.mark.parametrize("between", [b"", b"(u", b"Nb"], ids=["plain", "hidden by SETITEMS", "hidden by BUILD"])
@pytest.mark.parametrize("end", [b"K\x01u.", b"Qu."], ids=["a key", "a storage"])
def test_tuples_that_double(tmp_path: Path, end: bytes, between: bytes) -> None:
    """To hash one of 60 levels, or to print it, takes 2 ** 60 steps."""
    first = b"X\x01\x00\x00\x00w" if end == b"Qu." else b""
    leaf = b"]" if end == b"Qu." else b"X\x01\x00\x00\x00b"
    pickled = b"\x80\x02}(" + first + doubled(60, leaf, between) + end
    assert "tuples that hold each other many times" in refusal(archive(tmp_path / "m.bin", pickled))


@pytest.mark.parametrize("level", [b"\x85", b"K\x01\x86", b"K\x01K\x02\x87", b"(u\x85", b"Nb\x85", b"q\x00\x85"])
def test_tuples_in_tuples(tmp_path: Path, level: bytes) -> None:
    """Hashing such a key took the whole stack of the process, which ended without a message."""
    pickled = b"\x80\x02})" + level * 200_000 + b"Ns."
    assert "tuples nested more than 64 deep" in refusal(archive(tmp_path / "m.bin", pickled))


def test_a_dictionary_with_attributes(tmp_path: Path) -> None:
    """As `_metadata` of a state dict; one that hides a method changes nothing."""
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}(" + b"X\x05\x00\x00\x00itemsK\x05X\x01\x00\x00\x00_Nub."
    assert parse(archive(tmp_path / "m.bin", pickled)) == {}


def test_a_few_shared_tuples_do_no_harm(tmp_path: Path) -> None:
    pickled = b"\x80\x02}(X\x01\x00\x00\x00a" + doubled(7, b"X\x01\x00\x00\x00b") + b"u."
    said = refusal(archive(tmp_path / "m.bin", pickled))
    assert "'a' is a tuple, not a tensor" in said
    assert len(said) < 1000


_LARGE = [number * (2**61 - 1) for number in range(1, 4)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (_LARGE, "an integer of 61 bits"),
        ([-number for number in _LARGE], "an integer of 61 bits"),
        ([number << 40 for number in range(1, 4)], "neither text nor small numbers"),
        ([2**20], "neither text nor small numbers"),
        ([0.5, 1.5], "neither text nor small numbers"),
        ([(1, 2), (2, 1)], "neither text nor small numbers"),
        ([("a",)], "neither text nor small numbers"),
        ([True, None], "neither text nor small numbers"),
        ([b"a"], "neither text nor small numbers"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_keys_whose_hashes_a_file_can_choose(tmp_path: Path, keys: list[Any], said: str, wrap: Any) -> None:
    """60,000 keys of one hash took minutes."""
    reason = f"a dictionary whose keys are {said}" if "neither" in said else said
    for pickled in (pickle.dumps(wrap.fromkeys(keys), 2), pickle.dumps({"a": wrap.fromkeys(keys)}, 2)):
        assert f"the pickle asks for {reason}" in refusal(archive(tmp_path / "m.bin", pickled))


@pytest.mark.parametrize(
    "operations",
    [
        b"}G" + b"\0" * 8 + b"Ns.",
        b"}(X\x01\0\0\0aNG" + b"\0" * 8 + b"Nu.",
        b"(G" + b"\0" * 8 + b"Nd.",
        b"}G" + b"\0" * 8 + b"q\x00h\x00Ns.",
        b"}I01\nNs.",
        b"}C\x01aNs.",
    ],
    ids=["SETITEM", "SETITEMS", "DICT", "from the memo", "a truth value", "bytes"],
)
def test_keys_by_every_operation(tmp_path: Path, operations: bytes) -> None:
    assert "keys are neither text nor small numbers" in refusal(archive(tmp_path / "m.bin", b"\x80\x03" + operations))


def test_a_dictionary_of_pairs(tmp_path: Path) -> None:
    """Their keys are filled in by Python, and not by operations."""
    pickled = b"\x80\x02ccollections\nOrderedDict\n](G" + b"\0" * 8 + b"N\x86e\x85R."
    assert "the pickle asks for an OrderedDict of pairs" in refusal(archive(tmp_path / "m.bin", pickled))


def test_a_training_checkpoint(tmp_path: Path) -> None:
    """Its optimizer has parameters by number, which is no reason to call the file dangerous."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = save(tmp_path / "m.bin", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 10**12})
    assert "'optimizer' is a dict, not a tensor" in refusal(path)


def test_records_that_are_larger_than_they_look(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.bin", pickle.dumps({}, 2), compress=True, byteorder=b"\0" * (16 << 20))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert "data.pkl or byteorder is compressed" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "compression",
    [
        zipfile.ZIP_DEFLATED,
        pytest.param(zipfile.ZIP_BZIP2, marks=pytest.mark.slow),
        pytest.param(zipfile.ZIP_LZMA, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["data.pkl", "byteorder"])
def test_compressed_records_whose_declared_size_is_false(tmp_path: Path, name: str, compression: int) -> None:
    """zipfile expands the whole of them: 12 MB here."""
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w") as file:
        for other in {"data.pkl", "byteorder"} - {name}:
            file.writestr(f"m/{other}", pickle.dumps({}, 2) if other == "data.pkl" else b"little")
        file.writestr(f"m/{name}", b"\0" * (12 << 20), compression)
        file.getinfo(f"m/{name}").file_size = 6
    tracemalloc.start()
    try:
        assert "data.pkl or byteorder is compressed" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_records_of_one_name(tmp_path: Path) -> None:
    """Readers differ in which of the two they take."""
    path = save(tmp_path / "m.bin", {"w": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr(next(name for name in file.namelist() if name.endswith("/data/0")), b"\0" * 8)
    assert "holds a record twice" in refusal(path)


@pytest.mark.parametrize(
    "operation", [b"2", b"(\x91", b"\x8f", b"0", b"(1"], ids=["DUP", "FROZENSET", "EMPTY_SET", "POP", "POP_MARK"]
)
def test_operations_that_no_state_dict_has(tmp_path: Path, operation: bytes) -> None:
    assert "the pickle asks for the operation" in refusal(archive(tmp_path / "m.bin", b"\x80\x04}" + operation + b"."))


def test_too_many_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.sources.torch_pickle._MAX_OPERATIONS", 1000)
    assert "more than 1,000 operations" in refusal(archive(tmp_path / "m.bin", b"\x80\x02" + b"]" * 1001 + b"}."))


def test_too_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.bin", state_dict())
    with zipfile.ZipFile(path) as file:
        size = sum(46 + len(info.filename) + len(info.extra) for info in file.infolist())
    monkeypatch.setattr("raymoe.sources.torch_pickle._MAX_DIRECTORY_BYTES", size)
    parse(path)
    monkeypatch.setattr("raymoe.sources.torch_pickle._MAX_DIRECTORY_BYTES", size - 1)
    assert "names too many records" in refusal(path)


def test_an_end_that_says_two_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zipfile does not look at the numbers of disks, which spell the beginning of another end here."""
    path = archive(tmp_path / "m.bin", pickle.dumps({}, 2), data__0=b"")
    data = path.read_bytes()
    path.write_bytes(data[:-18] + b"PK\5\6" + data[-14:])
    monkeypatch.setattr("raymoe.sources.torch_pickle._MAX_DIRECTORY_BYTES", 100)
    assert "names too many records" in refusal(path)


def one_tensor(dimensions: int, name: bytes = b"w") -> bytes:
    """The pickle of a tensor of shape (1, 1, ...)."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
    sizes = b"(" + b"K\x01" * dimensions + b"t"
    named = b"X" + len(name).to_bytes(4, "little") + name
    return b"\x80\x02}" + named + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + sizes * 2 + b"tRs."


def test_dimensions_and_names_that_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    assert parse(archive(path, one_tensor(16, b"w" * 1000), data__0=b"abcd"))["w" * 1000].shape == (1,) * 16
    assert "asks for a tensor of 17 dimensions" in refusal(archive(path, one_tensor(17), data__0=b"abcd"))
    said = refusal(archive(path, one_tensor(1, b"w" * 1001), data__0=b"abcd"))
    assert "has 1001 characters (at most 1000)" in said
    assert len(said) < 500


def test_problems_of_many_tensors_are_counted(tmp_path: Path) -> None:
    said = refusal(archive(tmp_path / "m.bin", pickle.dumps({f"t{n}": 1 for n in range(40)}, 2)))
    assert "'t4' is a int" in said
    assert "'t5'" not in said
    assert "and 35 more problems" in said


def test_values_that_are_not_the_bytes(tmp_path: Path) -> None:
    """A lazily negated view is stored as it was before, with a bit that says so."""
    negated = torch.imag(torch.complex(torch.ones(4), torch.ones(4)).conj())
    assert negated.is_neg()
    path = save(tmp_path / "x.bin", {"w": negated.clone()})
    assert parse(path)["w"].shape == (4,)  # resolved by the copy
    lazy = torch._neg_view(torch.ones(4))
    assert "tensor 'w' has torch's neg bit set" in refusal(save(tmp_path / "x.bin", {"w": lazy}))
