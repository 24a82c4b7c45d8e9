"""What each engine makes of a planned merge, for the plan's JSON and the model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raymoe.engines import ENGINES, UNKNOWN, judge
from raymoe.engines.table import READ, RUN
from raymoe.planning.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLine:
    """What one engine makes of a merge.

    Attributes:
        engine: Its name, a key of `ENGINES`.
        title: Its name for readers.
        version: The version that was run or read; empty if it was not looked at.
        verdict: `same`, `otherwise`, `fails` or `unknown`.
        found: `run` or `read`; empty if it was not looked at.
        reason: Why, or a remark.
        remedy: An option of the engine that helps, or that the merge needs.
        commands: The commands that serve it, with `{model}` in place of its name.
    """

    engine: str
    title: str
    version: str
    verdict: str
    found: str
    reason: str
    remedy: str
    commands: tuple[str, ...]


def engine_lines(plan: MergePlan) -> Iterator[EngineLine]:
    """One line per engine, in the order of `ENGINES`. No engine was looked at with merges that read images."""
    for engine in ENGINES.values():
        verdict = judge(engine.name, "" if plan.reads_images else plan.architecture, plan.features)
        found = "" if verdict.status == UNKNOWN else RUN if verdict.was_run else READ
        yield EngineLine(
            engine=engine.name,
            title=engine.title,
            version=verdict.version,
            verdict=verdict.status,
            found=found,
            reason=verdict.reason,
            remedy=verdict.remedy(plan.config),
            commands=engine.commands,
        )
