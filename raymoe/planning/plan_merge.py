"""Makes a plan from a config: reads the files that the config names (prompts, configs, headers), and plans the merge.

    MergeConfig --read_prompts, resolve_models--> MergeConfig, ModelFacts --build_plan--> MergePlan

This is the only module of the package that reads files. Of weights, it reads a few KiB of local files, to report
differences between models. All problems are in one report.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache

from raymoe.config import MergeConfig, check_config
from raymoe.errors import Problem, ProblemCollector, ProblemReport
from raymoe.planning import MergeOptions, MergePlan, build_plan
from raymoe.planning.prompt_checks import prompt_checks
from raymoe.sources.facts import ModelFacts, SourceFile
from raymoe.sources.hub import HubOptions
from raymoe.sources.kept_reads import KeptReads
from raymoe.sources.prompt_sampling import chat_template_problems, read_prompts
from raymoe.sources.resolve import RemoteFolderResolver, fetch_file, resolve_models, with_contents
from raymoe.sources.tensor_samples import sampled_differences
from raymoe.sources.tokenizer_files import tokenizer_facts, with_tokenizer_code


@contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """Turn Python's collector of reference cycles off meanwhile. A plan of thousands of models allocates millions of
    objects that stay, and looking through them again and again took a fifth of the planning time of 1,024 models."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_cycle_collection()
def plan_merge(
    config: MergeConfig,
    options: MergeOptions | None = None,
    *,
    hub: HubOptions | None = None,
    allow_all_same: bool = False,
    remote_folders: RemoteFolderResolver | None = None,
    kept: KeptReads | None = None,
) -> MergePlan:
    """Plan a merge: reads configs, file headers and prompts, no weights.

    Raises ProblemReport with all problems of the config, its models and its files of prompts. `remote_folders` looks
    for folders that are not here on the nodes of a cluster. `kept` has what an earlier run of this merge has read of
    objects, and gets what this one reads.
    """
    if wrong := check_config(config, allow_all_same=allow_all_same):
        raise ProblemReport(wrong)
    collector = ProblemCollector()
    concrete = collector.run(read_prompts, config)
    of_base = [config.base_model]
    facts = collector.run(resolve_models, config.models, hub, config.storage, remote_folders, of_base, kept, of_base)
    if facts is None:
        raise collector.report()
    base = facts[config.base_model]
    with remote_folders.connection(side.file for side in base.side_files) if remote_folders else nullcontext():
        read = cache(
            remote_folders.read if remote_folders else lambda file: fetch_file(file, hub, config.storage).read_bytes()
        )
        collector.problems += chat_template_problems(config, base, hub, remote_folders)
        base = collector.run(with_side_files, base, read) or base
        tokenizer = collector.run(tokenizer_facts, base.side_files, read) if config.reads_prompts else None
    if collector.problems or concrete is None:
        raise collector.report()
    differing = {model.label: sampled_differences(base.index, model.index) for model in facts.values()}
    planned = build_plan(concrete, {**facts, config.base_model: base}, options or MergeOptions(), differing)
    problems: list[Problem] = []
    warnings = list(planned.warnings)
    if tokenizer is not None:
        for plan in planned.prompt_plans:
            found, more = prompt_checks(plan, tokenizer)
            problems += found
            warnings += more
    if problems:
        raise ProblemReport(list(dict.fromkeys(problems)))
    return replace(planned, warnings=tuple(dict.fromkeys(warnings)))


def with_side_files(base: ModelFacts, read: Callable[[SourceFile], bytes]) -> ModelFacts:
    """A base with the code of its tokenizer, and with checksums of its small files."""
    return with_contents(with_tokenizer_code(base, read), read)
