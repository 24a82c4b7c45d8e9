"""The numbers and the picture of an evaluation in a published card: of this merge alone, and as text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import raymoe
from raymoe.report.eval_card import evaluation_section, routing_picture, with_evaluation
from tests.publish.hub import WritableHub
from tests.report.synthetic import synthetic_evaluation

HOSTILE = "x|`</style><script>alert(1)</script>\x1b\u202e ![a](https://evil.example)"


@pytest.fixture
def copied(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


def digest(out: Path) -> str:
    return str(json.loads((out / "raymoe.json").read_text())["plan_digest"])


def put(out: Path, result: Any) -> None:
    (out / "eval.json").write_text(json.dumps(result))


def test_numbers_and_picture_are_published(hub: WritableHub, copied: Path) -> None:
    put(copied, synthetic_evaluation(experts=3) | {"plan_digest": digest(copied)})
    raymoe.push(copied, "org/name")
    there = hub.files("org/name")
    card = there["README.md"].decode()
    assert card.count("## Evaluation") == 1 and "(routing.svg)" in card
    assert card.index("## Routing") < card.index("## Evaluation") < card.index("## Use it")
    assert ElementTree.fromstring(there["routing.svg"]).tag == "{http://www.w3.org/2000/svg}svg"
    assert "eval.json" not in there, "it holds the texts themselves"
    assert raymoe.push(copied, "org/name").sent == ()


def test_a_copy_is_published_with_the_picture_of_its_card(hub: WritableHub, copied: Path, tmp_path: Path) -> None:
    put(copied, synthetic_evaluation(experts=3) | {"plan_digest": digest(copied)})
    raymoe.push(copied, "org/name")
    (tmp_path / "copy").mkdir()
    for name, content in hub.files("org/name").items():
        (tmp_path / "copy" / name).write_bytes(content)
    raymoe.push(tmp_path / "copy", "org/second")
    assert hub.files("org/second")["routing.svg"] == hub.files("org/name")["routing.svg"]
    assert hub.files("org/second")["README.md"].decode().count("## Evaluation") == 1


@pytest.mark.parametrize(
    "result",
    [
        synthetic_evaluation(experts=3),  # of which merge it is, is not known
        synthetic_evaluation(experts=3) | {"plan_digest": "of another"},
        {"plan_digest": None, "data": {}, "routing": {}},
        {"plan_digest": None, **synthetic_evaluation(experts=3), "routing": []},
        {"plan_digest": None, **synthetic_evaluation(experts=3), "experts": "abc", "data": 3},
        [1, 2],
    ],
)
def test_what_is_no_evaluation_of_this_merge(
    hub: WritableHub, copied: Path, result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(result, dict) and result.get("plan_digest", "") is None:
        result["plan_digest"] = digest(copied)
    put(copied, result)
    raymoe.push(copied, "org/name", quiet=False)
    there = hub.files("org/name")
    assert "## Evaluation" not in there["README.md"].decode() and "routing.svg" not in there
    assert re.search(
        "note: eval.json is not in the card: it (belongs to another merge|is not)", capsys.readouterr().err
    )


def test_text_of_an_evaluation_does_nothing() -> None:
    plain = synthetic_evaluation(experts=3)
    first = next(iter(plain["data"]["per_label"]))
    result = json.loads(json.dumps(plain).replace(json.dumps(first), json.dumps(HOSTILE)))
    section, picture = evaluation_section(result), routing_picture(result)
    tables = [part.splitlines() for part in section.split("\n\n") if part.startswith("| ")]
    assert [len({row.replace("\\|", "").count("|") for row in rows}) for rows in tables] == [1, 1]
    assert "\x1b" not in section + picture and "\u202e" not in section
    assert "<script" not in picture
    assert ElementTree.fromstring(picture) is not None


def test_a_section_of_ones_own_stays() -> None:
    card = "# A\n\n## Evaluation\n\nMine.\n"
    assert with_evaluation(card, synthetic_evaluation()) == card
    assert with_evaluation("# A", synthetic_evaluation()).startswith("# A\n## Evaluation\n\nLoss on ")


def test_more_cells_than_a_picture_has_room_for() -> None:
    result = synthetic_evaluation(experts=3)
    result["data"]["per_label"] = {str(number): {} for number in range(3000)}
    with pytest.raises(ValueError, match="more than 4,096 pairs"):
        routing_picture(result)
