"""The Python interface: what the commands do, as functions. `import raymoe` gives these.

A function has the options of its command as keyword arguments of the same names. In a notebook, results are displayed
as tables, and `quiet=False` shows progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymoe.arguments import (
    ConfigSource,
    chosen_device,
    hub_options,
    merge_config,
    merge_options,
    only_one,
    runtime_settings,
)
from raymoe.config import MergeConfig, load_config
from raymoe.errors import Problem, ProblemReport
from raymoe.object_store.options import StorageOptions
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.owner import BASE, CONFIG_KEYS, Owner
from raymoe.planning.plan_merge import plan_merge
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import RemoteFolderResolver, folders_of
from raymoe.storage.locations import Inputs, input_paths

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from raymoe.arguments import ConfigKeys
    from raymoe.editing import Translation
    from raymoe.evaluation.options import EvaluationOptions, GenerationOptions
    from raymoe.export.gguf import GgufFile
    from raymoe.publish.repository import PushTarget
    from raymoe.report.evaluation_result import Evaluation
    from raymoe.report.merge_description import MergeDescription
    from raymoe.results import MergeResult, PushResult, Verification
    from raymoe.runtime.run_report import RunReport
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.sources.kept_reads import KeptReads

__all__ = [
    "archs",
    "edit",
    "evaluate",
    "extract",
    "generate",
    "gguf",
    "inspect",
    "load_config",
    "merge",
    "merge_and_push",
    "plan",
    "plan_edit",
    "prune",
    "push",
    "push_dry_run",
    "verify",
]


def plan(
    config: ConfigSource | None = None,
    options: MergeOptions | None = None,
    *,
    copy_tokenizer: bool = True,
    allow_crimes: bool = False,
    out_shard_size: str | int = "5B",
    random_seed: int = 0,
    allow_all_same: bool = False,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    strict: bool = False,
    transformers_cache: str | None = None,
    hub: HubOptions | None = None,
    remote_folders: RemoteFolderResolver | None = None,
    **config_keys: Unpack[ConfigKeys],
) -> MergePlan:
    """Plan a merge: reads configs, file headers and prompts, no weights.

    Args:
        config: A YAML file, a mapping, or a MergeConfig. Without it, the keys of a config are keyword arguments.
        options: The next eight arguments except `allow_all_same`, as one value.
        copy_tokenizer: Copy the base model's tokenizer to the output.
        allow_crimes: Allow experts of another model type of equal shape.
        out_shard_size: Largest shard: bytes, or a text such as "5B", "500M", "2GiB".
        random_seed: Seed of random gates and of noise.
        allow_all_same: Allow all experts to be the same model, for merges that are trained afterwards.
        load_in_8bit: Read prompts with 8-bit weights (bitsandbytes, GPU).
        load_in_4bit: Read prompts with 4-bit weights (bitsandbytes, GPU).
        strict: Refuse NaN and infinity in weights and configs.
        transformers_cache: Folder for models downloaded from the Hub.
        hub: How the Hub is reached, in place of `transformers_cache`.
        remote_folders: Finds folders that are only on other nodes of a cluster.
        **config_keys: `base_model`, `experts`, `gate_mode` and the other keys of a config.

    Returns:
        The plan. Its `totals` count parameters and bytes; equal `digest`s mean equal output bytes.

    Raises:
        ProblemReport: With everything that is wrong with the config, its models or its files of prompts.

    Example:
        >>> raymoe.plan("config.yaml", out_shard_size="2GiB").totals.parameters
    """
    loaded = merge_config(config, config_keys, function="plan", allow_all_same=allow_all_same)
    chosen = merge_options(
        options,
        copy_tokenizer=copy_tokenizer,
        allow_crimes=allow_crimes,
        out_shard_size=out_shard_size,
        random_seed=random_seed,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        strict=strict,
    )
    return plan_merge(
        loaded,
        chosen,
        hub=hub_options(hub, transformers_cache),
        allow_all_same=allow_all_same,
        remote_folders=remote_folders,
    )


def merge(
    config: ConfigSource | None = None,
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    *,
    copy_tokenizer: bool = True,
    allow_crimes: bool = False,
    out_shard_size: str | int = "5B",
    random_seed: int = 0,
    allow_all_same: bool = False,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    strict: bool = False,
    write_model_card: bool = True,
    trust_remote_code: bool = False,
    transformers_cache: str | None = None,
    overwrite: bool = False,
    address: str | None = None,
    gpus_per_expert: float | None = None,
    actors: int | None = None,
    device: str | None = None,
    stall_timeout: float = 20,
    keep_uploads: bool = False,
    verbose: int = 0,
    quiet: bool = True,
    result: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    settings: RuntimeSettings | None = None,
    report: RunReport | None = None,
    **config_keys: Unpack[ConfigKeys],
) -> MergeResult:
    """Merge dense models into `out` on Ray: the connected cluster, the one at `address`, or one started here.

    A merge that was interrupted resumes with the same call. If `out` holds this merge, finished, nothing is done, and
    `was_complete` of the result is true.

    Args:
        config: A YAML file, a mapping, or a MergeConfig. Without it, the keys of a config are keyword arguments.
        out: Folder or URL for the merged model.
        options: The next nine arguments except `allow_all_same`, as one value.
        copy_tokenizer: Copy the base model's tokenizer to the output.
        allow_crimes: Allow experts of another model type of equal shape.
        out_shard_size: Largest shard: bytes, or a text such as "5B", "500M", "2GiB".
        random_seed: Seed of random gates and of noise.
        allow_all_same: Allow all experts to be the same model, for merges that are trained afterwards.
        load_in_8bit: Read prompts with 8-bit weights (bitsandbytes, GPU).
        load_in_4bit: Read prompts with 4-bit weights (bitsandbytes, GPU).
        strict: Refuse NaN and infinity in weights and configs; this reads every number.
        write_model_card: Write a README.md.
        trust_remote_code: Allow a tokenizer's own code to run.
        transformers_cache: Folder for models downloaded from the Hub.
        overwrite: Replace the merge that is in `out`.
        address: Ray cluster. By default RAY_ADDRESS, else one is started here.
        gpus_per_expert: GPUs per expert actor, fractions too.
        actors: Most expert actors at once.
        device: "cpu" or "cuda": where gates are computed. By default on GPUs, if Ray has any.
        stall_timeout: Minutes without any progress after which a job is given to another actor.
        keep_uploads: If the merge stops, keep the uploaded parts of unfinished shards in S3 for the run that resumes
            it.
        verbose: 1 prints more, 2 also prints Ray's own logs; both show progress.
        quiet: Show no progress.
        result: File or URL for phases, bytes, retries and memory, also if the merge fails. By default none is written.
        push_to_hub: "org/name": publish the merge on the Hugging Face Hub, if it is not there yet.
        private: With `push_to_hub`: a private repository.
        branch: With `push_to_hub`: its branch. By default main.
        message: With `push_to_hub`: first line of the commit.
        settings: The arguments from `trust_remote_code` to `quiet` as one value.
        report: Collects phases, bytes and retries of the run; can also be read after a failure.
        **config_keys: `base_model`, `experts`, `gate_mode` and the other keys of a config.

    Returns:
        The files, warnings, bytes, memory and time of the merge; `pushed` says what was published.

    Raises:
        ProblemReport: Before anything is written, with everything that is wrong.
        MergeFailed: If the merge had begun.
        PushFailed: If the merge is finished but its push failed; the same call resumes the push.

    Example:
        >>> raymoe.merge(
        ...     base_model="org/base",
        ...     experts=[
        ...         {"source_model": "org/law", "positive_prompts": ["The court held that"]},
        ...         {"source_model": "org/code", "positive_prompts": ["def main():"]},
        ...     ],
        ...     gate_mode="ridge",
        ...     out="out",
        ... )
    """
    from raymoe.publish.repository import push_target
    from raymoe.runtime.coordinator import run_merge
    from raymoe.runtime.run_report import RunReport, record_run

    if out is None:
        raise TypeError("merge() needs out, the folder or URL for the merged model")
    if result is not None and report is not None:
        raise TypeError("merge() takes result or report: a report is written by the caller")
    chosen = merge_options(
        options,
        copy_tokenizer=copy_tokenizer,
        allow_crimes=allow_crimes,
        out_shard_size=out_shard_size,
        random_seed=random_seed,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        strict=strict,
        write_model_card=write_model_card,
    )
    settings = runtime_settings(
        settings,
        trust_remote_code=trust_remote_code,
        transformers_cache=transformers_cache,
        overwrite=overwrite,
        address=address,
        gpus_per_expert=gpus_per_expert,
        actors=actors,
        device=device,
        stall_timeout=stall_timeout,
        keep_uploads=keep_uploads,
        verbose=verbose,
        quiet=quiet,
    )
    target = push_target(push_to_hub, private=private, revision=branch, message=message)
    with record_run(result, out) if result is not None else nullcontext(report or RunReport()) as told:
        loaded = merge_config(config, config_keys, function="merge", allow_all_same=allow_all_same)
        settings = replace(settings, storage=loaded.storage, inputs=input_paths(loaded, config, settings.inputs))
        kept = _kept_reads(out, settings)
        description = _describe(loaded, out, chosen, settings, told, kept, allow_all_same=allow_all_same)
        if target is None:
            return run_merge(description.plan, description, out, settings, told, kept)
        return _merge_and_push(description, out, target, settings, told, kept)


def edit(
    old: str | Path,
    out: str | Path,
    *,
    add: Sequence[str | Mapping[str, Any]] = (),
    remove: Sequence[int] = (),
    replace: Mapping[int, str | Mapping[str, Any]] | Sequence[str] = (),
    prompts: Mapping[int, Any] | Sequence[str] = (),
    keep_routers: bool = False,
    keep_backbone: bool = False,
    base_model: str | None = None,
    gate_mode: str | None = None,
    experts_per_token: int | None = None,
    trust_record: bool = False,
    write_model_card: bool = True,
    trust_remote_code: bool = False,
    transformers_cache: str | None = None,
    overwrite: bool = False,
    address: str | None = None,
    gpus_per_expert: float | None = None,
    actors: int | None = None,
    device: str | None = None,
    stall_timeout: float = 20,
    keep_uploads: bool = False,
    verbose: int = 0,
    quiet: bool = True,
    result: str | None = None,
    settings: RuntimeSettings | None = None,
    report: RunReport | None = None,
    storage: StorageOptions | None = None,
    on_translated: Callable[[Translation], None] | None = None,
) -> MergeResult:
    """Add, remove or replace experts of a mixture: writes the mixture that results to `out`.

    The result equals, byte for byte, the merge that would have made it of the sources. An edit that was interrupted
    resumes with the same call. Numbers are those that experts have in `old`, from 0.

    Args:
        old: Folder, URL or Hub id of a mixture.
        out: Folder or URL for the edited mixture.
        add: Models, or entries of a config's `experts` with their prompts.
        remove: Experts to drop.
        replace: Models or entries by the number of the expert whose place they take. Without prompts of their own, they
            have those of that expert. Or "NUMBER=MODEL" texts.
        prompts: Files of prompts: "NUMBER=FILE" for an expert of `old`, the others for added models in their order. Or
            what a config has as `positive_prompts`, by number.
        keep_routers: Experts that stay keep their router rows; the others' are scaled to them.
        keep_backbone: Keep the backbone of `old`, also if it was merged from experts that change.
        base_model: The dense base model, if that of the record is gone.
        gate_mode: Another gate mode than that of the record.
        experts_per_token: Another number of experts for a token.
        trust_record: Use the S3 endpoint and profile in the record of `old`. By default those of the environment.
        write_model_card: Write a README.md.
        trust_remote_code: Allow a tokenizer's own code to run.
        transformers_cache: Folder for models downloaded from the Hub.
        overwrite: Replace the merge that is in `out`.
        address: Ray cluster. By default RAY_ADDRESS, else one is started here.
        gpus_per_expert: GPUs per expert actor, fractions too.
        actors: Most expert actors at once.
        device: "cpu" or "cuda": where gates are computed. By default on GPUs, if Ray has any.
        stall_timeout: Minutes without any progress after which a job is given to another actor.
        keep_uploads: If the edit stops, keep the uploaded parts of unfinished shards in S3 for the run that resumes it.
        verbose: 1 prints more, 2 also prints Ray's own logs; both show progress.
        quiet: Show no progress.
        result: File or URL for phases, bytes, retries and memory, also if the edit fails. By default none is written.
        settings: The arguments from `trust_remote_code` to `quiet` as one value.
        report: Collects phases, bytes and retries of the run.
        storage: How object stores are reached. By default as set in the environment.
        on_translated: Called with the merge that the edit is, before it is planned.

    Returns:
        The files, warnings, bytes, memory and time, as of `merge`.

    Raises:
        ProblemReport: Before anything is written, with everything that is wrong.
        MergeFailed: If writing had begun.

    Example:
        >>> raymoe.edit("out", "out-2", add=["org/law"], prompts=["law.jsonl"], remove=[3])
    """
    from dataclasses import replace as replace_fields

    from raymoe.editing import check_plan_of_edit, make_request, translate_edit
    from raymoe.report.merge_description import MergeDescription
    from raymoe.runtime.coordinator import run_merge
    from raymoe.runtime.run_report import RunReport, record_run

    if result is not None and report is not None:
        raise TypeError("edit() takes result or report: a report is written by the caller")
    settings = runtime_settings(
        settings,
        trust_remote_code=trust_remote_code,
        transformers_cache=transformers_cache,
        overwrite=overwrite,
        address=address,
        gpus_per_expert=gpus_per_expert,
        actors=actors,
        device=device,
        stall_timeout=stall_timeout,
        keep_uploads=keep_uploads,
        verbose=verbose,
        quiet=quiet,
    )
    with record_run(result, out) if result is not None else nullcontext(report or RunReport()) as told:
        request = make_request(
            add=add,
            remove=remove,
            replace=replace,
            prompts=prompts,
            keep_routers=keep_routers,
            keep_backbone=keep_backbone,
            base_model=base_model,
            gate_mode=gate_mode,
            experts_per_token=experts_per_token,
        )
        translation = translate_edit(str(old), request, settings.hub, storage, trust_record=trust_record)
        if on_translated is not None:
            on_translated(translation)
        config, options = translation.config, replace_fields(translation.options, model_card=write_model_card)
        settings = replace_fields(settings, storage=config.storage, inputs=input_paths(config, None, settings.inputs))
        kept = _kept_reads(out, settings)
        merge_plan = _plan_for_output(config, out, options, settings, told, kept, allow_all_same=False)
        check_plan_of_edit(translation, merge_plan, settings.hub)
        description = MergeDescription(plan=merge_plan, config=config, hub=settings.hub, edit=translation.edit)
        return run_merge(merge_plan, description, out, settings, told, kept)


def plan_edit(
    old: str | Path,
    *,
    add: Sequence[str | Mapping[str, Any]] = (),
    remove: Sequence[int] = (),
    replace: Mapping[int, str | Mapping[str, Any]] | Sequence[str] = (),
    prompts: Mapping[int, Any] | Sequence[str] = (),
    keep_routers: bool = False,
    keep_backbone: bool = False,
    base_model: str | None = None,
    gate_mode: str | None = None,
    experts_per_token: int | None = None,
    trust_record: bool = False,
    transformers_cache: str | None = None,
    storage: StorageOptions | None = None,
) -> MergePlan:
    """Plan an edit of a mixture: reads configs, headers and prompts, no weights. Nothing is written.

    Args:
        old: Folder, URL or Hub id of a mixture.
        add: As for `edit`, like all that follow.
        remove: Experts to drop.
        replace: Models by the number of the expert whose place they take.
        prompts: Files of prompts.
        keep_routers: Experts that stay keep their router rows.
        keep_backbone: Keep the backbone of `old`.
        base_model: The dense base model, if that of the record is gone.
        gate_mode: Another gate mode than that of the record.
        experts_per_token: Another number of experts for a token.
        trust_record: Use the S3 endpoint and profile in the record of `old`.
        transformers_cache: Folder for models downloaded from the Hub.
        storage: How object stores are reached. By default as set in the environment.

    Returns:
        The plan of the merge that the edit is.

    Raises:
        ProblemReport: With everything that is wrong with the mixture, the changes or the models.

    Example:
        >>> raymoe.plan_edit("out", remove=[3]).totals.parameters
    """
    from raymoe.editing import make_request, plan_translation, translate_edit

    hub = hub_options(None, transformers_cache)
    request = make_request(
        add=add,
        remove=remove,
        replace=replace,
        prompts=prompts,
        keep_routers=keep_routers,
        keep_backbone=keep_backbone,
        base_model=base_model,
        gate_mode=gate_mode,
        experts_per_token=experts_per_token,
    )
    return plan_translation(translate_edit(str(old), request, hub, storage, trust_record=trust_record), hub)


def prune(
    mixture: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    keep: int | None = None,
    drop: int | None = None,
    labels: Sequence[str] = (),
    limit: int = 0,
    max_tokens: int = 512,
    device: str | None = None,
    trust_remote_code: bool = False,
    trust_record: bool = False,
    transformers_cache: str | None = None,
    overwrite: bool = False,
    address: str | None = None,
    actors: int | None = None,
    quiet: bool = True,
    storage: StorageOptions | None = None,
) -> dict[str, Any]:
    """Drop the experts of a merge that get the fewest tokens on labeled texts, and measure the loss before and after.

    An expert's load is its share of all (token, choice) pairs, as the mean over layers and labels. The experts that
    stay keep their router rows, as with `edit(keep_routers=True, keep_backbone=True)`.

    Args:
        mixture: Folder or URL of a merge made by raymoe.
        out: Folder or URL for the pruned mixture.
        data: Labeled texts, as for `evaluate`.
        keep: How many experts stay. Or:
        drop: How many are dropped.
        labels: "LABEL=EXPERT" for each label that is not the name of an expert.
        limit: Use only the first texts of each label. 0 uses all.
        max_tokens: Texts are cut to this many tokens.
        device: "cpu" or "cuda". By default a GPU, if there is one.
        trust_remote_code: Allow a tokenizer's own code to run.
        trust_record: Use the S3 endpoint and profile in the merge's record. By default those of the environment.
        transformers_cache: Folder for models downloaded from the Hub.
        overwrite: Replace the merge that is in `out`.
        address: Ray cluster. By default RAY_ADDRESS, else one is started here.
        actors: Most expert actors at once.
        quiet: Show no progress.
        storage: How object stores are reached. By default as set in the environment.

    Returns:
        A dict: `experts` and their `load`, the numbers of the `removed` ones, and `loss` by label with its mean,
        `before` and `after`.

    Raises:
        ProblemReport: Before anything is written, with everything that is wrong.
        MergeFailed: If writing had begun.

    Example:
        >>> raymoe.prune("out", "smaller", "texts.jsonl", drop=1)["removed"]
    """
    from raymoe.editing import open_mixture
    from raymoe.object_store.options import StorageOptions
    from raymoe.report.eval_numbers import mean_load

    reading: dict[str, Any] = {
        "labels": labels,
        "limit": limit,
        "max_tokens": max_tokens,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "trust_record": trust_record,
        "transformers_cache": transformers_cache,
        "quiet": quiet,
        "storage": storage,
    }
    if (keep is None) == (drop is None):
        what = "both are given" if keep is not None else "one of them is needed"
        raise ProblemReport([Problem(where="--keep, --drop", what=what, remedy="say how many experts stay, or go")])
    hub = hub_options(None, transformers_cache)
    opened = open_mixture(str(mixture), hub, storage or StorageOptions(), trust_record=trust_record)
    count, least = opened.experts, opened.per_token
    left = keep if keep is not None else count - (drop or 0)
    if not least <= left < count:
        what = f"{left} of {count} experts would stay, and {least} work on each token"
        numbers = str(least) if least == count - 1 else f"{least} to {count - 1}"
        remedy = f"let {numbers} of them stay"
        if least >= count:
            remedy = "use raymoe edit, with --remove and --experts-per-token"
        raise ProblemReport([Problem(where="--keep, --drop", what=what, remedy=remedy)])
    before = evaluate(mixture, data, against=(), **reading)
    load = mean_load(before)
    removed = sorted(sorted(range(count), key=lambda number: (load[number], -number))[: count - left])
    edit(
        mixture,
        out,
        remove=removed,
        keep_routers=True,
        keep_backbone=True,
        trust_record=trust_record,
        trust_remote_code=trust_remote_code,
        transformers_cache=transformers_cache,
        overwrite=overwrite,
        address=address,
        actors=actors,
        quiet=quiet,
        storage=storage,
    )
    after = evaluate(mixture, data, against=("none", f"pruned={out}"), **reading)
    return {
        "mixture": str(mixture),
        "output": str(out),
        "experts": before["experts"],
        "load": load,
        "removed": removed,
        "loss": {"before": before["loss"]["merged"], "after": after["loss"]["pruned"]},
    }


def merge_and_push(
    config: ConfigSource,
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

    `on_merged` is called with the merge's result before the push. After any interruption, the same call resumes the
    merge, or only the push if `output` holds the finished merge. Raises what `merge` raises, and PushFailed.
    """
    from raymoe.runtime.run_report import RunReport
    from raymoe.runtime.settings import RuntimeSettings
    from raymoe.workflows import merge_and_push

    settings, report = settings or RuntimeSettings(verbosity=-1), report or RunReport()
    loaded = merge_config(config, {}, function="merge_and_push", allow_all_same=allow_all_same)
    settings = replace(settings, storage=loaded.storage, inputs=input_paths(loaded, config, settings.inputs))
    kept = _kept_reads(output, settings)
    description = _describe(loaded, output, options, settings, report, kept, allow_all_same=allow_all_same)
    merged = on_merged or (lambda result: None)
    return merge_and_push(description.plan, description, output, target, settings, report, merged, kept)


