"""`raymoe try`: what it prints, from where it takes prompts, and how it refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raymoe as package
from raymoe.evaluation import generation
from raymoe.report.generation_text import print_answer
from tests.cli.commands import files_below, raymoe
from tests.pico import load_dense, merge_config, merge_here

Cli = Callable[..., Any]
PROMPTS = ("def area(radius): return 3", "You may reproduce the Work")


@pytest.fixture(scope="module")
def merged(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a merge `out` of the experts `code` and `law`."""
    folder = tmp_path_factory.mktemp("try")
    for number, name in enumerate(("base", "code", "law")):
        shutil.copytree(zoo("llama", seed=number), folder / name)
    merge_here(merge_config(folder / "base", [folder / "code", folder / "law"]), folder / "out")
    return folder


def shares(answer: dict[str, Any]) -> list[float]:
    return [sum(answer[key].values()) for key in ("first_choice", "weight")]


def test_answers_and_shares(merged: Path) -> None:
    before = files_below(merged)
    done = raymoe("try", "out", *PROMPTS, "--max-new-tokens", 5, "--device", "cpu", cwd=merged)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["out (mixtral)", "2 experts, 2 for each token, 3 layers; on cpu: all weights stay in memory"]
    assert all(prompt in lines for prompt in PROMPTS)
    for start in ("tokens ", "first choice ", "router weight "):
        assert sum(line.startswith(start) for line in lines) == 2
    assert files_below(merged) == before


