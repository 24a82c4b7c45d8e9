"""Planning: facts in, MergePlan out, without Ray and torch. Only plan_merge.py reads files; the rest is pure."""

from raymoe.planning.build import build_plan
from raymoe.planning.plan import MergeOptions, MergePlan

__all__ = ["MergeOptions", "MergePlan", "build_plan"]
