"""Prompts and tokenizers that a merge can't use, found before anything is written; tokenizers with own code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.errors import ProblemReport
from raymoe.planning import MergeOptions
from raymoe.planning.owner import Owner
from raymoe.routers.prompt_lengths import prompt_lengths
from raymoe.routers.tokenize import load_tokenizer, prompt_problems, tokenize
from raymoe.sources.tokenizer_files import plain_tokenizer
from tests.pico import merge_config, plan_problems

Zoo = Callable[..., Path]


@pytest.fixture
def base(zoo: Zoo, tmp_path: Path) -> Path:
    """A base that may be written to. Its embedding has a row for each token, and none more."""
    tokens = len(json.loads((zoo("llama") / "tokenizer.json").read_text())["model"]["vocab"])
    return Path(shutil.copytree(zoo("llama", vocab_size=tokens), tmp_path / "base"))


def add_token(folder: Path, text: str) -> int:
    """A token past the last row of the embedding, as published tokenizers have them; its id, which is the rows."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    rows: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    token = {"id": rows, "content": text, "special": True, "normalized": False}
    tokenizer["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return rows


def config_of(base: Path, *prompts: str, mode: str = "cheap_embed", **options: Any) -> dict[str, Any]:
    config = merge_config(base, [base] * 2, mode=mode, **options)
    if prompts:
        config["experts"][1]["positive_prompts"] = list(prompts)
    return config


def test_a_token_without_a_row(base: Path) -> None:
    """Named at planning with its text; prompts without it, and merges that read none, are fine."""
    rows = add_token(base, "<extra>")
    said = plan_problems(config_of(base, "fine", "a <extra> b"))
    assert f"expert 1, prompt 2 ('a <extra> b'): its token '<extra>' (id {rows}) has no row" in said
    assert said.count("has no row") == 1
    raymoe.plan(config_of(base, "fine", "a < extra> b"), allow_all_same=True)
    raymoe.plan(config_of(base, mode="random"), allow_all_same=True)


def test_a_token_that_only_the_template_writes(base: Path, merge_in_process: Any, tmp_path: Path) -> None:
    """A template is run by transformers, which planning does without: found by the merge, before it writes."""
    add_token(base, "<extra>")
    (base / "chat_template.jinja").write_text("<extra>{{ messages[0]['content'] }}")
    config = config_of(base, chat_template=True)
    plan = raymoe.plan(config, allow_all_same=True)
    problems = prompt_problems(plan.gates, trust_remote_code=False)
    assert {problem.what.partition(" (")[0] for problem in problems} == {"its token '<extra>'"}
    with pytest.raises(ProblemReport, match="its token '<extra>'"):
        merge_in_process(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not prompt_problems(raymoe.plan(config_of(base), allow_all_same=True).gates, trust_remote_code=False)


def test_prompts_that_are_too_long(zoo: Zoo) -> None:
    """A warning with the number of tokens, where a model reads them; max_position_embeddings is 256 here."""
    long = "The licensor grants a licence. " * 200
    plan = raymoe.plan(config_of(zoo("llama"), "short", long, mode="hidden"), allow_all_same=True)
    (warning,) = [w for w in plan.warnings if "max_position_embeddings" in w]
    assert warning.startswith("expert 1: 1 of its prompts have more tokens (up to ")
    spread = "ab " * 100  # 300 bytes, fewer tokens
    for config in (config_of(zoo("llama"), spread, mode="hidden"), config_of(zoo("llama"), long)):
        assert not [w for w in raymoe.plan(config, allow_all_same=True).warnings if "max_position" in w]


def save_broken(folder: Path, **parts: Any) -> None:
    """A tokenizer.json with these parts in the place of its own."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))


EMPTY_PATTERN = {"type": "Replace", "pattern": {"String": ""}, "content": "xxxx"}  # panics
SLOW_PATTERN = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}  # panics
NO_UNKNOWN = {"type": "WordLevel", "vocab": {"zz": 0}, "unk_token": "x"}  # raises a bare Exception


@pytest.mark.parametrize(
    "parts", [{"normalizer": EMPTY_PATTERN}, {"pre_tokenizer": SLOW_PATTERN}, {"model": NO_UNKNOWN}]
)
def test_a_tokenizer_that_fails_on_a_prompt(base: Path, parts: dict[str, Any]) -> None:
    """Planning names the file, the estimate of memory does without, and transformers' tokenizer is guarded alike."""
    save_broken(base, **parts)
    prompt = "hello " * 60 + "a" * 200 + "!"
    said = plan_problems(config_of(base, prompt, mode="hidden"))
    assert f"{base / 'tokenizer.json'}: the tokenizer can't read the text '<s>hello" in said, said
    gates = raymoe.plan(config_of(base, mode="cheap_embed"), allow_all_same=True).gates
    (member, *_) = gates.experts
    broken = replace(gates, experts=(replace(member, positive=(prompt,)),))
    assert prompt_lengths(broken)[member.owner] == prompt_lengths(broken, exact=False)[member.owner]
    tokenizer = load_tokenizer(base, trust_remote_code=False)
    with pytest.raises(ProblemReport, match="expert 0: its tokenizer can't read the prompts: "):
        tokenize(tokenizer, [prompt], vocab=9999, owner=Owner.expert(0))


def test_a_tokenizer_whose_file_panics(base: Path) -> None:
    save_broken(base, normalizer={"type": "Precompiled", "precompiled_charsmap": ""})
    with pytest.raises(ProblemReport, match="x: the tokenizer can't be read: "):
        plain_tokenizer((base / "tokenizer.json").read_bytes(), "x")
    assert "the tokenizer can't be read: " in plan_problems(config_of(base))
    raymoe.plan(config_of(base, "a " * 300, mode="random"), allow_all_same=True)
    with pytest.raises(ProblemReport, match="base_model: the base model's tokenizer can't be loaded: "):
        load_tokenizer(base, trust_remote_code=False)


@pytest.mark.parametrize(
    "content", [lambda text: text[:5000], lambda _: "{}", lambda text: text.replace("BPE", "Nope")]
)
def test_a_tokenizer_that_the_library_can_not_read(base: Path, content: Callable[[str], str]) -> None:
    path = base / "tokenizer.json"
    path.write_text(content(path.read_text()))
    assert f"{path}: the tokenizer can't be read: " in plan_problems(config_of(base))
    raymoe.plan(config_of(base, mode="random"), allow_all_same=True)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", None])
def test_a_blank_prompt_and_no_bos(base: Path, kind: str | None) -> None:
    """Refused at planning if the files say that there is no BOS, else by the merge before it writes."""
    settings = {"tokenizer_class": kind, "bos_token": None, "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for key in ("positive_prompts", "negative_prompts"):
        config = config_of(base)
        config["experts"][1][key] = ["fine", ""]
        said = plan_problems(config)
        number = key.replace("positive_prompts", "prompt 2").replace("negative_prompts", "negative prompt 2")
        assert f"expert 1, {number} (''): it has no tokens" in said and "no BOS token" in said
    raymoe.plan(config_of(base, " "), allow_all_same=True)
    raymoe.plan(config_of(base, "", chat_template=True), allow_all_same=True)


def test_a_blank_prompt_where_only_the_class_tells_of_bos(base: Path) -> None:
    (base / "tokenizer_config.json").write_text("{}")
    plan = raymoe.plan(config_of(base, "fine", ""), allow_all_same=True)
    assert [problem.what for problem in prompt_problems(plan.gates, trust_remote_code=False)] == ["it has no tokens"]
    assert not prompt_problems(raymoe.plan(config_of(base), allow_all_same=True).gates, trust_remote_code=False)
    (base / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    plan = raymoe.plan(config_of(base, "fine", ""), allow_all_same=True)
    assert not prompt_problems(plan.gates, trust_remote_code=False)


def test_ridge_with_prompts_of_bos_alone(base: Path) -> None:
    assert "expert 1: its positive prompts have no tokens but BOS" in plan_problems(
        config_of(base, "<s>", mode="ridge")
    )
    for mode, prompts in (("hidden", ["<s>"]), ("ridge", ["<s>", "a"])):
        raymoe.plan(config_of(base, *prompts, mode=mode), allow_all_same=True)


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize(
    ("template", "said"),
    [("{% for m in", "unexpected 'end of template' (line 1)"), ("{% nope %}", "Encountered unknown tag 'nope'")],
)
def test_a_template_with_a_syntax_error(base: Path, template: str, said: str, in_config: bool) -> None:
    if in_config:
        (base / "chat_template.jinja").unlink()
        settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (base / "chat_template.jinja").write_text(template)
    assert f"base_model: its chat template can't be used: {said}" in plan_problems(config_of(base, chat_template=True))
    raymoe.plan(config_of(base), allow_all_same=True)


def test_a_template_that_transformers_takes_is_taken(base: Path) -> None:
    """With its own tag, and loops that are left early."""
    from transformers import AutoTokenizer

    text = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    (base / "chat_template.jinja").write_text(text)
    plan = raymoe.plan(config_of(base, chat_template=True), allow_all_same=True)
    assert not prompt_problems(plan.gates, trust_remote_code=False)
    turn = [{"role": "user", "content": "a"}]
    assert AutoTokenizer.from_pretrained(str(base)).apply_chat_template(turn, tokenize=False) == "a"


def test_a_template_that_refuses_a_turn_is_found_before_the_merge_writes(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ raise_exception('a system turn is needed') }}")
    plan = raymoe.plan(config_of(base, chat_template=True), allow_all_same=True)
    problems = prompt_problems(plan.gates, trust_remote_code=False)
    assert [problem.what for problem in problems] == ["its chat template can't be used: a system turn is needed"]


@pytest.fixture
def own_code(base: Path) -> Path:
    """A base whose tokenizer is a class that lies beside it."""
    (base / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom .helper_own import NAME\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    code = NAME\n"
    )
    (base / "helper_own.py").write_text("NAME = 'own'\n")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return base


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code that it runs into a folder that is on Python's path."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    for module in (dynamic_module_utils, hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds the folder
    # The package remembers the folder that it was imported from.
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def test_own_code_is_copied(own_code: Path, merge_in_process: Any, tmp_path: Path) -> None:
    """Whatever the gate mode, and without running it: the output's tokenizer is as whole as the base's."""
    from transformers import AutoTokenizer

    config = config_of(own_code, mode="random")
    plan = raymoe.plan(config, allow_all_same=True)
    (warning,) = [w for w in plan.warnings if "code of its own" in w]
    assert "(helper_own.py, tokenization_own.py), which is copied" in warning
    merge_in_process(config, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "out"), trust_remote_code=True)
    assert (type(loaded).__name__, loaded.code) == ("OwnTokenizer", "own")
    without = raymoe.plan(config, MergeOptions(copy_tokenizer=False), allow_all_same=True)
    assert not without.warnings and not [side for side in without.side_files if side.name.endswith(".py")]


def test_own_code_runs_if_it_is_allowed(own_code: Path, merge_in_process: Any, tmp_path: Path) -> None:
    config = config_of(own_code)
    with pytest.raises(ProblemReport, match=r"code of its own, which is not run .*\n.*give --trust-remote-code"):
        merge_in_process(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_in_process(config, tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "out/tokenization_own.py").exists()


def test_code_is_part_of_the_merge(own_code: Path) -> None:
    config = config_of(own_code)
    before = raymoe.plan(config, allow_all_same=True).digest
    (own_code / "helper_own.py").write_text("NAME = 'oWn'\n")
    assert raymoe.plan(config, allow_all_same=True).digest != before


@pytest.mark.parametrize("word", ["auto", "fp16", "int8", "float8_e4m3fn", "F8_E4M3", ["bfloat16"], 3, None, ""])
def test_a_dtype_that_is_none_counts_as_missing(base: Path, word: Any) -> None:
    """The weights' own dtype then; another key of config.json may still say it."""
    path = base / "config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**content, "torch_dtype": word}))
    config = config_of(base, mode="random")
    assert raymoe.plan(config, allow_all_same=True).dtype == "F32"
    path.write_text(json.dumps({**content, "torch_dtype": word, "dtype": "bfloat16"}))
    assert raymoe.plan(config, allow_all_same=True).dtype == "BF16"
