"""The Python interface: what the commands do, as functions. `import raymoe` gives these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.config import MergeConfig, load_config, make_config
from raymoe.errors import ProblemReport
from raymoe.object_store.options import StorageOptions
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.owner import BASE, CONFIG_KEYS, Owner
from raymoe.planning.plan_merge import plan_merge
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import RemoteFolderResolver, folders_of
from raymoe.storage.locations import Inputs, input_paths

if TYPE_CHECKING:
    from raymoe.evaluation.options import EvaluationOptions, GenerationOptions
    from raymoe.publish.repository import PushTarget
    from raymoe.publish.upload import PushResult
    from raymoe.results import MergeResult
    from raymoe.runtime.run_report import RunReport
    from raymoe.runtime.settings import RuntimeSettings

__all__ = ["evaluate", "generate", "load_config", "merge", "merge_and_push", "plan", "push", "push_dry_run"]


def plan(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    options: MergeOptions | None = None,
    *,
    hub: HubOptions | None = None,
    allow_all_same: bool = False,
    remote_folders: RemoteFolderResolver | None = None,
) -> MergePlan:
    """Plan a merge: reads configs, file headers and prompts, no weights.

    `config` is a MergeConfig, the same as a mapping, or the path of a YAML file. Raises ProblemReport with everything
    that is wrong with the config, its models or its files of prompts. Folders that are not here are looked for
    `remote_folders`, on the nodes of a cluster.
    """
    loaded = _load(config, allow_all_same)
    return plan_merge(loaded, options, hub=hub, allow_all_same=allow_all_same, remote_folders=remote_folders)


def merge(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    settings: RuntimeSettings | None = None,
    allow_all_same: bool = False,
    report: RunReport | None = None,
) -> MergeResult:
    """Merge into `output`, a folder or a URL, on Ray: the connected cluster, or the one of `settings`, or a local one.

    Raises ProblemReport before anything is written and MergeFailed afterwards; after either, or any death, the
    same call goes on from the shards that are finished. Where `output` holds this merge finished, nothing is done, and
    `was_complete` of the result is true. `report` is told how the run goes, and may be read after a failure too.
    """
    from raymoe.report.merge_description import MergeDescription
    from raymoe.runtime.coordinator import run_merge
    from raymoe.runtime.run_report import RunReport
    from raymoe.runtime.settings import RuntimeSettings

    settings, report = settings or RuntimeSettings(verbosity=-1), report or RunReport()
    loaded = _load(config, allow_all_same)
    settings = replace(settings, storage=loaded.storage, inputs=input_paths(loaded, config, settings.inputs))
    merge_plan = _plan_for_output(loaded, output, options, settings, report, allow_all_same=allow_all_same)
    description = MergeDescription(plan=merge_plan, config=loaded, hub=settings.hub)
    return run_merge(merge_plan, description, output, settings, report)


def merge_and_push(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    output: str | Path,
    target: PushTarget,
    options: MergeOptions | None = None,
    *,
    settings: RuntimeSettings | None = None,
    allow_all_same: bool = False,
    report: RunReport | None = None,
    on_merged: Callable[[MergeResult], None] | None = None,
) -> PushResult:
    """`merge`, then `push`. The token and the repository are checked before the merge starts.

    `on_merged` is called with the merge's result before the push. After any death the same call goes on: in the merge,
    or, where `output` holds this merge finished, in the push alone. Raises what `merge` raises, and PushFailed.
    """
    from raymoe.report.merge_description import MergeDescription
    from raymoe.runtime.run_report import RunReport
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.workflows import merge_and_push

    settings, report = settings or RuntimeSettings(verbosity=-1), report or RunReport()
    loaded = _load(config, allow_all_same)
    settings = replace(settings, storage=loaded.storage, inputs=input_paths(loaded, config, settings.inputs))
    merge_plan = _plan_for_output(loaded, output, options, settings, report, allow_all_same=allow_all_same)
    description = MergeDescription(plan=merge_plan, config=loaded, hub=settings.hub)
    merged = on_merged or (lambda result: None)
    return merge_and_push(merge_plan, description, output, target, settings, report, merged)


def push(
    merged: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    hub: HubOptions | None = None,
    storage: StorageOptions | None = None,
    quiet: bool = True,
) -> PushResult:
    """Publish a finished merge, a folder or a URL, as the model `repo` (org/name) on the Hub, in one commit.

    `revision` is a branch, made if it is missing. Raises ProblemReport before anything is sent and PushFailed
    afterwards; after either the same call goes on, and sends nothing again that the Hub has.
    """
    from raymoe.publish.push import push_merge
    from raymoe.publish.repository import PushTarget

    target = PushTarget(repo=repo, private=private, revision=revision, message=message)
    return push_merge(merged, target, hub or HubOptions(), storage or StorageOptions(), quiet=quiet)


def push_dry_run(
    merged: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    hub: HubOptions | None = None,
    storage: StorageOptions | None = None,
) -> Iterator[str]:
    """What `push` would do, in lines for people; nothing is made or sent. Raises ProblemReport."""
    from raymoe.publish.push import push_dry_run
    from raymoe.publish.repository import PushTarget

    target = PushTarget(repo=repo, private=private, revision=revision, message=message)
    return push_dry_run(merged, target, hub or HubOptions(), storage or StorageOptions())


def evaluate(
    merged: str | Path, data: str | Path, options: EvaluationOptions | None = None, **changes: Any
) -> dict[str, Any]:
    """Evaluate a finished merge, a folder or a URL, on a file of labelled texts, in this process.

    `changes` are fields of `EvaluationOptions`, such as `against=("oracle",)` or `limit=5`. The result is what
    eval.json holds: losses of the merge and of what it is compared with, and where its routers send the tokens.
    Raises ProblemReport, before anything is computed, with everything that is wrong.
    """
    from raymoe.evaluation.options import EvaluationOptions, parse_against
    from raymoe.evaluation.run import evaluate_merge

    if isinstance(changes.get("against"), str):
        changes["against"] = parse_against(changes["against"])
    return evaluate_merge(merged, data, replace(options or EvaluationOptions(quiet=True), **changes))


def generate(
    merged: str | Path, prompts: str | Sequence[str], options: GenerationOptions | None = None, **changes: Any
) -> dict[str, Any]:
    """Generate from a finished merge, a folder or a URL, in this process, and tell which experts worked.

    `changes` are fields of `GenerationOptions`, such as `max_new_tokens=0` or `chat=True`. The result is what
    `raymoe try --json` prints: per prompt the answer, and each expert's share of first choices and of router weight.
    Raises ProblemReport, before weights are read, with everything that is wrong.

        raymoe.generate("out", "func main() {")["answers"][0]["first_choice"]
    """
    from raymoe.evaluation.generation import generate_answers
    from raymoe.evaluation.options import GenerationOptions

    texts = [prompts] if isinstance(prompts, str) else prompts
    return generate_answers(merged, texts, replace(options or GenerationOptions(quiet=True), **changes))


def _plan_for_output(
    config: MergeConfig,
    output: str | Path,
    options: MergeOptions | None,
    settings: RuntimeSettings,
    report: RunReport,
    *,
    allow_all_same: bool,
) -> MergePlan:
    """The plan of a merge that is about to run; what is wrong with its output is told with what is wrong with it."""
    from raymoe.compute import actor_device_problems
    from raymoe.runtime.coordinator import open_target
    from raymoe.runtime.remote_folders import RayFolderResolver
    from raymoe.storage.outputs.output_checks import input_conflict

    report.storage = config.storage
    report.check_result_location()
    if device_errors := list(actor_device_problems(settings.device, settings.address, settings.gpus_per_expert)):
        raise ProblemReport(device_errors)
    try:
        with report.phase("plan"):
            remote_folders = RayFolderResolver(settings)
            return plan_merge(
                config, options, hub=settings.hub, allow_all_same=allow_all_same, remote_folders=remote_folders
            )
    except ProblemReport as refusal:
        target = open_target(output, settings)
        is_read = input_conflict(target, _with_models(settings.inputs, config, settings.hub))
        output_errors = (
            [is_read] if is_read else target.problems(digest=None, output_bytes=0, overwrite=settings.overwrite)
        )
        raise (ProblemReport([*refusal.problems, *output_errors]) if output_errors else refusal) from None


def _with_models(inputs: Inputs, config: MergeConfig, hub: HubOptions) -> Inputs:
    """With the models' folders, as far as the config alone tells where they are."""
    models = {BASE: config.base_model}
    for kind, key in CONFIG_KEYS.items():
        models |= {Owner(kind, number): expert.source_model for number, expert in enumerate(getattr(config, key))}
    folders = [(str(owner), folder) for owner, ref in models.items() for folder in folders_of(ref, hub)]
    return replace(inputs, folders=(*inputs.folders, *folders))


def _load(config: MergeConfig | Mapping[str, Any] | str | Path, allow_all_same: bool) -> MergeConfig:
    """The config, of whatever form. A MergeConfig is checked when it is planned."""
    if isinstance(config, (str, Path)):
        return load_config(config, allow_all_same=allow_all_same)
    return make_config(config, allow_all_same=allow_all_same) if isinstance(config, Mapping) else config
