"""Prompts from files: which are drawn, from every format and place, and what is said of files that are wrong."""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.server
import io
import json
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from raymoe.config import MergeConfig, PromptFile
from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.errors import ObjectChanged
from raymoe.object_store.object_file import ObjectFile
from raymoe.object_store.registry import open_store
from raymoe.sources.prompt_sampling import read_prompts, sample_prompts
from tests.http_server import HttpServer

TEXTS = [f"prompt {number} é\U0001f600" for number in range(1000)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_txt(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def as_jsonl(texts: Sequence[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def as_parquet(texts: Sequence[str | None], *, row_group: int = 100, plain: bool = False, **options: Any) -> bytes:
    out = io.BytesIO()
    columns = {"id": list(range(len(texts))), "text": pyarrow.array(texts, **options)}
    parquet.write_table(
        pyarrow.table(columns), out, row_group_size=row_group, **({"compression": "none"} if plain else {})
    )
    return out.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.txt": lambda: as_txt(TEXTS),
    "a.TXT": lambda: b"\xef\xbb\xbf" + as_txt([*TEXTS[:3], "", " \t", *TEXTS[3:]]).replace(b"\n", b"\r\n").rstrip(),
    "a.txt.gz": lambda: gzip.compress(as_txt(TEXTS[:500])) + gzip.compress(as_txt(TEXTS[500:])),
    "a.jsonl": lambda: as_jsonl(TEXTS),
    "a.ndjson": lambda: b'{"text": null}\n\n' + as_jsonl(TEXTS) + b' {"text": "\\n "}',
    "a.jsonl.gz": lambda: gzip.compress(as_jsonl(TEXTS)),
    "a.parquet": lambda: as_parquet(TEXTS),
    "nulls.parquet": lambda: as_parquet([None, *TEXTS[:300], "", *TEXTS[300:], None]),
    "dictionary nulls.parquet": lambda: as_parquet(
        [None, *TEXTS], type=pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    ),
    "large.parquet": lambda: as_parquet(TEXTS, type=pyarrow.large_string()),
    "dictionary.parquet": lambda: as_parquet(TEXTS, type=pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
}


def config_of(*prompts: Any, **keys: Any) -> MergeConfig:
    experts = [{"source_model": f"m{number}", "positive_prompts": each} for number, each in enumerate(prompts)]
    return MergeConfig.model_validate({"base_model": "b", "experts": experts, **keys})


def drawn(file: str, **keys: Any) -> tuple[str, ...]:
    config = read_prompts(config_of({"file": file, **keys}, ["another"]))
    assert isinstance(config.experts[0].positive_prompts, tuple)
    return config.experts[0].positive_prompts


def problems(*prompts: Any) -> list[Problem]:
    with pytest.raises(ProblemReport) as caught:
        read_prompts(config_of(*prompts))
    return list(caught.value.problems)


# --- what is drawn


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_prompts(name: str, here: Path) -> None:
    (here / name).write_bytes(FILES[name]())
    assert drawn(name, limit=None) == tuple(TEXTS)
    some = drawn(name)
    assert some == sample_prompts(TEXTS, 256, 0)
    assert len(some) == 256


def test_which_prompts_are_drawn_is_fixed() -> None:
    """These numbers are part of the format: a config gives the same router with every version and on every machine."""
    numbers = [str(number) for number in range(1000)]
    assert sample_prompts(numbers, 8, 0) == ("62", "405", "765", "856", "875", "897", "904", "913")
    assert sample_prompts(numbers, 8, 1) == ("30", "85", "377", "696", "835", "840", "949", "983")
    assert sample_prompts(iter(numbers), 1000, 5) == sample_prompts(numbers, None, 0) == tuple(numbers)
    assert sample_prompts(numbers[:5], 8, 0) == tuple(numbers[:5])
    assert set(sample_prompts(numbers, 8, 0)) < set(sample_prompts(numbers, 100, 0))
    # Equal texts are drawn as often as they are met.
    assert sample_prompts(["same"] * 10, 4, 0) == ("same",) * 4


def test_draws_are_spread_evenly() -> None:
    """1000 draws of 10 of 100: each number some 100 times; the standard deviation is about 9.5."""
    counts = [0] * 100
    for seed in range(1000):
        for text in sample_prompts([str(number) for number in range(100)], 10, seed):
            counts[int(text)] += 1
    assert 55 < min(counts) <= max(counts) < 145
    assert sum(counts) == 10_000


def test_the_config_but_for_its_files_is_kept(here: Path) -> None:
    (here / "a.jsonl").write_bytes(as_jsonl(TEXTS, "q"))
    file = {"file": "a.jsonl", "field": "q", "limit": 2}
    config = config_of(file, ["mine"], dtype="float16")
    config = config.model_copy(
        update={"shared_experts": (config.experts[1].model_copy(update={"negative_prompts": PromptFile(**file)}),)}
    )
    texts = sample_prompts(TEXTS, 2, 0)
    concrete = read_prompts(config)
    assert [e.positive_prompts for e in concrete.experts] == [texts, ("mine",)]
    assert concrete.shared_experts[0].negative_prompts == texts
    assert (concrete.dtype, concrete.prompt_files) == ("float16", {})
    unread = config_of({"file": "none.txt"}, {"file": "none.txt"}, gate_mode="random")
    assert read_prompts(unread) == unread


def test_equal_texts_of_different_files_are_found(here: Path) -> None:
    (here / "a.txt").write_bytes(as_txt(TEXTS[:9]))
    (here / "b.jsonl").write_bytes(as_jsonl(TEXTS[:9]))
    (problem,) = problems({"file": "a.txt"}, {"file": "b.jsonl"}, TEXTS[:9])
    assert problem.where == "experts"
    assert problem.what.startswith("all 3 experts have the same prompts")
    assert len(read_prompts(config_of({"file": "a.txt"}, {"file": "b.jsonl", "limit": 8})).experts) == 2


def test_places(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the working directory, in the home folder, absolute, and file://."""
    (here / "deep").mkdir()
    (here / "deep/a.txt").write_text("one\n")
    monkeypatch.setenv("HOME", str(here))
    for file in (
        "deep/a.txt",
        "./deep/../deep/a.txt",
        "~/deep/a.txt",
        f"{here}/deep/a.txt",
        f"file://{here}/deep/a.txt",
    ):
        assert drawn(file) == ("one",)
        named = PromptFile(file=file)
        assert named.absolute_name.removeprefix("file://") == named.location.text == f"{here}/deep/a.txt"
        assert named.location.kind.is_local and named.absolute_name.startswith("file://") == file.startswith("file://")


@pytest.mark.parametrize(
    "name",
    ["big.txt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("big.txt.gz", "big.jsonl", "big.parquet"))],
)
def test_memory_is_bounded(name: str, here: Path) -> None:
    """32 MB of prompts, of which 0.3 MB are drawn; in Parquet they are one row group."""
    texts = [f"{number} " + "x" * 2000 for number in range(16_000)]
    make = {"txt": as_txt, "jsonl": as_jsonl, "gz": lambda texts: gzip.compress(as_txt(texts), 1)}
    make["parquet"] = functools.partial(as_parquet, row_group=len(texts), plain=True)
    (here / name).write_bytes(make[name.rpartition(".")[2]](texts))
    del texts
    drawn(name, limit=1)  # what is imported on the way does not count
    tracemalloc.start()
    usual = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(arrow := pyarrow.proxy_memory_pool(usual))
    try:
        assert len(drawn(name, limit=150)) == 150
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(usual)
    assert peak < 12_000_000
    assert arrow.max_memory() < 24_000_000
    assert bool(arrow.max_memory()) == name.endswith("parquet")


# --- a text of Parquet's dictionary stands for any number of rows


def repeated(path: Path, nbytes: int, rows: int, **options: Any) -> str:
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["a" * nbytes])
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "write_statistics": False} | options
    parquet.write_table(pyarrow.table({"text": column}), path, store_schema=False, **options)
    return path.name


def test_a_repeated_text_is_held_a_few_times(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 639 bytes took 2.2 GB."""
    name = repeated(here / "a.parquet", 4 * 2**20, 300)
    monkeypatch.setattr("raymoe.sources.prompt_reader._MIN_BYTE_LIMIT", 2**26)
    usual = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(arrow := pyarrow.proxy_memory_pool(usual))
    try:
        (problem,) = problems({"file": name})
    finally:
        pyarrow.set_memory_pool(usual)
    assert arrow.max_memory() < 160 * 2**20
    assert "its texts have more than 1000 times the bytes of the file" in problem.what


def test_a_repeated_text_is_one_object(here: Path) -> None:
    name = repeated(here / "a.parquet", 2**16, 300)
    found = drawn(name, limit=None)
    assert len(found) == 300 and len({id(text) for text in found}) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nbytes": 17 * 2**20}, "the text has more than 16 MiB"),
        ({"nbytes": 17 * 2**20, "use_dictionary": False, "compression": "snappy"}, "the text has more than 16 MiB"),
        ({"nbytes": 21 * 2**20}, "row group 0 has a dictionary of 22,020,100 bytes for 'text'"),
        ({"nbytes": 65 * 2**20}, "row group 0 has 68,157,4.. bytes of 'text' in .* compressed ones"),
    ],
)
def test_texts_and_pages_that_are_too_large(options: dict[str, Any], said: str, here: Path) -> None:
    name = repeated(here / "a.parquet", rows=1, **options)
    (problem,) = problems({"file": name})
    assert re.search(said, problem.what)


def test_rows_without_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"text": pyarrow.array([None] * 100_000, pyarrow.string())}), here / "a.parquet")
    assert (here / "a.parquet").stat().st_size < 1500
    monkeypatch.setattr("raymoe.sources.prompt_reader._MIN_BYTE_LIMIT", 2**20)
    (problem,) = problems({"file": "a.parquet"})
    assert "its texts have more than 1000 times the bytes of the file" in problem.what


# --- what is wrong with files

BAD_FILES: dict[str, tuple[bytes, list[tuple[str, str, str]]]] = {
    "no prompts.txt": (b"\n \r\n\t\n", [("", "there are no prompts in it, or only blank ones", "one prompt per line")]),
    "empty.jsonl": (b"", [("", "there are no prompts in it", "one prompt per line")]),
    "latin.txt": (b"ol\xc3\xa9\nol\xe9\n", [(":2", r"not UTF-8 text \(byte 0xe9\)", "save the file as UTF-8")]),
    "utf16.txt": ("a\n".encode("utf-16"), [(":1", r"not UTF-8 text", "UTF-8")]),
    "json.jsonl": (
        b'{"text": "ok"}\n{"text": "a" "b"}\n',
        [(":2", r"not valid JSON: Expecting ',' delimiter \(column 14\)", "one JSON object per line")],
    ),
    "list.jsonl": (b'["a"]\n"b"\n', [(":1", "a JSON object, got a list", '"text": "..."'), (":2", "got text", "")]),
    "field.jsonl": (
        b'{"prompt": "a", "txt": 1}\n',
        [(":1", "there is no key 'text'; keys here: prompt, txt$", r"did you mean field: txt\?")],
    ),
    "far field.jsonl": (b'{"zzz": "a"}\n{}\n', [(":1", "keys here: zzz", "set field to the key"), (":2", "none$", "")]),
    "value.jsonl": (
        b'{"text": 3}\n\n{"text": [{"role": "user"}]}\n{"text": true}\n',
        [(":1", "'text' is a number, not text", "as text"), (":3", "a list", ""), (":4", "a boolean", "")],
    ),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', [(":1", "not valid Unicode text", "lone surrogate")]),
    "deep.jsonl": (b"[" * 200_000 + b"\n", [(":1", "not a JSON value|not valid JSON", "one JSON object")]),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", [(":1", "not a JSON value|a number", "")]),
    "long.txt": (b"ok\n" + b"x" * (16 * 2**20 + 1), [(":2", "the line has more than 16 MiB", "one prompt per line")]),
    "plain.txt.gz": (b"not packed\n", [(":1", "the gzip data is damaged: Not a gzipped file", "make the file again")]),
    "cut.jsonl.gz": (gzip.compress(as_jsonl(TEXTS))[:-2000], [(r":\d+", "damaged: Compressed file ended", "again")]),
    "text.parquet": (b"PAR1 and no more", [("", "the Parquet file can't be read: .*not a parquet file", "again")]),
    "cut.parquet": (as_parquet(TEXTS)[:-30], [("", "the Parquet file can't be read", "again")]),
    "column.parquet": (
        as_parquet(["a"]).replace(b"text", b"tex_"),
        [("", "there is no column 'text'; columns here: id, tex_", r"did you mean field: tex_\?")],
    ),
    "numbers.parquet": (as_parquet([1, 2]), [("", "the column 'text' holds int64, not text", "a column of text")]),  # type: ignore[list-item]
    "lists.parquet": (as_parquet([["a"]]), [("", "holds list<", "a column of text")]),  # type: ignore[list-item]
    "nothing.parquet": (as_parquet([None, ""]), [("", "there are no prompts in it", "")]),
    "latin.parquet": (as_parquet(["a", "olXY"]).replace(b"olXY", b"ol\xe9!"), [(" row 2", "not UTF-8 text", "UTF-8")]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, here: Path) -> None:
    content, expected = BAD_FILES[name]
    (here / name).write_bytes(content)
    found = problems({"file": name}, ["x"])
    assert len(found) == len(expected)
    for problem, (at, what, remedy) in zip(found, expected, strict=True):
        assert re.fullmatch(rf"{re.escape(name)}{at}: experts\[0\]\.positive_prompts", problem.where)
        assert re.search(what, problem.what)
        assert re.search(remedy, problem.remedy)


def test_a_file_that_is_wrong_throughout_is_not_read_to_its_end(here: Path) -> None:
    (here / "a.jsonl").write_bytes(as_jsonl(TEXTS, "other"))
    found = problems({"file": "a.jsonl"}, ["x"])
    assert [p.where.partition(": ")[0] for p in found] == [f"a.jsonl:{n}" for n in range(1, 6)]
    assert str(ProblemReport(found)).splitlines() == [
        "a.jsonl:1-5: experts[0].positive_prompts: there is no key 'text'; keys here: id, other",
        "    -> set field to the key that holds the prompt",
    ]
    (here / "a.jsonl").write_text("{}\n[]\n{}\n1\n{}\n{}\n")
    found = problems({"file": "a.jsonl"}, ["x"])
    assert (len(found), found[-1].what) == (6, "stopped reading after 5 problems")


def test_all_files_are_told_of_at_once(here: Path) -> None:
    (here / "bad.jsonl").write_text("{}\n{}\n")
    (here / "folder.txt").mkdir()
    found = problems(
        {"file": "bad.jsonl", "field": "q"},
        {"file": "none.txt"},
        {"file": "folder.txt"},
        {"file": "bad.jsonl", "field": "q"},  # the same again is not told again
        {"file": "file:///none/a.txt"},
    )
    assert [problem.where for problem in found] == [
        "bad.jsonl:1: experts[0].positive_prompts",
        "bad.jsonl:2: experts[0].positive_prompts",
        "none.txt: experts[1].positive_prompts",
        "folder.txt: experts[2].positive_prompts",
        "file:///none/a.txt: experts[4].positive_prompts",
    ]
    assert found[2].what == f"there is no file {here}/none.txt here"
    assert found[2].remedy == "correct the path; it is relative to the working directory"
    assert found[3].what == "this is a folder, not a file"


@pytest.mark.processes
def test_without_pyarrow(here: Path) -> None:
    (here / "a.parquet").write_bytes(FILES["a.parquet"]())
    script = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from raymoe.config import MergeConfig; from raymoe.sources.prompt_sampling import read_prompts\n"
        "experts = [{'source_model': 'a', 'positive_prompts': {'file': 'a.parquet'}}]\n"
        "read_prompts(MergeConfig.model_validate({'base_model': 'b', 'experts': experts}))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert "reading Parquet needs pyarrow, which is not installed\n    -> pip install 'pyarrow>=" in done.stderr


# --- object stores and servers


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "nulls.parquet"])
def test_from_a_bucket(name: str, bucket: str) -> None:
    open_store(bucket).put(f"{bucket}/prompts/{name}", FILES[name]())
    assert drawn(f"{bucket}/prompts/{name}") == sample_prompts(TEXTS, 256, 0)


def test_of_a_column_in_a_bucket_only_that_is_read(bucket: str) -> None:
    out = io.BytesIO()
    other = [number.to_bytes(4, "big") * 5000 for number in range(1000)]
    parquet.write_table(pyarrow.table({"blob": other, "text": TEXTS}), out, compression="none", use_dictionary=False)
    assert out.tell() > 18_000_000
    store, url = open_store(bucket), f"{bucket}/a.parquet"
    store.put(url, out.getvalue())
    before = store.counters.bytes_read
    assert drawn(url, limit=None) == tuple(TEXTS)
    assert store.counters.bytes_read - before < 5_000_000


def test_problems_in_a_bucket(bucket: str) -> None:
    url = f"{bucket}/a.jsonl"
    open_store(bucket).put(url, b'{"q": 1}')
    missing, field, no_bucket = problems(
        {"file": f"{bucket}/none.txt"}, {"file": url}, {"file": "s3://no-such-1/a.txt"}
    )
    assert (missing.where, missing.what) == (
        f"{bucket}/none.txt: experts[0].positive_prompts",
        "there is no such object",
    )
    assert field.where == f"{url}:1: experts[1].positive_prompts"
    assert no_bucket.where == "s3://no-such-1/a.txt: experts[2].positive_prompts"
    assert no_bucket.remedy


def test_an_object_that_changes_while_it_is_read(bucket: str) -> None:
    store, url = open_store(bucket), f"{bucket}/a.txt"
    store.put(url, b"first\nmore\n")
    stream = ObjectFile(url)
    assert (stream.read(6), stream.seek(-5, io.SEEK_END), stream.tell()) == (b"first\n", 6, 6)
    assert (stream.read(), stream.read(1), stream.seek(1), stream.seek(1, io.SEEK_CUR)) == (b"more\n", b"", 1, 2)
    store.put(url, b"other\nwords\n")
    with pytest.raises(ObjectChanged, match="no longer what the merge was planned with"):
        stream.read()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with HttpServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(60)


@pytest.mark.processes
def test_from_a_web_server(here: Path) -> None:
    (here / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    with served(here) as url:
        assert drawn(f"{url}/a.jsonl") == sample_prompts(TEXTS, 256, 0)
        (problem,) = problems({"file": f"{url}/none.txt"}, ["x"])
        assert (problem.where, problem.what) == (
            f"{url}/none.txt: experts[0].positive_prompts",
            "there is no such object",
        )
