"""A password goes in by every option and variable that can hold one, and comes out nowhere.

Not in what commands say, not in the files that they write, not in Ray's (test_own_ray.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from raymoe.errors import MergeFailed, Problem, ProblemReport
from raymoe.safe_text import MAX_CHARACTERS, json_text, remember_secrets, scrub
from tests.cli.commands import files_below, raymoe, write_config

Cli = Callable[..., Any]
CANARY = "C4N4RYxPASSWORD"
# As a URL has to write it where it holds '@' and '/'.
QUOTED, UNQUOTED = "C4N4RY%40x%2FPASSWORD", "C4N4RY@x/PASSWORD"
TOLD = ("C4N4RY", "PASSWORD")
NOBODY = f"http://user:{CANARY}@127.0.0.1:1"

VARIABLES = {
    "AWS_ACCESS_KEY_ID": f"AK{CANARY}",
    "AWS_SECRET_ACCESS_KEY": f"a+{CANARY}/x@y//z",
    "AWS_SESSION_TOKEN": f"{CANARY}//==",
    "AWS_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://user:{QUOTED}@127.0.0.1:1",
    "HF_TOKEN": f"hf_{CANARY}",
    "HF_ENDPOINT": f"http://user:{CANARY}@127.0.0.1:1",
    "RAY_AUTH_TOKEN": f"{CANARY}-of-ray-and-as-long-as-it-has-to-be",
    "RAY_REDIS_PASSWORD": CANARY,
    "http_proxy": f"http://user:{CANARY}@127.0.0.1:1",
    "https_proxy": f"http://user:{CANARY}@127.0.0.1:1",
}
ADDRESSES = {
    "RAY_ADDRESS": NOBODY,
    "RAY_API_SERVER_ADDRESS": f"http://user:{QUOTED}@127.0.0.1:1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """All variables at once; commands run in the folder that is returned, and nothing of it stays in this process."""
    import huggingface_hub
    from huggingface_hub import constants

    for name, value in {**VARIABLES, **ADDRESSES, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(constants, "ENDPOINT", VARIABLES["HF_ENDPOINT"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("raymoe.safe_text._remembered_secrets", set())
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()
    yield tmp_path
    huggingface_hub.close_session()  # it has taken the proxy from the environment


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if any(part in line for part in TOLD)]


def written(folder: Path, without: tuple[str, ...] = ()) -> list[str]:
    """Files with a part of the canary in them."""
    return [
        str(path)
        for path in files_below(folder)
        if path.name not in without and any(part.encode() in path.read_bytes() for part in TOLD)
    ]


MODEL_URLS = [
    f"https://user:{CANARY}@127.0.0.1:1/x",
    f"https://user:{UNQUOTED}@127.0.0.1:1/x",
    f"s3://KEY:{CANARY}@bucket/x",
    f"s3:/KEY:{CANARY}@bucket/x",
    f"https://127.0.0.1:1/x?X-Amz-Signature={CANARY}",
]
COMMANDS: list[tuple[Any, ...]] = [
    ("plan", "CONFIG", "s3://bucket/out"),
    ("plan", "CONFIG", "--json"),
    ("plan", "CONFIG", f"s3://KEY:{CANARY}@bucket/out"),
    ("plan", "CONFIG", f"https://127.0.0.1:1/x?token={CANARY}"),
    ("merge", "CONFIG", "out", "--result", f"https://u:{CANARY}@127.0.0.1:1/r.json"),
    ("merge", "CONFIG", f"s3://KEY:{CANARY}@bucket/out", "--result", "r.json"),
    ("merge", "CONFIG", "s3://bucket/out", "--result", "r.json"),
    ("merge", "CONFIG", "out", "--push-to-hub", "org/name", "--result", "r.json"),
    ("submit", "CONFIG", "/out"),
    ("submit", "CONFIG", "/out", "--address", f"http://user:{CANARY}@127.0.0.1:1", "--token", f"{CANARY}abc"),
    ("submit", "CONFIG", "/out", "--address", f"http://user:{UNQUOTED}@127.0.0.1:1", f"--token={CANARY}abc"),
    ("submit", "CONFIG", f"s3://KEY:{CANARY}@bucket/out"),
    ("submit", "CONFIG", "/out", "--result", f"s3://KEY:{CANARY}@bucket/out"),
    ("verify", f"s3://KEY:{CANARY}@bucket/out"),
    ("verify", "s3://bucket/out"),
    ("inspect", f"https://user:{CANARY}@127.0.0.1:1/x"),
    ("inspect", "s3://bucket/out"),
    ("try", f"s3://KEY:{CANARY}@bucket/out", "Hi"),
    ("try", "s3://bucket/out", "Hi"),
    ("eval", f"s3://KEY:{CANARY}@bucket/out", "--data", "texts.jsonl", "--json", "e.json"),
    ("gguf", f"s3://KEY:{CANARY}@bucket/out", "m.gguf"),
    ("gguf", "s3://bucket/out", "m.gguf"),
    ("extract", f"s3://KEY:{CANARY}@bucket/mixture", "0", "/out"),
    ("extract", "/mixture", "0", f"s3://KEY:{CANARY}@bucket/out"),
    ("push", f"s3://KEY:{CANARY}@bucket/out", "org/name"),
    ("push", "s3://bucket/out", "org/name"),
]


@pytest.fixture
def small(zoo: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    from tests.pico import merge_config

    def content(**keys: Any) -> dict[str, Any]:
        return merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random") | keys

    return content


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers here: one try is enough."""
    monkeypatch.setattr("raymoe.object_store.retry._TRIES_AT_FIRST_CONTACT", 1)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments).replace(CANARY, "..."))
