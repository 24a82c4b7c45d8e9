"""raymoe: Mixture-of-Experts checkpoints out of several dense language models, on Ray.

    import raymoe

    config = raymoe.load_config("config.yaml")
    print(raymoe.plan(config).totals)
    raymoe.merge(config, "out")
    raymoe.evaluate("out", "held-out.jsonl")["loss"]
    raymoe.push("out", "org/name", private=True)

Importing this is cheap: torch, transformers and Ray are imported where they are used, if they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymoe.api import evaluate, load_config, merge, plan, push

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_config", "merge", "plan", "push"]


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "load_config", "plan", "merge", "push"):
        from raymoe import api

        return getattr(api, name)
    raise AttributeError(f"module 'raymoe' has no attribute {name!r}")
