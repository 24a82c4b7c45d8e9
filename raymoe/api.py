"""The Python interface: what the commands do, as functions. `import raymoe` gives these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.config import MergeConfig, check_config, load_config, make_config
from raymoe.errors import ProblemReport
from raymoe.planning import MergeOptions, MergePlan, build_plan
from raymoe.sources.resolve import HubOptions, resolve_models

if TYPE_CHECKING:
    from raymoe.runtime.merge import MergeResult
    from raymoe.runtime.settings import RuntimeSettings

__all__ = ["load_config", "merge", "plan"]


def plan(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    options: MergeOptions | None = None,
    *,
    hub: HubOptions | None = None,
    allow_all_same: bool = False,
) -> MergePlan:
    """Plan a merge: reads configs and file headers, no weights.

    `config` is a MergeConfig, the same as a mapping, or the path of a YAML file. Raises ProblemReport with everything
    that is wrong with the config or its models.
    """
    checked = _config(config, allow_all_same)
    models = [checked.base_model, *(e.source_model for e in (*checked.experts, *checked.shared_experts))]
    return build_plan(checked, resolve_models(models, hub, checked.storage), options or MergeOptions())


def merge(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    settings: RuntimeSettings | None = None,
    allow_all_same: bool = False,
) -> MergeResult:
    """Merge into `output`, a folder or a URL, on Ray: the connected cluster, or the one of `settings`, or a local one.

    Raises ProblemReport before anything is written and MergeFailed afterwards; after either, or any death, the
    same call goes on from the shards that are finished.
    """
    from raymoe.runtime.merge import output_of, run_merge
    from raymoe.runtime.settings import RuntimeSettings

    settings = settings or RuntimeSettings(verbosity=-1)
    checked = _config(config, allow_all_same)
    settings = replace(settings, storage=checked.storage)
    try:
        merge_plan = plan(checked, options, hub=settings.hub, allow_all_same=True)
    except ProblemReport as report:
        # What is wrong with the output besides is told in the same breath.
        target = output_of(output, settings)
        also = target.problems(digest=None, output_bytes=0, overwrite=settings.overwrite)
        raise (ProblemReport([*report.problems, *also]) if also else report) from None
    return run_merge(merge_plan, checked, output, settings)


def _config(config: MergeConfig | Mapping[str, Any] | str | Path, allow_all_same: bool) -> MergeConfig:
    if isinstance(config, (str, Path)):
        return load_config(config, allow_all_same=allow_all_same)
    if isinstance(config, Mapping):
        return make_config(config, allow_all_same=allow_all_same)
    if problems := check_config(config, allow_all_same=allow_all_same):
        raise ProblemReport(problems)
    return config
