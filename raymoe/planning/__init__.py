"""Pure planning: facts in, MergePlan out. Knows neither Ray nor torch, and reads nothing."""

from raymoe.planning.build import build_plan
from raymoe.planning.types import MergeOptions, MergePlan

__all__ = ["MergeOptions", "MergePlan", "build_plan"]
