"""raymoe: Mixture-of-Experts checkpoints out of several dense language models, on Ray.

    import raymoe

    raymoe.plan("config.yaml")
    raymoe.merge("config.yaml", "out", overwrite=True)
    raymoe.verify("out").ok
    raymoe.edit("out", "out-2", add=["org/law"], remove=[3])
    raymoe.generate("out", "func main() {")["answers"]
    raymoe.evaluate("out", "held-out.jsonl")["loss"]
    raymoe.push("out", "org/name", private=True)

One function per command, with its options as keyword arguments. Mistakes are raised as `ProblemReport`: its `problems`
say where, what, and what to do about it. A merge that fails after it has begun raises `MergeFailed`.

Importing this is cheap: torch, transformers and Ray are imported where they are used, if they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raymoe._version import __version__

# Three lists of the same names, which tests/test_public_names.py compares: type checkers and editors read the imports
# and `__all__`, and `_HOMES` imports a name when it is used.
if TYPE_CHECKING:
    from raymoe.api import (
        archs,
        edit,
        evaluate,
        extract,
        generate,
        gguf,
        inspect,
        load_config,
        merge,
        plan,
        plan_edit,
        prune,
        push,
        push_dry_run,
        verify,
    )
    from raymoe.config import MergeConfig
    from raymoe.errors import CheckpointError, MergeFailed, Problem, ProblemReport, RaymoeError
    from raymoe.evaluation.options import EvaluationOptions, GenerationOptions
    from raymoe.planning import MergeOptions, MergePlan
    from raymoe.publish.errors import PushFailed
    from raymoe.report.evaluation_result import Evaluation
    from raymoe.results import MergeResult, PushResult, Verification
    from raymoe.runtime.settings import RuntimeSettings

__all__ = [
    "CheckpointError",
    "Evaluation",
    "EvaluationOptions",
    "GenerationOptions",
    "MergeConfig",
    "MergeFailed",
    "MergeOptions",
    "MergePlan",
    "MergeResult",
    "Problem",
    "ProblemReport",
    "PushFailed",
    "PushResult",
    "RaymoeError",
    "RuntimeSettings",
    "Verification",
    "__version__",
    "archs",
    "edit",
    "evaluate",
    "extract",
    "generate",
    "gguf",
    "inspect",
    "load_config",
    "merge",
    "plan",
    "plan_edit",
    "prune",
    "push",
    "push_dry_run",
    "verify",
]

_HOMES = {
    "raymoe.api": (
        "archs",
        "edit",
        "evaluate",
        "extract",
        "generate",
        "gguf",
        "inspect",
        "load_config",
        "merge",
        "plan",
        "plan_edit",
        "prune",
        "push",
        "push_dry_run",
        "verify",
    ),
    "raymoe.config": ("MergeConfig",),
    "raymoe.errors": ("CheckpointError", "MergeFailed", "Problem", "ProblemReport", "RaymoeError"),
    "raymoe.evaluation.options": ("EvaluationOptions", "GenerationOptions"),
    "raymoe.planning": ("MergeOptions", "MergePlan"),
    "raymoe.publish.errors": ("PushFailed",),
    "raymoe.report.evaluation_result": ("Evaluation",),
    "raymoe.results": ("MergeResult", "PushResult", "Verification"),
    "raymoe.runtime.settings": ("RuntimeSettings",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module 'raymoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
