"""The routing page: sound HTML that loads nothing, shows all there is, and trusts no text of the data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from raymoe.report.eval_page import evaluation_page
from tests.report.html_check import Page
from tests.report.synthetic import synthetic_evaluation


def page_of(result: dict[str, Any]) -> Page:
    page = Page(evaluation_page(result))
    assert page.problems == []
    return page


def words(page: Page) -> str:
    return " ".join(page.text)


@pytest.mark.parametrize(("experts", "layers"), [(2, 8), (4, 30), pytest.param(16, 80, marks=pytest.mark.slow)])
def test_every_label_expert_and_layer_is_there(experts: int, layers: int) -> None:
    result = synthetic_evaluation(experts, layers)
    page = page_of(result)
    said = words(page)
    kinds = {kind for attributes in page.all("rect") for kind in (attributes.get("class") or "").split()}
    for number, name in enumerate(result["experts"]):
        assert name in page.text, "the key, the tables' heads"
        assert f"e{number}" in kinds, "the drawings"
        assert f"layer {layers - 1}, {name}: " in said, "tooltips of the heatmaps and of the load"
    heatmaps = [s for s in page.all("svg") if "tokens routed first to each expert" in str(s["aria-label"])]
    assert [str(s["aria-label"]).split()[2] for s in heatmaps] == list(result["data"]["per_label"])
    assert len(page.all("pre")) == experts


def test_figures_are_those_of_the_data() -> None:
    result = synthetic_evaluation()
    said = words(page_of(result))
    routing = result["routing"]
    assert f"{result['gap_closed']:.0%} of the gap from the hidden router to the oracle is closed" in said
    assert f"{routing['first_accuracy_mean']:.1%}" in said
    assert f"{routing['chosen_accuracy_mean']:.1%}" in said
    for model, losses in result["loss"].items():
        for label, loss in losses.items():
            assert f"{loss:.3f}" in said, (model, label)
    for label, shares in routing["confusion"].items():
        for name, share in zip(result["experts"], shares):
            assert f"{label} to {name}: {share:.1%}" in said


@pytest.mark.parametrize("left_out", ["null", "missing"])
def test_only_the_merge_was_measured(left_out: str) -> None:
    result = synthetic_evaluation()
    for model in list(result["loss"]):
        if model != "merged":
            if left_out == "null":
                result["loss"][model] = None
            else:
                del result["loss"][model]
    result["gap_closed"] = None
    page = page_of(result)
    drawn = {kind for attributes in page.all("rect") for kind in (attributes.get("class") or "").split()}
    assert "merged" in drawn
    assert not drawn & {"base", "average", "hidden", "oracle", "own"}
    assert not any("Mean loss, lower" in str(s["aria-label"]) for s in page.all("svg")), "nothing to compare with"
    assert "of the gap" not in words(page)


def test_the_merge_is_compared_with_what_it_has_to_beat() -> None:
    result = synthetic_evaluation(2, 8)
    loss = result["loss"]
    loss["merged"]["mean"], loss["average"]["mean"] = 2.0, 1.875
    loss["expert go"]["mean"], loss["expert metamath"]["mean"] = 2.75, 2.5
    said = words(page_of(result))
    assert "The mean loss is 2.00 nats: 0.50 below the best single expert (metamath) and 0.12 above a plain" in said
    loss["expert go"], loss["average"] = None, None
    loss["base"]["mean"] = 3.5
    assert "The mean loss is 2.00 nats: 1.50 below the base model;" in words(page_of(result))


def test_the_line_from_base_to_best_has_all_references() -> None:
    result = synthetic_evaluation()
    result["compared"], result["loss"]["other"] = {"other": "org/other"}, {**result["loss"]["base"], "mean": 9.5}
    (line,) = [s for s in page_of(result).all("svg") if "Mean loss, lower" in str(s["aria-label"])]
    means = {
        name: result["loss"][name]["mean"] for name in ("experts", "oracle", "merged", "hidden", "average", "base")
    }
    named = dict(
        zip(means, ("own expert", "right expert", "this merge", "hidden router", "plain average", "base model"))
    )
    for name, mean in means.items():
        assert f"{named[name]} {mean:.3f}" in str(line["aria-label"])
    assert str(line["aria-label"]).endswith("other 9.500")


def test_no_losses_and_no_samples() -> None:
    result = synthetic_evaluation()
    result |= {"loss": {}, "gap_closed": None, "samples": [], "gate_mode": None, "prompt_model": None, "backbone": None}
    page = page_of(result)
    assert "First choices" in page.text
    assert "None" not in words(page)
    assert page.all("pre") == []


def test_a_label_without_an_expert_of_its_own() -> None:
    result = synthetic_evaluation()
    result["data"]["per_label"]["go"]["expert"] = None
    page = page_of(result)
    assert sum("frame" in (r.get("class") or "") for r in page.all("rect")) == 3
    assert "go" in page.text


HOSTILE = "</style></title><script>alert(1)</script>\"'&<img src=x onerror=alert(1)>{{ 7 * 7 }}"


def test_texts_of_the_data_are_escaped() -> None:
    escaped = json.dumps(HOSTILE)[1:-1]
    plain = json.dumps(synthetic_evaluation(2, 8))
    result = json.loads(plain.replace('"go"', f'"{escaped}"').replace('"expert go"', f'"expert {escaped}"'))
    result |= {"model": HOSTILE, "gate_mode": HOSTILE, "architecture": HOSTILE, "warnings": [HOSTILE]}
    result["data"]["file"] = HOSTILE
    result["samples"][0]["tokens"][0]["text"] = HOSTILE
    page = page_of(result)
    assert len(page.all("script")) == 1, "the page's own"
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert words(page).count(HOSTILE) >= 10


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = evaluation_page(synthetic_evaluation())
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "use", "image"}
        assert not {"src", "href", "xlink:href", "srcset", "action"} & attributes.keys()
    assert not re.search(r"url\(|@import|https?:|//[a-z]", html.partition("<body>")[0])
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


def test_tokens_that_cannot_be_seen_are_shown() -> None:
    result = synthetic_evaluation(2, 8)
    shown = {
        "\n\n": "↵\n↵\n",
        "\t": "⇥\t",
        "  ": "··",
        "": "∅",
        "\x00\x1b": "␀␛",
        " ¿qué": " ¿qué",
        "日本": "日本",
        "\ud83d": "\ufffd",
        "🙂": "🙂",
    }
    result["samples"] = [{"label": "go", "tokens": [{"text": text, "experts": [5, 3]} for text in shown]}]
    html = evaluation_page(result)
    tokens = re.findall(
        r'<span class="t e0" style="--a:0\.62" title="go 5, metamath 3 of 8 layers">([^<]*)</span>', html
    )
    assert tokens == list(shown.values())
    html.encode("utf-8")  # a lone surrogate can't be


def test_a_token_has_the_colour_of_the_majority() -> None:
    result = synthetic_evaluation(4, 8)
    result["samples"] = [{"label": "go", "tokens": [{"text": "x", "experts": [1, 0, 6, 1]}]}]
    page = page_of(result)
    token = next(t for t in page.all("span") if t.get("class") == "t e2")
    assert token["style"] == "--a:0.75"
    assert token["title"] == "spanish 6, go 1, dictionary 1 of 8 layers"
    assert "0% of tokens to its own expert" in page.text


def test_names_that_do_not_fit_are_cut_and_kept_as_tooltips() -> None:
    result = synthetic_evaluation(16, 8)
    page = page_of(result)
    shortened = [text for text in page.text if re.fullmatch(r"exp\S*…\S*-1[1-5]", text)]
    assert len(set(shortened)) >= 5, "cut names still differ"
    assert page.text.count("expert-with-a-long-name-12") > 16


def test_experts_beyond_the_colours_share_them() -> None:
    page = page_of(synthetic_evaluation(18, 8))
    classes = {kind for _, attributes in page.elements for kind in (attributes.get("class") or "").split()}
    assert {kind for kind in classes if re.fullmatch(r"e\d+", kind)} == {f"e{number}" for number in range(16)}


def test_a_merge_worse_than_the_hidden_router_closes_nothing() -> None:
    result = synthetic_evaluation(2, 8)
    result["loss"]["merged"]["mean"] = result["loss"]["hidden"]["mean"] + 0.3
    ladder = re.search(r"<svg[^>]*Mean loss, lower.*?</svg>", evaluation_page(result))
    assert ladder is not None
    filled = re.search(r'<rect [^>]*class="bar merged"[^>]*>', ladder[0])
    assert filled is not None and 'width="0"' in filled[0]


@pytest.mark.processes
def test_page_needs_no_torch() -> None:
    code = "import sys, raymoe.report.eval_page, raymoe.report.eval_table; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