def test_options(
    cli: Cli, environment: Path, impatient: None, small: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    """Each is refused, or fails for want of a server; planning alone needs nobody."""
    config = write_config(environment / "config.yaml", small(storage={"deadline_s": 2}))
    answer = cli(*(config if each == "CONFIG" else each for each in arguments))
    assert answer.code != 0 or arguments[0] == "plan"
    assert told(answer.out) == told(answer.err) == written(environment) == []


@pytest.mark.parametrize("address", [None, f"ray://user:{CANARY}@127.0.0.1:1", f"user:{UNQUOTED}@127.0.0.1:1"])
@pytest.mark.processes
def test_addresses_of_ray(environment: Path, small: Callable[..., Any], address: str | None) -> None:
    """In a process of its own: this one may be on a Ray already, which a merge would use."""
    config = write_config(environment / "config.yaml", small())
    options = () if address is None else ("--address", address)
    done = raymoe("merge", config, "out", "--result", "r.json", *options)
    assert done.returncode != 0
    assert told(done.stdout) == told(done.stderr) == written(environment) == []


CONFIGS: list[dict[str, Any]] = [
    *({"base_model": url} for url in MODEL_URLS),
    *({"base_model": {"model": {"path": url}}} for url in MODEL_URLS[:1]),
    {"storage": {"endpoint": f"https://user:{CANARY}@host"}},
    {"storage": {"endpoint": f"https://host/?key={CANARY}"}},
    {"storage": {"secret_key": CANARY}},
    {"base_model": "org/name"},
    {"base_model": "s3://bucket/model"},
    {"gate_mode": "cheap_embed", "prompts": f"https://user:{CANARY}@127.0.0.1:1/p.jsonl"},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda changes: str(changes).replace(CANARY, "..."))
@pytest.mark.parametrize("command", ["plan", "merge", "submit", "gguf"])
def test_configs(
    cli: Cli,
    environment: Path,
    impatient: None,
    small: Callable[..., Any],
    command: str,
    changes: dict[str, Any],
) -> None:
    content = small(**{"storage": {"deadline_s": 2}, **changes})
    if file := content.pop("prompts", None):
        content["experts"][0]["positive_prompts"] = {"file": file}
        content["experts"][1]["positive_prompts"] = ["x"]
    path = environment / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    rest = {"merge": ("out", "--result", "r.json"), "submit": ("/out",), "gguf": ("m.gguf",)}.get(command, ())
    answer = cli(command, path, *rest)
    assert answer.code != 0
    assert told(answer.out) == told(answer.err) == written(environment, without=("config.yaml",)) == []


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"at {NOBODY}/x", "at http://127.0.0.1:1/x"),
        (f"redis://:{CANARY}@h:1", "redis://h:1"),
        (f"http://user:{UNQUOTED}@h/x", "http://h/x"),
        (f"https://h/x?a=b&sig={CANARY}&c=d", "https://h/x?a=b&sig=<removed>&c=d"),
        (f"GET /x?access_token={CANARY}", "GET /x?access_token=<removed>"),
        (f"Authorization: Bearer {CANARY}", "Authorization: <removed>"),
        (f"{{'authorization': 'Basic {CANARY}=='}}", "{'authorization': '<removed>'}"),
        (f"token hf_{CANARY * 2}", "token <removed>"),
        (
            f"https://h/x?X-Goog-Credential={CANARY}%40p&X-Goog-Signature={CANARY}",
            "https://h/x?X-Goog-Credential=<removed>&X-Goog-Signature=<removed>",
        ),
        ("http://user:123/45@h", "http://h"),
        (f"http://u:c'{CANARY}@h/x", "http://h/x"),
        (
            "s3://bucket/a@b, org/name@revision, http://host:80/a@b",
            "s3://bucket/a@b, org/name@revision, http://host:80/a@b",
        ),
        ("set pad_token=<pad> and secret=1", "set pad_token=<pad> and secret=1"),
    ],
)
def test_forms(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed
    assert scrub(scrub(text)) == scrubbed


@pytest.mark.parametrize(
    "text",
    [
        f"hf://gpt2@{'a' * 40}/model.safetensors",
        "s3://base+s3://adapter/x@y",
        "http://[::1]:8265/x@y",
        "http://host:80/a@b",
        "a//b:c'd@e",
        "'//x:1'/'y@z'",
        "/data/hf_quantizedcheckpoint/x",
    ],
)
def test_what_is_no_secret(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.safe_text._remembered_secrets", set())
    remember_secrets(["plan", text])
    assert scrub(text) == text


@pytest.mark.parametrize("part", ["//a:", "X-Amz-", "//", "authorization", "?token", "//[::", "//a+s3://", "//1:2/"])
def test_long_text_of_others(part: str) -> None:
    """Patterns that try again from each place would take hours here."""
    text = part * (300_000 // len(part))
    assert scrub(text) == text


def test_messages_are_no_longer_than_people_read() -> None:
    problem = Problem(where="w" * 5_000, what="begin" + "x" * 1_000_000 + "end", remedy="r" * MAX_CHARACTERS)
    assert len(problem.where) <= MAX_CHARACTERS and len(problem.what) <= MAX_CHARACTERS
    assert problem.what.startswith("begin") and " ... " in problem.what and problem.what.endswith("end")
    assert problem.remedy == "r" * MAX_CHARACTERS
    assert str(ProblemReport([problem])) == str(problem)
    many = [Problem(where=f"file {number}", what=f"what {number}") for number in range(1000)]
    assert " ... " not in str(ProblemReport(many))


def test_numbers_of_many_digits_in_places() -> None:
    problems = [Problem(where=f"a[{digits}]", what="bad") for digits in ("1" * 3_000, "2" * 3_000, "1", "2")]
    assert "a[1-2]" in str(ProblemReport(problems))
    assert "a:" + "1" * 3_900 in str(ProblemReport([Problem(where=f"a:{'1' * 3_900}", what="bad")] * 2))


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A_TOKEN": "12345678", "B_TOKEN": 'ab"cdefgh\\x'}.items():
        monkeypatch.setenv(name, value)
    content = {"authorization": 5, "parameters": 12345678, "error": 'bad ab"cdefgh\\x', "12345678": ["12345678", None]}
    expected = {"authorization": 5, "parameters": 12345678, "error": "bad <B_TOKEN>", "<A_TOKEN>": ["<A_TOKEN>", None]}
    assert json.loads(json_text(content, scrubbed=True)) == expected
    assert json.loads(json_text(content)) == content
    assert CANARY not in json_text({"headers": [{"Authorization": f"Bearer {CANARY}"}]}, scrubbed=True)


def test_credentials_of_test_servers_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minioadmin")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    text = "/home/me/tests/latest /data/test/out the latest test.json of minioadmin"
    assert scrub(text) == text
    assert scrub("key 'test', key=test.") == "key '<AWS_SECRET_ACCESS_KEY>', key=<AWS_SECRET_ACCESS_KEY>."
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "    ")
    monkeypatch.setattr("raymoe.safe_text._remembered_secrets", {""})
    assert scrub("abc  d") == "abc  d"


def test_proxies_without_a_scheme_and_passwords_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"user:{CANARY}@proxy:3128")
    monkeypatch.setenv("PGPASSWORD", f"PG{CANARY}")
    assert scrub(f"at user:{CANARY}@proxy with PG{CANARY}") == "at user:<HTTPS_PROXY>@proxy with <PGPASSWORD>"


def test_values_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    variables: Mapping[str, str] = {
        "MY_SERVICE_API_KEY": CANARY,
        "TOKENIZERS_PARALLELISM": "false",
        "SHORT_TOKEN": "1234",
        "SOME_URL": f"https://user:{QUOTED}@h/x?key=LONG{CANARY}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = scrub(f"{CANARY} false 1234 {QUOTED} {UNQUOTED} LONG{CANARY}")
    assert said == "<MY_SERVICE_API_KEY> false 1234 <SOME_URL> <SOME_URL> <SOME_URL>"


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymoe.safe_text._remembered_secrets", set())
    remember_secrets(["submit", "s3://bucket/a@b", "--address", f"http://u:{UNQUOTED}@h:1", "--token", "tokenXYZ"])
    assert scrub(f"a {UNQUOTED} b tokenXYZ bucket/a") == "a <removed> b <removed> bucket/a"


def test_errors_hold_none() -> None:
    """Also those that Python code catches, and that Ray stores when an actor raises them."""
    import pickle

    problem = Problem(where=NOBODY, what=f"at {NOBODY}", remedy=f"ask {NOBODY}")
    for error in (ProblemReport([problem]), MergeFailed(f"at {NOBODY}")):
        assert told(str(error)) == told(repr(error)) == []
        assert not any(part.encode() in pickle.dumps(error) for part in TOLD)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", ["HF_TOKEN", "AZURE_STORAGE_KEY", "GITHUB_PAT", "DB_PWD"])
def test_a_secret_as_messages_quote_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "ab/c+d'e\"f\\g1234"
    monkeypatch.setenv(name, secret)
    for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")):
        assert scrub(f"<{form}>") == f"<<{name}>>"


def test_the_working_directory_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/me/models")
    assert scrub("/home/me/models/a") == "/home/me/models/a"
