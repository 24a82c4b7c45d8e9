"""An evaluation as one self-contained HTML page: pictures of losses and of how tokens are routed.

Three parts: this module turns an evaluation into a view (plain data and finished drawings), svg.py draws, and the
template in this folder defines the layout. The template escapes every text by default; its style sheet holds all
colors, for light and dark. Its content security policy forbids loading anything from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from raymoe.formatting import human_count
from raymoe.report import svg
from raymoe.report.eval_numbers import (
    MEAN,
    best_loss,
    is_dense,
    loss_rows,
    mean_load,
    merge_origin,
    own_expert,
    own_expert_loss,
    perplexity,
    read_labels,
    read_loss,
    references,
    routed_layers,
    top_k_name,
    top_k_rows,
    weakest_layers,
)

if TYPE_CHECKING:
    from jinja2 import Template

# What pictures compare, in the order in which it is drawn.
_NAMES = {
    "model": "this model",
    "base": "base model",
    "average": "plain average",
    "hidden": "hidden router",
    "merged": "this merge",
    "oracle": "right expert",
    "own": "own expert",
}
# Characters that HTML can't hold: control characters and lone surrogates, which json accepts.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def evaluation_page(result: Mapping[str, Any]) -> str:
    """The page of an evaluation (what `eval.json` holds), complete without scripts, network and other files."""
    view = {
        "result": result,
        "facts": _facts(result),
        "summary": _summary(result),
        "tiles": _tiles(result),
        "experts": [_chip(name, number) for number, name in enumerate(result.get("experts") or ())],
        "loss": _loss_view(result),
        "routing": None if is_dense(result) else _routing_view(result),
        "layers": [] if is_dense(result) else _layer_rows(result),
        "samples": [_sample(result, sample) for sample in result.get("samples") or ()],
    }
    return replace_forbidden(_template().render(view))


def replace_forbidden(text: str) -> str:
    """The text without the characters that neither HTML nor XML can hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