@pytest.mark.engines
def test_json(merged: Path) -> None:
    """The answers are what transformers generates from the same folder; shares sum to one, of each token too."""
    from transformers import AutoTokenizer

    asked = ("--max-new-tokens", 6, "--device", "cpu", "--json", "--per-token")
    done = raymoe("try", "out", *PROMPTS, *asked, cwd=merged)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["experts"] == ["code", "law"] and result["weights"] == "resident" and done.stderr == ""
    tokenizer, model = AutoTokenizer.from_pretrained(merged / "out"), load_dense(merged / "out")
    for prompt, answer in zip(PROMPTS, result["answers"], strict=True):
        ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert answer["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (answer["prompt"], answer["prompt_tokens"], answer["new_tokens"]) == (prompt, ids.shape[1], len(new))
        assert shares(answer) == pytest.approx([1, 1], abs=1e-5)
        # Without BOS, and without the last token, which was not read.
        assert len(answer["tokens"]) == ids.shape[1] - 1 + len(new) - 1
        assert "".join(token["text"] for token in answer["tokens"]).startswith(prompt)
        assert all(shares(token) == pytest.approx([1, 1], abs=1e-5) for token in answer["tokens"])


def test_weights_that_do_not_fit_are_streamed(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 4, "device": "cpu"}
    resident = package.generate(merged / "out", PROMPTS, **asked)
    monkeypatch.setattr(generation, "available_bytes", lambda device: 1000)
    streamed = package.generate(merged / "out", PROMPTS, **asked)
    assert streamed == {**resident, "weights": "streamed"}
    done = raymoe("try", merged / "out", PROMPTS[0], "--max-new-tokens", 0, "--device", "cpu")
    assert "on cpu: weights do not fit, layers are read for each token" in done.stdout


def test_drawn_tokens_come_from_the_seed(merged: Path) -> None:
    def answer(seed: int) -> str:
        options = {"temperature": 5.0, "seed": seed, "max_new_tokens": 12, "device": "cpu"}
        return str(package.generate(merged / "out", PROMPTS[0], **options)["answers"][0]["answer"])

    assert answer(1) == answer(1) != answer(2)


def test_chat(merged: Path) -> None:
    plain, chat = (
        package.generate(merged / "out", "Hi", chat=chat, max_new_tokens=0, device="cpu")["answers"][0]
        for chat in (False, True)
    )
    assert plain["answer"] == chat["answer"] == "" and chat["prompt_tokens"] > plain["prompt_tokens"]


def test_progress_counts_whole_tokens(merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the share of the work in layers, of which a token has three, and with the number of the prompt."""
    monkeypatch.setattr("raymoe.progress_line._LINE_EVERY_S", 0.0)
    answer = cli("try", merged / "out", *PROMPTS, "--max-new-tokens", 4, "--device", "cpu")
    lines = [re.sub(r", [\d.,]+/s, [^)]+ left", "", line.partition(" | ")[2]) for line in answer.err.splitlines()]
    own = [line for line in lines if line.startswith("generating (prompt 2 of 2) | ")]
    assert own[0].endswith("0% (0 of 4 new tokens)") and own[4].endswith("33% (1 of 4 new tokens)")
    assert own[5].endswith("42% (1 of 4 new tokens)") and own[-1].endswith("100% (4 of 4 new tokens)")
    answer = cli("try", merged / "out", "Hi", "--max-new-tokens", 0, "--device", "cpu")
    assert "reading | 67% (2 of 3 layers of the model" in answer.err


def test_code_keeps_its_indentation(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"prompt_tokens": 3, "new_tokens": 9, "is_ended": True, "first_choice": {"go": 1.0}, "weight": {"go": 1.0}}
    for text, shown in (("\n  \n\tif x {\n\t}\n\n", "        if x {\n        }"), (" Paris. \n", "Paris."), ("\n", "")):
        print_answer({**answer, "prompt": "p", "answer": text})
        assert capsys.readouterr().out.startswith(f"\np\n{shown}\n\ntokens "), text


def test_lines_of_standard_input(merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n"))
    answer = cli("try", merged / "out", "--max-new-tokens", 1, "--device", "cpu", "--json")
    assert [each["prompt"] for each in json.loads(answer.out)["answers"]] == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    answer = cli("try", merged / "out", "--device", "cpu")
    assert answer.code == 2 and answer.err == (
        "error: raymoe try: there is no prompt\n    -> give prompts as arguments, or as lines of standard input\n"
    )


def test_a_conversation_goes_on_after_a_bad_prompt(merged: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.StringIO(f"{'long ' * 300}\none\n")
    typed.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", typed)
    answer = cli("try", merged / "out", "--max-new-tokens", 1, "--device", "cpu")
    assert answer.code == 0 and "the model reads 256" in answer.err and answer.err.count("> ") >= 3
    assert answer.out.count("first choice") == 1 and "\none\n" in answer.out


def test_prompts_that_are_too_long(merged: Path, cli: Cli) -> None:
    answer = cli("try", merged / "out", "short", "long " * 300, "--device", "cpu")
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: prompt 2 ('long long ") and "-> shorten it, or lower --max-new-t" in answer.err


def test_what_is_no_merge(merged: Path, cli: Cli) -> None:
    answer = cli("try", merged / "gone", "Hi")
    assert answer.code == 2 and "there is no such folder" in answer.err
    answer = cli("try", merged / "base", "Hi")
    assert answer.code == 2 and "there is no raymoe.json, the record of a finished merge" in answer.err


def test_options_are_refused_together(merged: Path, cli: Cli) -> None:
    shutil.copytree(merged / "out", merged / "no-template", dirs_exist_ok=True)
    (merged / "no-template/chat_template.jinja").unlink()
    wrong = ("--chat", "--max-new-tokens", -1, "--temperature", "nan", "--seed", -1)
    answer = cli("try", merged / "no-template", "Hi", *wrong)
    assert answer.code == 2 and answer.err.startswith("error: 4 problems:")
    for part in (
        "no chat template, which --chat needs",
        "-1 is below zero",
        "nan is not a temperature",
        "-1 is not a seed",
    ):
        assert part in answer.err


@pytest.mark.s3
def test_a_merge_in_an_object_store(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident and streamed, straight from the bucket."""
    from tests.object_store.servers import environment, running_server

    server = running_server("moto")
    server.client().create_bucket(Bucket="asked")
    for path in (merged / "out").iterdir():
        server.client().put_object(Bucket="asked", Key=f"out/{path.name}", Body=path.read_bytes())
    asked: dict[str, Any] = {"max_new_tokens": 4, "device": "cpu"}
    local = package.generate(merged / "out", PROMPTS, **asked)
    with environment(server.environment):
        assert package.generate("s3://asked/out", PROMPTS, **asked)["answers"] == local["answers"]
        monkeypatch.setattr(generation, "available_bytes", lambda device: 1000)
        assert package.generate("s3://asked/out", PROMPTS, **asked)["answers"] == local["answers"]
