"""`evaluate_texts`: evaluates a merge or a dense model, whichever a name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymoe.evaluation.dense_run import evaluate_dense
from raymoe.evaluation.models import is_merge
from raymoe.evaluation.options import EvaluationOptions
from raymoe.evaluation.run import evaluate_merge


def evaluate_texts(model: str | Path, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate a model on a file of labeled texts; the result is what eval.json holds.

    Args:
        model: Folder or URL of a merge, or a dense model as a config names it.
        data: The file of texts.
        options: What to compare with, and how.

    Returns:
        Losses, and for a merge how its routers distribute tokens.

    Raises:
        ProblemReport: Before anything is computed, with everything that is wrong.

    Example:
        >>> evaluate_texts("org/model", "texts.jsonl", EvaluationOptions(device="cpu"))["loss"]["model"]
    """
    if is_merge(model, options.storage):
        return evaluate_merge(model, data, options)
    return evaluate_dense(str(model), data, options)
