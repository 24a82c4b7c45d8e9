"""Evaluations made from a seed that obey the format of `eval.json`, of any number of experts and layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["synthetic_evaluation"]

NAMES = ("go", "metamath", "spanish", "dictionary", "sql", "legal", "medicine", "chess", "poetry", "日本語", "weather")
TEXTS = (
    "func (r *Reader) ReadByte() (byte, error) {\n\tr.lastRune = -1\n\tfor r.r == r.w {\n\t\tif r.err != nil {\n"
    "\t\t\treturn 0, r.readErr()\n\t\t}\n\t\tr.fill() // buffer is empty\n\t}\n\tc := r.buf[r.r]\n\treturn c, nil\n}",
    "${\n  syl.1 $e |- ( ph -> ps ) $.\n  syl.2 $e |- ( ps -> ch ) $.\n  $( An inference version of the transitive "
    "laws for implication. $)\n  syl $p |- ( ph -> ch ) $= ? $.\n$}",
    "Abre un cuadro de diálogo en el que puede seleccionar la impresora predeterminada para el documento actual. "
    "¿Qué páginas desea imprimir? Elija «Todas» o escriba un intervalo, por ejemplo 3-6.",
    "hornbill: bird of tropical Africa and Asia having a very large bill surmounted by a bony protuberance\n"
    "estuary: the wide part of a river where it nears the sea; fresh and salt water mix",
)


def synthetic_evaluation(experts: int = 4, layers: int = 30, seed: int = 0, used: int = 2) -> dict[str, Any]:
    """Routing that gets surer with depth, one label an expert, and losses in their usual order."""
    rng = np.random.default_rng(seed)
    names = [NAMES[n] if n < len(NAMES) else f"expert-with-a-long-name-{n}" for n in range(experts)]
    used = min(used, experts)
    sharpness = np.linspace(1.0, 5.0, layers) + rng.normal(0, 0.4, layers)
    scores_DLTE = rng.gumbel(size=(experts, layers, 200, experts)) + rng.normal(0, 0.5, (layers, 1, experts))
    scores_DLTE += rng.normal(0, 1.2, (experts, 1, 200, experts))  # tokens that all layers find hard
    for label in range(experts):
        scores_DLTE[label, :, :, label] += sharpness[:, None] * rng.uniform(0.6, 1.3)
        scores_DLTE[label, :, :, (label + 1) % experts] += rng.uniform(0, 1)
    order = np.argsort(-scores_DLTE, axis=-1)
    first = np.eye(experts)[order[..., 0]].mean(axis=2)
    chosen = sum(np.eye(experts)[order[..., slot]] for slot in range(used)).mean(axis=2)
    load = chosen.mean(axis=0) / used
    entropy = -(load * np.log(np.maximum(load, 1e-12))).sum(axis=1) / np.log(experts)
    own = np.arange(experts)
    first_accuracy, chosen_accuracy = first[own, :, own].mean(axis=0), chosen[own, :, own].mean(axis=0)
    tokens = {name: int(rng.integers(4000, 8000)) for name in names}
    loss = _losses(names, rng)
    means = {model: loss[model]["mean"] for model in ("hidden", "merged", "oracle")}
    return {
        "format": 1,
        "model": "out/demo",
        "architecture": "mixtral",
        "gate_mode": "ridge",
        "prompt_model": "grafted",
        "backbone": "linear",
        "layers": layers,
        "experts_per_token": used,
        "by_experts_per_token": [
            {
                "experts_per_token": count,
                "active_parameters": 100_000_000 + 50_000_000 * count,
                "loss": {label: value + 0.1 * abs(count - used) for label, value in loss["merged"].items()},
            }
            for count in range(1, experts + 1)
        ],
        "experts": names,
        "data": {
            "file": "examples/heldout.jsonl",
            "texts": 40 * experts,
            "tokens": sum(tokens.values()),
            "per_label": {name: {"expert": n, "texts": 40, "tokens": tokens[name]} for n, name in enumerate(names)},
        },
        "compared": {},
        "loss": loss,
        "gap_closed": (means["hidden"] - means["merged"]) / (means["hidden"] - means["oracle"]),
        "routing": {
            "first_choice": dict(zip(names, first.tolist())),
            "chosen": dict(zip(names, chosen.tolist())),
            "weight": dict(zip(names, (chosen / used).tolist())),
            "first_accuracy": first_accuracy.tolist(),
            "chosen_accuracy": chosen_accuracy.tolist(),
            "first_accuracy_mean": float(first_accuracy.mean()),
            "chosen_accuracy_mean": float(chosen_accuracy.mean()),
            "load": load.tolist(),
            "load_entropy": entropy.tolist(),
            "confusion": dict(zip(names, first.mean(axis=1).tolist())),
        },
        "samples": [
            {"label": name, "tokens": _tokens(TEXTS[n % len(TEXTS)], order[n, :, :, 0], experts)}
            for n, name in enumerate(names)
        ],
        "warnings": [],
    }


def _losses(names: Sequence[str], rng: np.random.Generator) -> dict[str, dict[str, float]]:
    base = rng.uniform(2.6, 3.5, len(names))
    oracle = base - rng.uniform(0.6, 1.8, len(names))
    gap = base - oracle
    rows = {
        "merged": oracle + gap * rng.uniform(0.04, 0.08, len(names)),
        "base": base,
        "oracle": oracle,
        "hidden": oracle + gap * rng.uniform(0.2, 0.45, len(names)),
    }
    rows["average"] = oracle + gap * 0.5
    rows["experts"] = oracle - 0.01
    for n, name in enumerate(names):
        rows[f"expert {name}"] = base + rng.uniform(-0.05, 0.3, len(names))
        rows[f"expert {name}"][n] = oracle[n] - 0.01
    return {model: {**dict(zip(names, map(float, row))), "mean": float(row.mean())} for model, row in rows.items()}


def _tokens(text: str, first_LT: np.ndarray, experts: int) -> list[dict[str, Any]]:
    """Pieces of at most four characters, as a tokenizer might cut; a space goes with what follows it."""
    pieces = re.findall(r"\n+|\t+| ?[^\s]{1,4}|\s", text)[:120]
    return [
        {"text": piece, "experts": np.bincount(first_LT[:, t % first_LT.shape[1]], minlength=experts).tolist()}
        for t, piece in enumerate(pieces)
    ]
