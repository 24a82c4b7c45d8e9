"""Runs a plan's gate jobs and shard jobs on actors that start for it and end after it."""

from __future__ import annotations

from raymoe.object_store.location import Location
from raymoe.planning.plan import MergePlan
from raymoe.runtime.actor_plan import ActorPlan
from raymoe.runtime.actors import expert_actors
from raymoe.runtime.progress import Progress
from raymoe.runtime.scheduler import Outcome, run_jobs
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.shard_jobs import ShardWork


def run_on_actors(
    plan: MergePlan,
    work: ShardWork,
    actor_plan: ActorPlan,
    progress: Progress,
    settings: RuntimeSettings,
    *,
    output: Location,
    run: str = "",
) -> Outcome:
    """Start the actors, compute all gate rows and do `work` for every shard that needs none. Raises the first error.

    `output` is where the actors write for `run` of the journal, or read an earlier result. `progress` shows their work.
    """
    with expert_actors(actor_plan, output, settings, run) as actors:
        # Actors that only copy come last.
        gpus = [placement.gpus > 0 for placement in actor_plan.placements if not placement.only_copies]
        workers, copiers = actors[: len(gpus)], actors[len(gpus) :]
        outcome = run_jobs(
            plan,
            workers,
            work,
            progress.watch(actors),
            gpus=gpus,
            readers=actor_plan.readers,
            layers_at_once=actor_plan.layers_at_once,
            shards_at_once=actor_plan.shards_at_once,
            copiers=copiers,
            copies_at_once=actor_plan.copies_at_once,
            requirements=actor_plan.requirements,
            stall_timeout_s=settings.stall_timeout_s,
        )
        progress.final_update(actors, outcome)
        return outcome
