"""Whether a mixture is one of raymoe's: what a GGUF file of it would leave out or get wrong is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isclose

import numpy as np

from raymoe.errors import Problem, ProblemReport
from raymoe.evaluation.models import EvaluatedModel
from raymoe.gguf.targets import AS_WRITTEN
from raymoe.sources.types import ModelFacts, TensorEntry

__all__ = ["Chunks", "check_mixture", "is_zero"]

Chunks = Callable[[TensorEntry], Iterator[memoryview]]
"""The bytes of a tensor in order; each chunk is valid until the next one is asked for."""

# ERNIE's, GLM's and DeepSeek's addition to router scores, on which only the choice of experts depends: a merge's is 0.
_ADDED = "e_score_correction_bias"
# Settings of other mixtures that raymoe's have at these values, or not at all. LFM2's factor, 1.000002 at most, takes
# back what transformers adds to a sum and llama.cpp does not.
_PLAIN = {"routed_scaling_factor": 1.0, "n_group": 1}
_NEARLY = 3e-6
_SHOWN = 4


def is_zero(entry: TensorEntry, chunks: Chunks) -> bool:
    """Whether every number of a tensor is zero; it is read as far as that takes."""
    return not any(np.frombuffer(chunk, dtype=np.uint8).any() for chunk in chunks(entry))


def check_mixture(facts: ModelFacts, model: EvaluatedModel, chunks: Chunks) -> None:
    """Raises ProblemReport for what a file of this mixture would leave out or get wrong.

    Additions to router scores of zeros are no loss; other tensors, sizes and settings that raymoe does not write are.
    """
    used = {ref.entry.name for ref in model.weights.values()}
    left = []
    for name, entry in sorted(facts.index.tensors.items()):
        if name in used or name.endswith(model.spec.family.ignored):
            continue
        if not name.endswith(_ADDED) or not is_zero(entry, chunks):
            left.append(name)
    found = [f"{len(left)} tensor(s) have no place in the file: {', '.join(left[:4])}"] if left else []
    for name, expected in _shapes(model):
        if (shape := model.weights[name].entry.shape) != expected:
            found.append(f"{model.weights[name].entry.name} has shape {shape}, expected {expected}")
    for key, plain in _PLAIN.items():
        value = facts.config.get(key)
        if value is not None and not (isinstance(value, float | int) and isclose(value, plain, rel_tol=_NEARLY)):
            found.append(f"{key} is {value!r}, and only {plain!r} is converted")
    if found:
        raise ProblemReport([Problem(where=facts.label, what=what, remedy=AS_WRITTEN) for what in found[:_SHOWN]])


def _shapes(model: EvaluatedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape that it must have) of each tensor; how wide experts are, the first of them says."""
    spec, rule = model.spec, model.rule
    assert rule is not None
    for row, _, name in spec.tensors():
        if not row.is_ffn:
            yield name, spec.shape_of(row)
    width = model.weights[f"model.layers.0.{spec.family.ffn}.experts.0.up"].entry.shape[0]
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}.{spec.family.ffn}."
        yield f"{prefix}router", (rule.experts, spec.hidden)
        for expert in range(rule.experts):
            yield f"{prefix}experts.{expert}.gate", (width, spec.hidden)
            yield f"{prefix}experts.{expert}.up", (width, spec.hidden)
            yield f"{prefix}experts.{expert}.down", (spec.hidden, width)