def verify(
    merged: str | Path,
    *,
    address: str | None = None,
    actors: int | None = None,
    device: str | None = None,
    stall_timeout: float = 20,
    trust_remote_code: bool = False,
    trust_record: bool = False,
    transformers_cache: str | None = None,
    verbose: int = 0,
    quiet: bool = True,
    settings: RuntimeSettings | None = None,
) -> Verification:
    """Recompute a merge from its sources, in memory, and compare every tensor byte for byte.

    Args:
        merged: Folder or URL of a merge made by raymoe.
        address: Ray cluster. By default RAY_ADDRESS, else one is started here.
        actors: Most expert actors at once.
        device: "cpu" or "cuda": where gates are computed. By default on GPUs, if Ray has any.
        stall_timeout: Minutes without any progress after which a job is given to another actor.
        trust_remote_code: Allow a tokenizer's own code to run.
        trust_record: Use the S3 endpoint and profile in the merge's record. By default those of the environment.
        transformers_cache: Folder for models downloaded from the Hub.
        verbose: 1 prints more, 2 also prints Ray's own logs; both show progress.
        quiet: Show no progress.
        settings: All of these as one value.

    Returns:
        What was compared. `ok` is true if nothing differs; `differences` has one line per difference.

    Raises:
        ProblemReport: If there is no merge, or its sources are gone.
        MergeFailed: If the comparison could not be finished.

    Example:
        >>> raymoe.verify("out").ok
    """
    from raymoe.runtime.verify import verify_merge

    chosen = runtime_settings(
        settings,
        address=address,
        actors=actors,
        device=device,
        stall_timeout=stall_timeout,
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        transformers_cache=transformers_cache,
        verbose=verbose,
        quiet=quiet,
    )
    return verify_merge(merged, chosen)