@cache
def page_style() -> str:
    """The style sheet, which has the drawings' colors."""
    return files("raymoe.report").joinpath("eval_page.css").read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("raymoe", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    environment.filters["percent1"] = lambda share: f"{share:.1%}"
    return environment.get_template("eval_page.html.jinja")


def _facts(result: Mapping[str, Any]) -> list[str]:
    data, experts = result["data"], []
    if not is_dense(result):
        experts = [f"{len(result['experts'])} experts, {result['experts_per_token']} for each token"]
    return [
        result["architecture"],
        *experts,
        f"{result['layers']} layers",
        *merge_origin(result),
        f"{data['texts']:,} texts, {data['tokens']:,} tokens of {data['file']}",
    ]


def _summary(result: Mapping[str, Any]) -> str:
    """The main results in one sentence."""
    if is_dense(result):
        loss = read_loss(result, "model", MEAN)
        return "" if loss is None else f"The mean loss is {loss:.2f} nats, a perplexity of {perplexity(loss)}."
    parts = [part for part in (_loss_summary(result),) if part]
    right = result["routing"]["first_accuracy_mean"]
    parts.append(f"routers choose a token's own expert first in {right:.0%} of all cases")
    if result.get("gap_closed") is not None:
        parts.append(f"{result['gap_closed']:.0%} of the gap from the hidden router to the oracle is closed")
    summary = "; ".join(parts)
    return f"{summary[0].upper()}{summary[1:]}."


def _loss_summary(result: Mapping[str, Any]) -> str | None:
    """The merge's loss beside those that it has to beat, or beside the base's."""
    merged, base = read_loss(result, "merged", MEAN), read_loss(result, "base", MEAN)
    compared = references(result) or ({} if base is None else {"the base model": base})
    if merged is None or not compared:
        return None
    gaps = [
        f"{abs(loss - merged):.2f} {'below' if merged <= loss else 'above'} {name}" for name, loss in compared.items()
    ]
    return f"the mean loss is {merged:.2f} nats: {' and '.join(gaps)}"


def _tiles(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The main numbers, each with a number to compare it with."""
    loss = read_loss(result, "model" if is_dense(result) else "merged", MEAN)
    tiles = []
    if loss is not None:
        base = read_loss(result, "base", MEAN)
        beside = "" if base is None else f"; base {base:.3f}"
        tiles.append(_tile("Mean loss", f"{loss:.3f}", f"perplexity {perplexity(loss)}{beside}"))
    return tiles if is_dense(result) else [*tiles, *_routing_tiles(result)]


def _routing_tiles(result: Mapping[str, Any]) -> list[dict[str, str]]:
    routing, count, used = result["routing"], len(result["experts"]), result["experts_per_token"]
    entropy = routing["load_entropy"]
    least = min(range(len(entropy)), key=entropy.__getitem__)
    tiles = []
    if result.get("gap_closed") is not None:
        tiles.append(_tile("Gap closed", f"{result['gap_closed']:.0%}", "from hidden router to oracle"))
    return [
        *tiles,
        _tile("Own expert first", f"{routing['first_accuracy_mean']:.1%}", f"chance {1 / count:.0%}"),
        _tile(f"Own expert in top {used}", f"{routing['chosen_accuracy_mean']:.1%}", f"chance {used / count:.0%}"),
        _tile(
            "Load entropy", f"{sum(entropy) / len(entropy):.3f}", f"1 is even; {entropy[least]:.3f} in layer {least}"
        ),
    ]


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _chip(name: str, expert: int | None) -> dict[str, Any]:
    """A name with the color of an expert."""
    return {"name": name, "expert": expert, "kind": "plain" if expert is None else svg.expert_kind(expert)}


def _compared_losses(result: Mapping[str, Any], label: str) -> list[svg.Mark]:
    """Losses that a picture compares, in the order in which they are drawn; further models come last."""
    further = {name: read_loss(result, name, label) for name in result.get("compared") or ()}
    losses = {
        kind: own_expert_loss(result, label) if kind == "own" else read_loss(result, kind, label)
        for kind in _NAMES
        if kind not in further  # of a dense model, further models may have any name
    }
    named = [(_NAMES[kind], kind, loss) for kind, loss in losses.items()]
    named += [(name, "further", loss) for name, loss in further.items()]
    return [
        svg.Mark(name=name, value=loss, text=f"{loss:.3f}", kind=kind, title=f"perplexity {perplexity(loss)}")
        for name, kind, loss in named
        if loss is not None
    ]


def _loss_view(result: Mapping[str, Any]) -> dict[str, Any]:
    labels, columns = read_labels(result), [*read_labels(result), MEAN]
    compared = {label: marks for label in labels if (marks := _compared_losses(result, label))}
    largest = max((mark.value for marks in compared.values() for mark in marks), default=0.0)
    panels = [
        {**_chip(label, own_expert(result, label)), "drawing": _loss_bars(label, marks, largest)}
        for label, marks in compared.items()
    ]
    table = [
        {"name": model, "cells": [_loss_cell(result, model, label) for label in columns]} for model in loss_rows(result)
    ]
    means = _compared_losses(result, MEAN)
    top_k = [
        {
            "name": top_k_name(result, row.count),
            "active": human_count(row.active),
            "share": "–" if row.share is None else f"{row.share:.2f}x",
            "cells": [_top_k_cell(row.losses[label]) for label in columns],
        }
        for row in top_k_rows(result)
    ]
    return {
        "top_k": top_k,
        "ladder": _ladder(means),
        "compared": {mark.kind for mark in means},
        "panels": panels,
        "columns": columns,
        "table": table,
    }


def _loss_bars(label: str, marks: Sequence[svg.Mark], largest: float) -> Markup:
    title = ", ".join(f"{mark.name} {mark.text}" for mark in marks)
    return svg.bars(marks, largest, f"Loss on {label}: {title}")


def _loss_cell(result: Mapping[str, Any], model: str, label: str) -> dict[str, Any]:
    loss = read_loss(result, model, label)
    if loss is None:
        return {"loss": "–", "perplexity": "", "best": False}
    return {"loss": f"{loss:.3f}", "perplexity": perplexity(loss), "best": loss == best_loss(result, label)}


def _top_k_cell(loss: float | None) -> dict[str, str]:
    return {"loss": "–" if loss is None else f"{loss:.3f}", "perplexity": "" if loss is None else perplexity(loss)}


def _ladder(marks: Sequence[svg.Mark]) -> Markup | None:
    """Mean losses on one axis; nothing if there is nothing to compare with."""
    if len(marks) < 2:
        return None
    # The label of the merge or model is the most important: it is placed first, on the lowest row.
    marks = sorted(marks, key=lambda mark: (mark.kind not in ("merged", "model"), mark.value))
    span = ("hidden", "oracle", "merged") if {"hidden", "oracle", "merged"} <= {mark.kind for mark in marks} else None
    caption = ", ".join(f"{mark.name} {mark.text}" for mark in sorted(marks, key=lambda mark: mark.value))
    return svg.ladder(marks, span, f"Mean loss, lower is better: {caption}")


def _routing_view(result: Mapping[str, Any]) -> dict[str, Any]:
    routing, experts, labels = result["routing"], result["experts"], read_labels(result)
    owns = [own_expert(result, label) for label in labels]
    heatmaps = []
    for label, own in zip(labels, owns):
        rows_LE = routing["first_choice"][label]
        share = None if own is None else routing["confusion"][label][own]
        caption = f"Share of {label} tokens routed first to each expert, by layer"
        drawing = svg.heatmap(rows_LE, experts, own, caption, numbers=routed_layers(result))
        heatmaps.append({**_chip(label, own), "share": share, "drawing": drawing})
    confusion = [routing["confusion"][label] for label in labels]
    weakest = weakest_layers(result)
    return {
        "heatmaps": heatmaps,
        "matrix": svg.matrix(labels, experts, confusion, owns, "First choices of each kind of text, by expert"),
        "confusion": [{"name": label, "shares": shares} for label, shares in zip(labels, confusion)],
        "lines": _accuracy_lines(result),
        "weakest": ", ".join(f"layer {layer} ({accuracy:.0%})" for layer, accuracy in weakest),
        "stack": svg.stack(
            routing["load"],
            experts,
            routing["load_entropy"],
            "Share of the work by expert in each layer",
            numbers=routed_layers(result),
        ),
        "load": _load_bars(result),
    }


def _accuracy_lines(result: Mapping[str, Any]) -> Markup:
    routing, count, used = result["routing"], len(result["experts"]), result["experts_per_token"]
    first, chosen = routing["first_accuracy"], routing["chosen_accuracy"]
    series = [
        svg.Series(name="first choice", values=first, chance=1 / count, kind="first"),
        svg.Series(name=f"among the {used} chosen", values=chosen, chance=used / count, kind="chosen"),
    ]
    caption = f"Accuracy by layer: first choice {min(first):.0%} to {max(first):.0%}"
    caption = f"{caption}, among the chosen {min(chosen):.0%} to {max(chosen):.0%}"
    return svg.lines(series, routed_layers(result), caption)


def _load_bars(result: Mapping[str, Any]) -> Markup:
    rows = []
    for number, (name, share) in enumerate(zip(result["experts"], mean_load(result))):
        rows.append(svg.Mark(name=name, value=share, text=f"{share:.1%}", kind=svg.expert_kind(number)))
    even = 1 / len(rows)
    caption = ", ".join(f"{row.name} {row.text}" for row in rows)
    largest = max(*(row.value for row in rows), even)
    return svg.bars(rows, largest, f"Share of the work, mean over layers: {caption}", width=340, rule=even)


def _layer_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    routing = result["routing"]
    columns = (routing["first_accuracy"], routing["chosen_accuracy"], routing["load_entropy"], routing["load"])
    return [
        {"layer": layer, "first": first, "chosen": chosen, "entropy": f"{entropy:.3f}", "load": load}
        for layer, (first, chosen, entropy, load) in zip(routed_layers(result), zip(*columns))
    ]


def _sample(result: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    own = own_expert(result, sample["label"]) if sample["label"] in result["data"]["per_label"] else None
    tokens = [_token(result["experts"], token["text"], token["experts"]) for token in sample["tokens"]]
    right = sum(token["expert"] == own for token in tokens) / len(tokens) if tokens and own is not None else None
    return {**_chip(sample["label"], own), "right": right, "tokens": tokens}


def _token(experts: Sequence[str], text: str, counts: Sequence[int]) -> dict[str, Any]:
    """A token with the expert that most layers choose first. In a tie, the lower number wins, as everywhere."""
    layers = sum(counts)
    winner = max(range(len(counts)), key=counts.__getitem__)
    order = sorted((n for n in range(len(counts)) if counts[n]), key=lambda n: -counts[n])
    title = ", ".join(f"{experts[n]} {counts[n]}" for n in order) + f" of {layers} layers"
    strength = f"{counts[winner] / layers:.2f}" if layers else "0"
    return {
        "expert": winner,
        "kind": svg.expert_kind(winner),
        "strength": strength,
        "title": title,
        "text": _visible(text),
    }


def _visible(text: str) -> str:
    """A token's text with signs for invisible characters: ends of lines, tabs, lone spaces, control characters."""
    if not text:
        return "∅"
    if not text.strip(" "):
        return "·" * len(text)
    signs = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t", "\x7f": "␡", "\u00a0": "⍽"}
    return "".join(signs.get(c, chr(0x2400 + ord(c)) if c < " " else c) for c in text)
