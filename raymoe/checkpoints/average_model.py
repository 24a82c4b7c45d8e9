"""The mean of dense models as a model of its own. It is never written: its tensors are combined when they are loaded.

Tensors are combined as those of a merge with `backbone: linear` are (storage/combine.py): in float32, in blocks, model
by model in their order. Here that is done to all tensors, FFNs included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.errors import Problem, ProblemReport
from raymoe.planning.backbone import combination_obstacle
from raymoe.planning.plan import Combination, WeightRef
from raymoe.tensor_names import EMBEDDING, HEAD


def average_model(models: Sequence[CheckpointModel]) -> CheckpointModel:
    """The mean of all tensors of dense models, adapters included, with equal weights.

    Config and layout are those of the first model, or of the first one with a head of its own, if there is one. The
    head of a model with tied embeddings is its embedding. A row of an embedding that only some models have is the mean
    of theirs.

    Args:
        models: One or more dense models.

    Returns:
        A model whose values are float32, and are rounded no further.

    Raises:
        ProblemReport: With the first model that can't be averaged with the others, and why.

    Example:
        >>> average_model([dense_model(go, "expert 0"), dense_model(law, "expert 1")])
    """
    layout = next((model for model in models if not model.spec.tied), models[0])
    for model in models:
        if reason := _find_obstacle(model, layout):
            where, what = model.label, f"it can't be averaged with {layout.label}, since {reason}"
            remedy = "average fine-tunes of one model only"
            raise ProblemReport([Problem(where=where, what=what, remedy=remedy)])
    weights = {name: _mean([_weight(model, name) for model in models], layout.weights[name]) for name in layout.weights}
    return replace(layout, label=f"the average of {', '.join(model.label for model in models)}", weights=weights)


def _weight(model: CheckpointModel, name: str) -> WeightRef:
    return model.weights[EMBEDDING if name == HEAD and model.spec.tied else name]


def _mean(refs: Sequence[WeightRef], layout: WeightRef) -> WeightRef:
    """The mean of one tensor of all models; that tensor, if all of them have the same."""
    if all(ref == layout for ref in refs):
        return layout
    combination = Combination(
        method="linear",
        base=layout,
        experts=tuple(refs),
        weights=(1.0,) * len(refs),
        scale=1.0,
        density=1.0,
        dtype="F32",
    )
    return WeightRef(entry=layout.entry, combined=combination)


def _find_obstacle(model: CheckpointModel, layout: CheckpointModel) -> str | None:
    """Why a model can't be averaged in the other one's layout; None if it can."""
    if model.spec.model_type != layout.spec.model_type:
        return f"it is a {model.spec.model_type} model"
    if model.head_permutation != layout.head_permutation:
        return "only one of them has the rows of its heads in the order of a mixture"
    if model.spec.layers != layout.spec.layers:
        return f"it has {model.spec.layers} layers, and not {layout.spec.layers}"
    if lone := sorted((model.weights.keys() ^ layout.weights.keys()) - {HEAD}):
        return f"only one of them has {lone[0]}"
    for row, _, name in layout.spec.tensors():
        base, entry = layout.weights[name].entry, _weight(model, name).entry
        if obstacle := combination_obstacle(row, base, entry, model.spec, layout.spec, "the other's"):
            return f"{obstacle} ({name})"
    return None