def extract(
    mixture: str | Path,
    expert: int | str,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    without_shared: bool = False,
    copy_tokenizer: bool = True,
    out_shard_size: str | int = "5B",
    strict: bool = False,
    write_model_card: bool = True,
    transformers_cache: str | None = None,
    overwrite: bool = False,
    address: str | None = None,
    actors: int | None = None,
    stall_timeout: float = 20,
    keep_uploads: bool = False,
    verbose: int = 0,
    quiet: bool = True,
    settings: RuntimeSettings | None = None,
    storage: StorageOptions | None = None,
    report: RunReport | None = None,
) -> MergeResult:
    """Write one expert of a mixture as a dense model: what the mixture computes if every token goes to this expert.

    The bytes of the expert's FFNs, and of the mixture's attention, norms and embeddings, are copied. An extraction that
    was interrupted resumes with the same call.

    Args:
        mixture: The mixture, as a config names models: a folder, a Hub id, a URL; "+adapter" for the dense model.
        expert: The number of the expert, from 0 on; or "shared" for the shared expert.
        out: Folder or URL for the dense model.
        options: The next arguments from `copy_tokenizer` to `write_model_card`, as one value.
        without_shared: Leave out a shared expert, which otherwise is added to the expert.
        copy_tokenizer: Copy the mixture's tokenizer to the output.
        out_shard_size: Largest shard: bytes, or a text such as "5B", "500M", "2GiB".
        strict: Refuse NaN and infinity in weights; this reads every number.
        write_model_card: Write a README.md.
        transformers_cache: Folder for models downloaded from the Hub.
        overwrite: Replace the model that is in `out`.
        address: Ray cluster. By default RAY_ADDRESS, else one is started here.
        actors: Most actors at once.
        stall_timeout: Minutes without any progress after which a job is given to another actor.
        keep_uploads: If the extraction stops, keep the uploaded parts of unfinished shards in S3.
        verbose: 1 prints more, 2 also prints Ray's own logs; both show progress.
        quiet: Show no progress.
        settings: The arguments from `transformers_cache` to `quiet` as one value.
        storage: How object stores are reached. By default as set in the environment.
        report: Collects phases, bytes and retries of the run.

    Returns:
        The files, warnings, bytes and time.

    Raises:
        ProblemReport: Before anything is written, with everything that is wrong.
        MergeFailed: If writing had begun.

    Example:
        >>> raymoe.extract("org/mixture", 2, "expert-2").files
    """
    from raymoe.config.model_refs import parse_expert, parse_model_ref, with_expert
    from raymoe.runtime.run_report import RunReport
    from raymoe.workflows import extract_expert

    try:
        ref = with_expert(parse_model_ref(str(mixture)), parse_expert(expert))
    except ValueError as error:
        remedy = "name the mixture, and a number such as 0 for its first expert"
        raise ProblemReport([Problem(where="mixture", what=str(error), remedy=remedy)]) from None
    chosen = merge_options(
        options,
        copy_tokenizer=copy_tokenizer,
        allow_crimes=False,
        out_shard_size=out_shard_size,
        random_seed=0,
        load_in_8bit=False,
        load_in_4bit=False,
        strict=strict,
        write_model_card=write_model_card,
    )
    settings = runtime_settings(
        settings,
        trust_remote_code=False,
        transformers_cache=transformers_cache,
        overwrite=overwrite,
        address=address,
        actors=actors,
        device=None,
        stall_timeout=stall_timeout,
        keep_uploads=keep_uploads,
        verbose=verbose,
        quiet=quiet,
    )
    settings = settings if storage is None else replace(settings, storage=storage)
    return extract_expert(ref, out, chosen, settings, report or RunReport(), without_shared=without_shared)


