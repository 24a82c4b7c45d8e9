"""Prompts in the base's chat template: what the model reads is what transformers would give it, with one BOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raymoe
from raymoe.errors import ProblemReport
from raymoe.planning.owner import Owner
from raymoe.routers import tokenize as prompts_module
from raymoe.routers.tokenize import load_tokenizer, tokenize
from tests.pico import PROMPTS, VOCAB, copy_model, load_dense, merge_config, save_tokenizer
from tests.routers.direct import computed_rows, direct_rows

TURN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}[answer]{% endif %}"
WITH_BOS = "{{ bos_token }}" + TURN + ANSWER


def tokenizer_with(folder: Path, template: str | None, **options: Any) -> Any:
    save_tokenizer(folder, **options)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder, trust_remote_code=False)


def texts_of(tokenizer: Any, prompts: list[str]) -> list[str]:
    ids = tokenize(tokenizer, prompts, vocab=VOCAB, owner=Owner.expert(0), chat_template=True)
    return [tokenizer.decode(row) for row in ids]


@pytest.mark.parametrize(
    "template",
    [TURN + ANSWER, WITH_BOS, "\n" + WITH_BOS, "{{ bos_token }}" + WITH_BOS],
    ids=["without", "with", "behind a blank", "twice"],
)
def test_one_bos_whether_the_template_writes_it_or_not(template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    assert texts_of(tokenizer, ["a b", ""]) == ["<s>[user]a b[answer]", "<s>[user][answer]"]
    plain = tokenize(tokenizer, ["a b"], vocab=VOCAB, owner=Owner.expert(0))
    assert tokenizer.decode(plain[0]) == "<s>a b"


def test_no_bos_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    assert texts_of(tokenizer_with(tmp_path, TURN + ANSWER, bos=False), ["a b"]) == ["[user]a b[answer]"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %B %Y') }} " + TURN, "<s>26 July 2024 [user]a"),
        ("\n{{- '%' ~ strftime_now('%Y-%m-%d') }}\n" + TURN, "<s>%2024-07-26\n[user]a"),
        (
            "\n{%- macro day() %}{{ strftime_now('%a, %b %y') }}{% endmacro %}\n\n{{ day() }}" + TURN,
            "<s>\nFri, Jul 24[user]a",
        ),
        ("\n{{ strftime_now('%Y') }} " + TURN, "<s>\n2024 [user]a"),
        # As Llama's do it.
        (
            "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }} " + TURN,
            "<s>26 Jul 2024 [user]a",
        ),
        ("\n\n" + TURN, "<s>\n\n[user]a"),
    ],
)
def test_the_day_does_not_matter(template: str, text: str, tmp_path: Path) -> None:
    """And nothing else of a template changes: line breaks at its beginning do not."""
    assert texts_of(tokenizer_with(tmp_path, template), ["a"]) == [text]


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, None)
    tokenizer.chat_template = {"tool_use": "no", "default": TURN}
    assert texts_of(tokenizer, ["a"]) == ["<s>[user]a"]
    tokenizer.chat_template = {"tool_use": "no", "rag": TURN}
    with pytest.raises(ProblemReport, match="its chat template can't be used: "):
        texts_of(tokenizer, ["a"])


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ProblemReport, match=r"tokenizer has no chat template\n.*instruct or chat model"):
        texts_of(tokenizer_with(tmp_path, None), ["a"])


def test_a_template_that_refuses_a_single_turn(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "{{ raise_exception('a system turn is needed') }}")
    with pytest.raises(ProblemReport, match="base_model: its chat template can't be used: a system turn is needed\n"):
        texts_of(tokenizer, ["a"])


@pytest.mark.parametrize("chat_template", [False, True])
def test_batches_change_nothing(chat_template: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a prompt is named by its number among all."""
    tokenizer = tokenizer_with(tmp_path, WITH_BOS)
    prompts = [f"prompt {number}" for number in range(23)]
    options: dict[str, Any] = {"owner": Owner.expert(0), "chat_template": chat_template}
    whole = tokenize(tokenizer, prompts, vocab=VOCAB, **options)
    monkeypatch.setattr(prompts_module, "_PROMPTS_AT_ONCE", 5)
    assert tokenize(tokenizer, prompts, vocab=VOCAB, **options) == whole
    assert len(whole) == 23
    top = max(map(max, whole))
    prompts[17] = "éèê"
    assert max(tokenize(tokenizer, prompts[17:18], vocab=VOCAB, **options)[0]) <= top
    with pytest.raises(ProblemReport, match=r"expert 0, prompt 1 \('prompt 0'\)[:;].* its token"):
        tokenize(tokenizer, prompts, vocab=max(whole[0]), **options)


# --- in merges


def test_rows_are_those_of_the_rendered_prompts(zoo: Callable[..., Path]) -> None:
    """Against transformers' own rendering, read by the whole model; an expert may differ from the config."""
    base = zoo("llama")  # its template writes no BOS and ends each turn with a line break
    config = {**merge_config(base, [base] * 3), "chat_template": True}
    config["experts"][1]["chat_template"] = False
    rows = computed_rows(config)
    model = load_dense(base)
    for number, in_template in enumerate([True, False, True]):
        prompts = [f"user: {prompt}\n" if in_template else prompt for prompt in PROMPTS[number]]
        np.testing.assert_allclose(rows[number], direct_rows(model, base, "hidden", prompts), atol=2e-5)
    assert np.abs(rows[0] - computed_rows(merge_config(base, [base] * 3))[0]).max() > 0.01


def test_the_plan_says_so(zoo: Callable[..., Path]) -> None:
    base = zoo("llama")
    config = merge_config(base, [base] * 2)
    plans = [raymoe.plan({**config, "chat_template": flag}, allow_all_same=True) for flag in (False, True)]
    assert [[p.chat_template for p in plan.gates.experts] for plan in plans] == [[False] * 2, [True] * 2]
    assert plans[0].digest != plans[1].digest
    random = {**merge_config(base, [base] * 2, mode="random"), "chat_template": True}
    assert not any(p.chat_template for p in raymoe.plan(random, allow_all_same=True).gates.experts)


def test_a_base_without_a_template_is_refused_when_planning(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """With what is wrong with files of prompts; a template in tokenizer_config.json counts."""
    base = copy_model(zoo("llama"), tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    config = {**merge_config(base, [base, base]), "chat_template": True}
    config["experts"][0]["negative_prompts"] = {"file": "none.txt"}
    with pytest.raises(ProblemReport) as caught:
        raymoe.plan(config, allow_all_same=True)
    assert [problem.where for problem in caught.value.problems] == [
        "none.txt: experts[0].negative_prompts",
        "base_model",
    ]
    assert caught.value.problems[1].what.endswith("the base model's tokenizer has no chat template")
    del config["experts"][0]["negative_prompts"]
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TURN}))
    assert raymoe.plan(config, allow_all_same=True).gates.experts[0].chat_template
    assert len(computed_rows(config)) == 2
    path.unlink()
    with pytest.raises(ProblemReport, match="has no chat template"):
        raymoe.plan(config, allow_all_same=True)
    # Nobody asks for one where no expert uses it.
    config["experts"] = [{**expert, "chat_template": False} for expert in config["experts"]]
    raymoe.plan(config, allow_all_same=True)
