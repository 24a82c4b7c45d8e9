"""The evaluation section of a published card: a table of losses, and a picture of the routing.

The evaluation is untrusted: its text is shown in code spans, and `evaluation_section` raises ValueError for invalid
content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raymoe.formatting import human_count
from raymoe.report import svg
from raymoe.report.eval_numbers import (
    MEAN,
    loss_rows,
    own_expert,
    perplexity,
    read_labels,
    read_loss,
    top_k_name,
    top_k_rows,
)
from raymoe.report.eval_page import page_style, replace_forbidden
from raymoe.report.model_card import code_span

PICTURE_NAME = "routing.svg"
_HEADING = "## Evaluation"
_BEFORE = ("## Use it", "## License", "## How it was made")
_MAX_LABELS = 6
_MAX_CELLS = 4096
_MODELS = {
    "merged": "this model",
    "base": "the base model",
    "hidden": "this model with routers of gate mode `hidden`",
    "oracle": "this model, with each text routed to its own expert",
    "average": "a plain average of the experts",
    "experts": "each expert alone, on its own texts",
}


def with_evaluation(card: str, result: Mapping[str, Any]) -> str:
    """The card with an evaluation section; unchanged if it has one already.

    Raises ValueError if `result` is not an evaluation.
    """
    lines = card.splitlines(keepends=True)
    if any(line.rstrip() == _HEADING for line in lines):
        return card
    at = next((number for number, line in enumerate(lines) if line.rstrip() in _BEFORE), len(lines))
    before = "".join(lines[:at])
    gap = "" if before.endswith("\n") else "\n"
    return f"{before}{gap}{evaluation_section(result)}\n{''.join(lines[at:])}"


def evaluation_section(result: Mapping[str, Any]) -> str:
    """The section as Markdown. Raises ValueError if `result` is not an evaluation."""
    try:
        return "".join(f"{line}\n" for line in _section(result))
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is not an evaluation of raymoe: {type(error).__name__}") from error


def routing_picture(result: Mapping[str, Any]) -> str:
    """A picture of which experts each kind of text is routed to, as the text of an SVG file.

    Raises ValueError if `result` is not an evaluation.
    """
    try:
        labels, experts = read_labels(result), result["experts"]
        if len(labels) * len(experts) > _MAX_CELLS:
            raise ValueError(f"it has more than {_MAX_CELLS:,} pairs of a label and an expert")
        shares = [[float(share) for share in result["routing"]["confusion"][label]] for label in labels]
        owns = [own_expert(result, label) for label in labels]
        drawing = svg.matrix(labels, experts, shares, owns, "First choices of each kind of text, by expert")
        return svg.as_file(replace_forbidden(drawing), page_style())
    except (LookupError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"it is not an evaluation of raymoe: {type(error).__name__}") from error


def _section(result: Mapping[str, Any]) -> Iterator[str]:
    data, routing = result["data"], result["routing"]
    labels = read_labels(result)[:_MAX_LABELS]
    yield _HEADING
    yield ""
    size = f"{data['texts']:,} texts ({data['tokens']:,} tokens)"
    yield f"Loss on {size}, in nats per token, with the perplexity in brackets. Lower is better."
    yield ""
    yield "| model | mean |" + "".join(f" {code_span(label)} |" for label in labels)
    yield "|---|---:|" + "---:|" * len(labels)
    names = {f"expert {name}": f"expert {code_span(name)}" for name in result["experts"]} | _MODELS
    for model in loss_rows(result):
        name = names.get(model) or code_span(model)
        yield f"| {name} |" + "".join(f" {_cell(read_loss(result, model, label))} |" for label in (MEAN, *labels))
    yield ""
    yield from _top_k_lines(result, labels)
    first, chosen = float(routing["first_accuracy_mean"]), float(routing["chosen_accuracy_mean"])
    used, count = int(result["experts_per_token"]), len(result["experts"])
    yield (
        f"A text's own expert is the first choice for {first:.0%} of tokens (chance: {1 / count:.0%}) and among the "
        f"{used} chosen for {chosen:.0%}, averaged over layers."
    )
    yield ""
    yield f"![The experts that tokens of each kind of text are routed to first]({PICTURE_NAME})"


def _top_k_lines(result: Mapping[str, Any], labels: Sequence[str]) -> Iterator[str]:
    rows = top_k_rows(result)
    if not rows:
        return
    yield "Loss with other numbers of experts for a token than that of config.json:"
    yield ""
    yield "| experts | active parameters | mean |" + "".join(f" {code_span(label)} |" for label in labels)
    yield "|---|---:|---:|" + "---:|" * len(labels)
    for row in rows:
        losses = "".join(f" {_cell(row.losses[label])} |" for label in (MEAN, *labels))
        yield f"| {top_k_name(result, row.count)} | {human_count(row.active)} |{losses}"
    yield ""


def _cell(loss: float | None) -> str:
    return "-" if loss is None else f"{float(loss):.3f} ({perplexity(float(loss))})"