def inspect(checkpoint: str | Path, *, storage: StorageOptions | None = None) -> dict[str, Any]:
    """Summarize a checkpoint, MoE or dense, from its config, its headers and its routers.

    Args:
        checkpoint: Folder or URL of a checkpoint.
        storage: How object stores are reached. By default as set in the environment.

    Returns:
        What `raymoe inspect --json` prints: architecture, parameters, experts, shards, routers, how it was made.

    Raises:
        ProblemReport: If there is no checkpoint, or it is damaged.

    Example:
        >>> raymoe.inspect("out")["experts"]
    """
    from raymoe.report.inspect import inspect_checkpoint

    return inspect_checkpoint(checkpoint, storage)


def archs(engine: str | None = None) -> dict[str, Any]:
    """List which dense models become which MoE architectures, and why others do not.

    Args:
        engine: An engine ("vllm", "mlx", ...): list what it computes of each architecture instead.

    Returns:
        What `raymoe archs --json` prints.

    Raises:
        ProblemReport: If there is no such engine.

    Example:
        >>> raymoe.archs().keys()
        >>> [row["verdict"] for row in raymoe.archs(engine="mlx")["rows"]]
    """
    if engine is not None:
        from raymoe.report.engine_table import engine_matrix

        return engine_matrix(engine)
    from raymoe.architectures.support_matrix import support_matrix

    return support_matrix()


