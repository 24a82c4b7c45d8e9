"""raymoe: Mixture-of-Experts checkpoints out of several dense language models, on Ray.

    import raymoe

    config = raymoe.load_config("config.yaml")
    print(raymoe.plan(config).totals)
    raymoe.merge(config, "out")
    raymoe.generate("out", "func main() {")["answers"]
    raymoe.evaluate("out", "held-out.jsonl")["loss"]
    raymoe.push("out", "org/name", private=True)

Importing this is cheap: torch, transformers and Ray are imported where they are used, if they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raymoe._version import __version__

if TYPE_CHECKING:
    from raymoe.api import evaluate, generate, load_config, merge, plan, push
    from raymoe.errors import MergeFailed, ProblemReport
    from raymoe.evaluation.options import EvaluationOptions, GenerationOptions
    from raymoe.planning import MergeOptions
    from raymoe.runtime.settings import RuntimeSettings

__all__ = [
    "EvaluationOptions",
    "GenerationOptions",
    "MergeFailed",
    "MergeOptions",
    "ProblemReport",
    "RuntimeSettings",
    "__version__",
    "evaluate",
    "generate",
    "load_config",
    "merge",
    "plan",
    "push",
]

_FROM = {
    **dict.fromkeys(("evaluate", "generate", "load_config", "merge", "plan", "push"), "raymoe.api"),
    **dict.fromkeys(("MergeFailed", "ProblemReport"), "raymoe.errors"),
    **dict.fromkeys(("EvaluationOptions", "GenerationOptions"), "raymoe.evaluation.options"),
    "MergeOptions": "raymoe.planning",
    "RuntimeSettings": "raymoe.runtime.settings",
}


def __getattr__(name: str) -> Any:
    if name in _FROM:
        from importlib import import_module

        return getattr(import_module(_FROM[name]), name)
    raise AttributeError(f"module 'raymoe' has no attribute {name!r}")
