"""Labelled texts from a file: what is read, and every way in which a line is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from raymoe.checkpoints.merge_record import RecordedSource, expert_names
from raymoe.errors import ProblemReport
from raymoe.evaluation.dataset import Labels, read_texts, tokenize_texts
from raymoe.evaluation.options import AGAINST, EvaluationOptions, option_problems, parse_against
from raymoe.planning.owner import BASE, Owner
from raymoe.routers.tokenize import load_tokenizer
from tests.pico import VOCAB, save_tokenizer

NAMES = ("go", "spanish", "go-2", "twin", "twin")


def write(folder: Path, *lines: Any) -> Path:
    """A file with these lines; what is not text or bytes becomes JSON."""
    made = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    (folder / "texts.jsonl").write_bytes(b"\n".join(made) + b"\n")
    return folder / "texts.jsonl"


def refused(file: Path, *pairs: str, **options: Any) -> str:
    with pytest.raises(ProblemReport) as report:
        read_texts(file, Labels(NAMES, pairs), EvaluationOptions(**options))
    return str(report.value)


def test_labels_are_names_numbers_or_given(tmp_path: Path) -> None:
    labels = ["go", "go-2", 1, "3", "Golang", "español"]
    file = write(tmp_path, *({"label": label, "text": f"text {n}", "more": 1} for n, label in enumerate(labels)))
    texts = read_texts(file, Labels(NAMES, ["Golang=go", "español = 1"]), EvaluationOptions())
    assert [text.expert for text in texts] == [0, 2, 1, 3, 0, 1]
    assert [text.label for text in texts] == ["go", "go-2", "1", "3", "Golang", "español"]
    assert [text.text for text in texts] == [f"text {n}" for n in range(6)]


def test_other_fields_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    first = b"\xef\xbb\xbf" + json.dumps({"domain": "go", "content": "one"}).encode()
    file = write(tmp_path, first, "", "   ", {"domain": "spanish", "content": "dos", "text": 5})
    options = EvaluationOptions(text_field="content", label_field="domain")
    texts = read_texts(file, Labels(NAMES), options)
    assert [(text.line, text.text) for text in texts] == [(1, "one"), (4, "dos")]


def test_the_limit_is_for_each_label(tmp_path: Path) -> None:
    file = write(tmp_path, *({"label": label, "text": f"{label} {n}"} for n in range(5) for label in ("go", "spanish")))
    texts = read_texts(file, Labels(NAMES), EvaluationOptions(limit=2))
    assert [text.text for text in texts] == ["go 0", "spanish 0", "go 1", "spanish 1"]
    assert len(read_texts(file, Labels(NAMES), EvaluationOptions(limit=0))) == 10


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{'label': 'go'}", "not JSON"),
    "no object": (["go", "text"], "expected an object, found list"),
    "no text": ({"label": "go"}, "there is no 'text' (fields here: 'label')"),
    "no label": ({"text": "a b"}, "there is no 'label' (fields here: 'text')"),
    "empty text": ({"label": "go", "text": " \n"}, "the text is empty"),
    "text is a number": ({"label": "go", "text": 5}, "'text' is int"),
    "label is null": ({"label": None, "text": "a b"}, "'label' is NoneType"),
    "label is a truth": ({"label": True, "text": "a b"}, "'label' is bool"),
    "unknown label": ({"label": "rust", "text": "a b"}, "unknown label 'rust'"),
    "no such number": ({"label": 5, "text": "a b"}, "unknown label '5'"),
    "two experts": ({"label": "twin", "text": "a b"}, "the label 'twin' is the name of experts 3 and 4"),
    "half a character": ('{"label": "go", "text": "a \\ud800"}', "the text is not valid Unicode"),
    "not UTF-8": (b'{"label": "go", "text": "\xff"}', "not UTF-8 (byte 26 of the line)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    line, message = BAD[name]
    found = refused(write(tmp_path, {"label": "go", "text": "fine"}, line))
    assert f"texts.jsonl, line 2: {message}" in found
    assert "\n    -> " in found


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    found = refused(write(tmp_path, *(line for line, _ in BAD.values())))
    for number, (_, message) in enumerate(BAD.values(), 1):
        assert f"line {number}: {message}" in found


def test_one_mistake_in_many_lines_is_told_once(tmp_path: Path) -> None:
    labels = ["rust"] * 50 + ["java"] + ["rust"] * 3
    found = refused(write(tmp_path, *({"label": label, "text": "a b"} for label in labels)))
    assert found.count("unknown label") == 2 and "2 problems" in found
    assert "texts.jsonl, line 1, and 52 more lines: unknown label 'rust'" in found
    assert "texts.jsonl, line 51: unknown label 'java'" in found
    many = refused(write(tmp_path, *({"label": f"l{number}", "text": "a b"} for number in range(50))))
    assert many.count("unknown label") == 20 and "and 30 more lines like these" in many


def test_unknown_labels_are_told_what_is_known(tmp_path: Path) -> None:
    found = refused(write(tmp_path, {"label": "rust", "text": "a b"}), "Golang=go")
    assert "use one of go, spanish, go-2, twin, Golang, a number from 0 to 4, or --label rust=EXPERT" in found


def test_a_label_that_would_be_taken_for_the_mean_of_all(tmp_path: Path) -> None:
    file = write(tmp_path, {"label": "go", "text": "a b"}, {"label": "mean", "text": "a b"})
    found = refused(file, "mean=spanish")
    assert "texts.jsonl, line 2: the label 'mean' is reserved for the mean over labels" in found
    assert "the expert's number, or another label with --label LABEL=EXPERT" in found
    with pytest.raises(ProblemReport, match="the label 'mean'"):
        read_texts(file, Labels(["go", "mean"]), EvaluationOptions())


def test_a_file_that_is_none(tmp_path: Path) -> None:
    assert "can't be read: No such file" in refused(tmp_path / "gone.jsonl")
    assert "can't be read: Is a directory" in refused(tmp_path)
    assert "it has no texts" in refused(write(tmp_path, "", " "))


@pytest.mark.parametrize(
    ("pair", "what"),
    [
        ("go", "'go' is not LABEL=EXPERT"),
        ("=go", "'=go' is not LABEL=EXPERT"),
        ("x=", "'x=' is not LABEL=EXPERT"),
        ("x=rust", "'x=rust': there is no expert 'rust'"),
        ("x=5", "'x=5': there is no expert '5'"),
        ("x=twin", "'x=twin': 'twin' is the name of 2 experts"),
    ],
)
def test_a_bad_pair_is_named(pair: str, what: str) -> None:
    with pytest.raises(ProblemReport) as caught:
        Labels(NAMES, [pair])
    assert f"--label: {what}" in str(caught.value)
    assert "a number from 0 to 4" in str(caught.value)


def test_a_negative_limit_is_not_an_empty_file(tmp_path: Path) -> None:
    file = write(tmp_path, {"label": "go", "text": "a b"})
    assert read_texts(file, Labels(NAMES), EvaluationOptions(limit=-1)) == []


def test_a_label_is_for_one_expert() -> None:
    with pytest.raises(ProblemReport, match="'x' is given to two experts"):
        Labels(NAMES, ["x=go", "x=spanish"])
    assert Labels(NAMES, ["x=go", "x=0", "twin=4"]).expert("twin") == 4


def test_tokens_are_the_tokenizers_own_and_are_cut(tmp_path: Path) -> None:
    file = write(tmp_path, {"label": "go", "text": "a licence"}, {"label": "go", "text": "the work " * 50})
    texts = read_texts(file, Labels(NAMES), EvaluationOptions())
    save_tokenizer(tmp_path / "plain")
    plain = tokenize_texts(texts, file, load_tokenizer(tmp_path / "plain", trust_remote_code=False), VOCAB, 512)
    assert plain.truncated == plain.skipped == 0
    with_bos = tokenize_texts(texts, file, adds_bos(tmp_path / "bos"), VOCAB, 20)
    assert with_bos.truncated == 1 and with_bos.skipped == 1
    assert len(with_bos.ids[1]) == 20 and {ids[0] for ids in with_bos.ids} == {0}
    assert with_bos.ids[0][1:] == plain.ids[0] and 0 not in plain.ids[1]


def adds_bos(folder: Path) -> Any:
    """The pico tokenizer with the rule that many models have: BOS before every text."""
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, trust_remote_code=False)


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    texts = read_texts(write(tmp_path, {"label": "go", "text": "the work"}), Labels(NAMES), EvaluationOptions())
    save_tokenizer(tmp_path / "plain")
    file = tmp_path / "plain" / "tokenizer.json"
    normalizer = {"type": "Replace", "pattern": {"String": ""}, "content": "xxxx"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    with pytest.raises(ProblemReport, match="the model's tokenizer can't read the texts: "):
        tokenize_texts(texts, "texts", load_tokenizer(tmp_path / "plain", trust_remote_code=False), VOCAB, 512)


def test_texts_that_can_not_be_predicted(tmp_path: Path) -> None:
    file = write(tmp_path, *({"label": "go", "text": text} for text in ("the work", "a")))
    texts = read_texts(file, Labels(NAMES), EvaluationOptions())
    save_tokenizer(tmp_path / "plain")
    tokenizer = load_tokenizer(tmp_path / "plain", trust_remote_code=False)
    with pytest.raises(ProblemReport) as report:
        tokenize_texts(texts, file, tokenizer, 20, 512)
    assert "line 2: the text has no second token to predict" in str(report.value)
    assert re.search(r"line 1: token id \d+ is beyond the model's vocabulary of 20", str(report.value))


def test_experts_are_called_by_their_adapter_or_model() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    sources = [
        RecordedSource(owner=BASE, model="/models/base", adapter=None),
        RecordedSource(owner=Owner.expert(0), model="/models/base+/adapters/go", adapter="/adapters/go"),
        RecordedSource(owner=Owner.expert(1), model=f"org/name@{commit}", adapter=None),
        RecordedSource(owner=Owner.expert(2), model="s3://bucket/models/law/", adapter=None),
        RecordedSource(owner=Owner.expert(3), model=f"org/name+org/lora@{commit}", adapter=f"org/lora@{commit}"),
        RecordedSource(owner=Owner.shared(0), model="/models/shared", adapter=None),
    ]
    assert expert_names(sources) == ("go", "name", "law", "lora")


def test_options_that_can_not_be() -> None:
    options = EvaluationOptions(against=("base", "orcale"), limit=-1, max_tokens=1, text_field="label")
    found = "\n".join(map(str, option_problems(options)))
    assert "'orcale' is not a comparison" in found and "did you mean oracle?" in found
    for where in ("--limit: -1", "--max-tokens: 1", "--label-field: 'label'"):
        assert where in found
    assert not list(option_problems(EvaluationOptions(against=parse_against("none"))))
    assert parse_against(["base, Oracle", "Mine=Org/X,y"]) == ("base", "oracle", "Mine=Org/X,y")
    assert parse_against(" Oracle,base") == ("oracle", "base") and parse_against(None) is None
    assert EvaluationOptions(against=("oracle", "base")).comparisons == ("base", "oracle")


def test_further_models_are_added_to_comparisons() -> None:
    added = EvaluationOptions(against=("mine = org/x",))
    assert added.models == {"mine": "org/x"} and added.comparisons == AGAINST and added.named is None
    for nothing in ((), ("none",), ("none", "mine=org/x")):
        assert (
            EvaluationOptions(against=nothing).comparisons == ()
            and EvaluationOptions(against=nothing).named is not None
        )
    assert EvaluationOptions().models == {} and EvaluationOptions().named is None
    assert EvaluationOptions(against=("base", "mine=org/x")).comparisons == ("base",)


@pytest.mark.parametrize("place", ["s3://bucket/texts.jsonl", "s3:/bucket/texts.jsonl", "htps://host/texts.jsonl"])
def test_texts_are_no_objects(place: str) -> None:
    with pytest.raises(ProblemReport, match="--data: this looks like a URL, but texts are read from a file on this"):
        read_texts(Path(place), Labels(["code"]), EvaluationOptions())


def test_labels_of_many_digits_and_many_kinds_of_problems(tmp_path: Path) -> None:
    lines = [{"text": "a", "label": "1" * 5000}, *({"text": "a", "label": f"x{n}"} for n in range(50))]
    said = refused(write(tmp_path, *lines, {"text": "a", "label": "x0"}))
    assert "unknown label '1111" in said
    assert "line 2, and 1 more lines" in said
    assert "and 31 more lines like these" in said