def gguf(
    source: str | Path,
    out: str | Path,
    *,
    type: str | None = None,
    overwrite: bool = False,
    pre: str | None = None,
    name: str | None = None,
    random_seed: int | None = None,
    allow_crimes: bool = False,
    allow_all_same: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    transformers_cache: str | None = None,
    quiet: bool = True,
    storage: StorageOptions | None = None,
) -> GgufFile:
    """Write a checkpoint, or the merge of a config, as one GGUF file for llama.cpp, in this process.

    Args:
        source: Folder or URL of a checkpoint, or the config file of a merge.
        out: The file to write.
        type: "f32", "f16", "bf16", "q8_0" or "q4_0". By default what the checkpoint's weights are.
        overwrite: Replace a file of this name.
        pre: llama.cpp's name of the pre-tokenizer, if raymoe can't tell.
        name: The model's name. By default the file's.
        random_seed: For a config: seed of random gates and of noise.
        allow_crimes: For a config: allow experts of another model type of equal shape.
        allow_all_same: For a config: allow all experts to be the same model.
        device: For a config: compute its gates on "cpu" or "cuda". By default a GPU, if there is one.
        trust_remote_code: Allow a tokenizer's own code to run.
        transformers_cache: Folder for models downloaded from the Hub.
        quiet: Show no progress.
        storage: How object stores are reached. By default as set in the environment.

    Returns:
        The file's size, type, architecture and warnings.

    Raises:
        ProblemReport: Before anything is written, with everything that is wrong.

    Example:
        >>> raymoe.gguf("out", "model.gguf", type="q8_0").size
    """
    from raymoe.export.gguf import GgufOptions, write_gguf

    of_config = {
        "random_seed": random_seed is not None,
        "allow_crimes": allow_crimes,
        "allow_all_same": allow_all_same,
        "device": device is not None,
    }
    options = GgufOptions(
        type=type,
        pre=pre,
        name=name,
        overwrite=overwrite,
        merge=MergeOptions(seed=random_seed or 0, allow_crimes=allow_crimes, model_card=False),
        config_options=tuple(argument for argument, is_given in of_config.items() if is_given),
        allow_all_same=allow_all_same,
        device=chosen_device(device),
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        hub=HubOptions(cache_dir=transformers_cache),
        storage=storage or StorageOptions(),
    )
    return write_gguf(source, out, options)


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
    """Publish a finished merge as a model on the Hugging Face Hub, in one commit.

    An interrupted push resumes with the same call. Files that the Hub has are not sent again.

    Args:
        merged: Folder or URL of a merge made by raymoe.
        repo: "org/name"; the repository is created if it is missing.
        private: Make the repository private.
        revision: Branch, created if it is missing. By default main.
        message: First line of the commit.
        hub: How the Hub is reached.
        storage: How object stores are reached. By default as set in the environment.
        quiet: Show no progress.

    Returns:
        The commit, and which files were sent.

    Raises:
        ProblemReport: Before anything is sent, with everything that is wrong.
        PushFailed: If the push had begun.

    Example:
        >>> raymoe.push("out", "org/name", private=True).commit_url
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
    """List what `push` would do. Nothing is created or sent.

    Args: Those of `push`.

    Returns:
        Lines of text for the user.

    Raises:
        ProblemReport: With everything that is wrong.

    Example:
        >>> print(*raymoe.push_dry_run("out", "org/name"), sep="\\n")
    """
    from raymoe.publish.push import push_dry_run
    from raymoe.publish.repository import PushTarget

    target = PushTarget(repo=repo, private=private, revision=revision, message=message)
    return push_dry_run(merged, target, hub or HubOptions(), storage or StorageOptions())


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    options: EvaluationOptions | None = None,
    *,
    against: str | Sequence[str] | None = None,
    labels: Sequence[str] = (),
    limit: int = 0,
    max_tokens: int | None = None,
    experts_per_token: str | Sequence[int] | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    tasks: str | None = None,
    include_path: str | Path | None = None,
    fewshot: int | None = None,
    batch_size: int | None = None,
    html: str | Path | None = None,
    json: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    trust_record: bool = False,
    transformers_cache: str | None = None,
    quiet: bool = True,
    storage: StorageOptions | None = None,
) -> Evaluation:
    """Evaluate a finished merge or a dense model on labeled texts in this process, or on tasks of
    lm-evaluation-harness.

    Args:
        model: Folder or URL of a merge made by raymoe. Or a dense model as a config names it: a folder, a Hub id, a
            URL, "model+adapter".
        data: Labeled texts: a file with one JSON object per line.
        options: The arguments below that are about texts, as one value.
        against: What to compare a merge with: "base", "experts", "average", "oracle", "hidden", as a sequence or
            separated by commas. By default all that the merge allows; an empty sequence compares with nothing. Each
            "NAME=MODEL" in the sequence adds a model.
        labels: "LABEL=EXPERT" for each label that is not the name of an expert.
        limit: Use only the first texts of each label, or examples of each task. 0 uses all.
        max_tokens: Texts are cut to this many tokens. By default 512.
        experts_per_token: Numbers of experts for a token, such as (1, 2, 4): loss and active parameters of a merge with
            each of them, under "by_experts_per_token".
        text_field: The text's key. By default "text".
        label_field: The label's key. By default "label".
        tasks: In place of `data`: tasks of lm-evaluation-harness, or task files, separated by commas.
        include_path: With `tasks`: a folder with further task files.
        fewshot: With `tasks`: examples before each question. By default as set by the task.
        batch_size: With `tasks`: questions per batch. By default 1.
        html: Write a page of pictures to this file.
        json: Write the numbers to this file.
        device: "cpu" or "cuda". By default a GPU, if there is one.
        trust_remote_code: Allow a tokenizer's own code to run.
        trust_record: Use the S3 endpoint and profile in the merge's record. By default those of the environment.
        transformers_cache: Folder for models downloaded from the Hub.
        quiet: Show no progress.
        storage: How object stores are reached. By default as set in the environment.

    Returns:
        What eval.json holds, a dict: losses of the model and of those that it is compared with. For a merge also how
        its routers distribute tokens; or the scores of the tasks.

    Raises:
        ProblemReport: Before anything is computed, with everything that is wrong.

    Example:
        >>> raymoe.evaluate("out", "held-out.jsonl", against=("base", "oracle"))["loss"]
        >>> raymoe.evaluate("org/model", "held-out.jsonl", against=["law=org/law-model"])["loss"]["law"]["mean"]
    """
    from raymoe.evaluation.evaluate import evaluate_texts
    from raymoe.evaluation.lm_eval import HarnessOptions, check_data_or_tasks, run_harness
    from raymoe.evaluation.options import EvaluationOptions, parse_against, parse_experts_per_token
    from raymoe.evaluation.output_files import check_writable, evaluation_input_paths, write_evaluation
    from raymoe.report.evaluation_result import Evaluation

    texts, page, numbers = (None if path is None else Path(path) for path in (data, html, json))
    check_data_or_tasks(
        texts,
        tasks,
        {
            "options": options,
            "against": against,
            "labels": labels or None,
            "max_tokens": max_tokens,
            "experts_per_token": experts_per_token,
            "text_field": text_field,
            "label_field": label_field,
            "html": html,
            "trust_record": trust_record or None,
        },
        {"include_path": include_path, "fewshot": fewshot, "batch_size": batch_size},
    )
    further = (options or EvaluationOptions(against=parse_against(against))).models
    inputs = evaluation_input_paths(str(model), texts, tasks, further.values())
    check_writable({"json": numbers, "html": page}, inputs)
    result: Mapping[str, Any]
    if data is None:
        questions = HarnessOptions(
            tasks=tasks or "",
            include_path=None if include_path is None else Path(include_path),
            limit=limit,
            fewshot=fewshot,
            batch_size=1 if batch_size is None else batch_size,
            device=chosen_device(device),
            trust_remote_code=trust_remote_code,
        )
        result = run_harness(model, questions)
    else:
        made = EvaluationOptions(
            against=parse_against(against),
            labels=tuple(labels),
            limit=limit,
            max_tokens=512 if max_tokens is None else max_tokens,
            experts_per_token=parse_experts_per_token(experts_per_token),
            text_field=text_field or "text",
            label_field=label_field or "label",
            device=chosen_device(device),
            trust_remote_code=trust_remote_code,
            trust_record=trust_record,
            quiet=quiet,
            hub=HubOptions(cache_dir=transformers_cache),
            storage=storage or StorageOptions(),
        )
        result = evaluate_texts(model, data, only_one("options", options, made, EvaluationOptions(quiet=True)))
    write_evaluation(result, numbers, page)
    return Evaluation(result)


def generate(
    merged: str | Path,
    prompts: str | Sequence[str],
    options: GenerationOptions | None = None,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    per_token: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    trust_record: bool = False,
    transformers_cache: str | None = None,
    quiet: bool = True,
    storage: StorageOptions | None = None,
) -> dict[str, Any]:
    """Generate from a finished merge in this process, and return which experts each prompt was routed to.

    Args:
        merged: Folder or URL of a merge made by raymoe.
        prompts: A prompt, or several.
        options: The arguments below, as one value.
        chat: Put each prompt into the chat template as one user turn.
        max_new_tokens: Longest answer in tokens; 0 only reads the prompt.
        temperature: 0 takes the most likely token; above 0, tokens are sampled.
        seed: Seed of the sampling.
        per_token: Return the experts of each token too.
        device: "cpu" or "cuda". By default a GPU, if there is one.
        trust_remote_code: Allow a tokenizer's own code to run.
        trust_record: Use the S3 endpoint and profile in the merge's record. By default those of the environment.
        transformers_cache: Folder for models downloaded from the Hub.
        quiet: Show no progress.
        storage: How object stores are reached. By default as set in the environment.

    Returns:
        What `raymoe try --json` prints: per prompt the answer, and each expert's share of first choices and of router
        weight.

    Raises:
        ProblemReport: Before weights are read, with everything that is wrong.

    Example:
        >>> raymoe.generate("out", "func main() {")["answers"][0]["first_choice"]
    """
    from raymoe.evaluation.generation import generate_answers
    from raymoe.evaluation.options import GenerationOptions

    made = GenerationOptions(
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        per_token=per_token,
        device=chosen_device(device),
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        quiet=quiet,
        hub=HubOptions(cache_dir=transformers_cache),
        storage=storage or StorageOptions(),
    )
    texts = [prompts] if isinstance(prompts, str) else prompts
    return generate_answers(merged, texts, only_one("options", options, made, GenerationOptions(quiet=True)))


def _kept_reads(out: str | Path, settings: RuntimeSettings) -> KeptReads:
    """What an earlier run of this merge has read for its plan, if its journal is in the output."""
    from raymoe.object_store.errors import StorageError
    from raymoe.runtime.coordinator import open_target
    from raymoe.sources.kept_reads import KeptReads

    def load() -> bytes:
        try:
            return open_target(out, settings).kept_reads()
        except (ProblemReport, StorageError):  # reported when the output is checked
            return b""

    return KeptReads(load)


def _describe(
    config: MergeConfig,
    out: str | Path,
    options: MergeOptions | None,
    settings: RuntimeSettings,
    report: RunReport,
    kept: KeptReads,
    *,
    allow_all_same: bool,
) -> MergeDescription:
    """The plan of a merge that is about to run, and the facts for its card and record. Raises ProblemReport."""
    from raymoe.report.merge_description import MergeDescription

    merge_plan = _plan_for_output(config, out, options, settings, report, kept, allow_all_same=allow_all_same)
    return MergeDescription(plan=merge_plan, config=config, hub=settings.hub)


def _merge_and_push(
    description: MergeDescription,
    out: str | Path,
    target: PushTarget,
    settings: RuntimeSettings,
    report: RunReport,
    kept: KeptReads,
) -> MergeResult:
    from raymoe.runtime.coordinator import run_merge
    from raymoe.workflows import merge_and_push

    results: list[MergeResult] = []
    pushed = merge_and_push(description.plan, description, out, target, settings, report, results.append, kept)
    # If the output held the finished merge, it was only pushed: the result says that it was complete.
    merged = results[0] if results else run_merge(description.plan, description, out, settings, report)
    return replace(merged, pushed=pushed)


def _plan_for_output(
    config: MergeConfig,
    output: str | Path,
    options: MergeOptions | None,
    settings: RuntimeSettings,
    report: RunReport,
    kept: KeptReads,
    *,
    allow_all_same: bool,
) -> MergePlan:
    """The plan of a merge that is about to run. Problems of its output are reported together with those of the plan."""
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
                config,
                options,
                hub=settings.hub,
                allow_all_same=allow_all_same,
                remote_folders=remote_folders,
                kept=kept,
            )
    except ProblemReport as refusal:
        target = open_target(output, settings)
        is_read = input_conflict(target, _with_models(settings.inputs, config, settings.hub))
        output_errors = (
            [is_read] if is_read else target.problems(digest=None, output_bytes=0, overwrite=settings.overwrite)
        )
        raise (ProblemReport([*refusal.problems, *output_errors]) if output_errors else refusal) from None


def _with_models(inputs: Inputs, config: MergeConfig, hub: HubOptions) -> Inputs:
    """Adds the models' folders that are known from the config alone."""
    models = {BASE: config.base_model}
    for kind, key in CONFIG_KEYS.items():
        models |= {Owner(kind, number): expert.source_model for number, expert in enumerate(getattr(config, key))}
    folders = [(str(owner), folder) for owner, ref in models.items() for folder in folders_of(ref, hub)]
    return replace(inputs, folders=(*inputs.folders, *folders))
