"""Prints plans and results on a terminal, and plans as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.console import console as rich_console
from raymoe.console import print_json, print_line, print_warning, say, say_command
from raymoe.formatting import human_bytes, human_count
from raymoe.gate_modes import MODES
from raymoe.object_store.location import Location, LocationKind
from raymoe.planning.owner import ALL_EXPERTS, ALL_SHARED, ROUTER, OwnerKind
from raymoe.planning.plan import MergePlan, Shard
from raymoe.report.backbone_lines import backbone_lines, backbone_work
from raymoe.report.engine_lines import engine_lines
from raymoe.report.memory_estimate import actor_memory
from raymoe.report.start_lines import start_lines
from raymoe.results import MergeResult, Verification
from raymoe.storage.transfer_summary import TRANSFER_METHODS

if TYPE_CHECKING:
    from raymoe.sources.hub import HubOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOutput:
    """The output of a plan: bytes by transfer method (storage/transfer_summary.py), problems that prevent the merge
    from being written there, and whether it holds a merge of this plan: an unfinished one is resumed, a finished one is
    complete."""

    location: Location
    bytes_by_method: Mapping[str, int]
    problems: tuple[str, ...] = ()
    is_resumable: bool = False
    is_complete: bool = False


def plan_summary(plan: MergePlan, output: PlannedOutput | None = None, hub: HubOptions | None = None) -> dict[str, Any]:
    """The content of `raymoe plan --json`; `output` if it is known, `hub` as used for the plan."""
    totals = plan.totals
    where: dict[str, Any] = {}
    if output is not None:
        where["bytes_by_way"] = dict(output.bytes_by_method)
        where["output"] = {
            "location": output.location.text,
            "problems": list(output.problems),
            "unfinished_merge_goes_on": output.is_resumable,
            "is_complete": output.is_complete,
        }
    return {
        **where,
        "architecture": plan.architecture,
        "dtype": plan.dtype,
        "parameters": totals.parameters,
        "active_parameters": totals.active_parameters,
        "output_bytes": totals.output_bytes,
        "bytes_by_source": {str(owner): count for owner, count in totals.bytes_by_owner.items()},
        "bytes_by_kind": dict(totals.bytes_by_kind),
        "moe_layers": list(plan.gates.layers_with_router),
        "gates": {
            "mode": plan.gates.mode,
            "prompt_model": plan.gates.prompt_model if MODES[plan.gates.mode].needs_forward_pass else None,
            "weight_bytes_read": totals.gate_bytes,
            "prompts": {str(p.owner): len(p.positive) + len(p.negative) for p in plan.gates.members},
        },
        "backbone": {
            "method": plan.backbone.method,
            "include": list(plan.backbone.include),
            "tensors_combined": plan.backbone.combined,
            "tensors_kept": plan.backbone.kept,
            "notes": list(plan.backbone.notes),
            "weight_bytes_read": totals.backbone_bytes,
            "prompts": {str(p.owner): len(p.positive) for p in plan.moments.experts} if plan.moments else {},
            "unused": [
                {"owner": str(each.owner), "groups": list(each.groups), "differing": list(each.differing)}
                for each in plan.backbone.unused
            ],
        },
        "actor_memory_bytes": actor_memory(plan, hub, sent=_bytes_sent(output)),
        "shards": [
            {"file": s.file_name, "owner": str(s.owner), "bytes": s.nbytes, "tensors": _tensors(s)} for s in plan.shards
        ],
        "sources": [
            {"owner": str(s.owner), "model": s.label, "revision": s.revision, "files": len(s.files)}
            for s in plan.sources
        ],
        "warnings": [*plan.warnings, *plan.engine_warnings],
        "engines": [asdict(each) for each in engine_lines(plan)],
        "config": dict(plan.config),
        "digest": plan.digest,
    }


def print_plan(
    plan: MergePlan, output: PlannedOutput | None = None, hub: HubOptions | None = None, *, as_json: bool
) -> None:
    if as_json:
        print_json(plan_summary(plan, output, hub))
        return
    console = rich_console()
    totals, host = plan.totals, MOE_ARCHITECTURES[plan.architecture]
    experts = f"{plan.experts} experts, {plan.text_config['num_experts_per_tok']} for each token"
    class_name = plan.config["architectures"][0]
    console.print(f"{host.title} ({class_name}), {experts}, {plan.dtype}", style="bold")
    active = human_count(totals.active_parameters)
    print_line(f"{human_count(totals.parameters)} parameters in all, {active} active for a token")
    print_line(f"{human_bytes(totals.output_bytes)} in {len(plan.shards)} shards, {_kinds(plan)}")
    for line in start_lines(plan):
        print_line(line)
    for table in (_source_table(plan), _shard_table(plan)):
        print_line("")
        console.print(table)
    print_line("")
    for method, count in (output.bytes_by_method if output else {}).items():
        print_line(f"{count / totals.output_bytes:.1%} ({human_bytes(count)}) {TRANSFER_METHODS[method]}")
    for line in (*backbone_lines(plan), *backbone_work(plan)):
        print_line(line)
    print_line(_gate_line(plan))
    memory = actor_memory(plan, hub, sent=_bytes_sent(output))
    on_gpu = f"{human_bytes(memory['gpu'])} of GPU memory and {human_bytes(memory['beside_gpu'])} of host memory"
    gpu = f"; on a GPU, {on_gpu}" if memory["gpu"] else ""
    print_line(f"An actor needs about {human_bytes(memory['cpu'])} of memory{gpu}.")
    warnings = (*plan.warnings, *plan.engine_warnings)
    for warning in warnings:
        print_warning(console, warning)
    _print_state(console, output, is_clean=not warnings)


def _print_state(console: Any, output: PlannedOutput | None, *, is_clean: bool) -> None:
    """The last lines of a plan: what a merge would find at the output, and whether it can begin."""
    if output is not None and output.is_complete:
        print_line(f"{output.location} holds this finished merge: `raymoe merge` has nothing to do.")
    if output is not None and output.is_resumable:
        print_line(f"{output.location} has an unfinished merge of this plan: `raymoe merge` resumes it.")
    if output is not None and output.problems:
        for problem in output.problems:
            print_warning(console, problem, "can't be merged now:")
        return
    print_line("No problems found." if is_clean else "No errors found.")


def _bytes_sent(output: PlannedOutput | None) -> int:
    """Bytes that actors send to S3: all except server-side copies."""
    if output is None or output.location.kind is not LocationKind.S3:
        return 0
    return sum(count for way, count in output.bytes_by_method.items() if way != "store_copy")


def _kinds(plan: MergePlan) -> str:
    names = {
        "copy": "copied",
        "transform": "transformed",
        "combine": "combined",
        "columns": "put side by side",
        "transposed": "transposed",
        "router": "routers",
        "constant": "constants",
    }
    kinds = plan.totals.bytes_by_kind.items()
    return ", ".join(f"{human_bytes(count)} {names[kind]}" for kind, count in kinds)


def _source_table(plan: MergePlan) -> Any:
    from rich.table import Table

    table = Table("source", "model", "writes", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    table.columns[2].justify = "right"
    for source in plan.sources:
        own = plan.totals.bytes_by_owner.get(source.owner)
        together = ALL_SHARED if source.owner.kind is OwnerKind.SHARED else ALL_EXPERTS
        table.add_row(str(source.owner), _relative(source.label), human_bytes(own) if own else f"in {together}")
    for together in (ALL_EXPERTS, ALL_SHARED):
        if (own := plan.totals.bytes_by_owner.get(together)) is not None:
            table.add_row(str(together), "all of them, tensor by tensor", human_bytes(own))
    table.add_row(str(ROUTER), f"gate mode {plan.gates.mode}", human_bytes(plan.totals.bytes_by_owner[ROUTER]))
    return table


def _relative(label: str) -> str:
    """A model's name; folders below the current one by their relative paths."""
    try:
        here = os.path.join(os.getcwd(), "")
    except OSError:  # it has been removed
        return label
    return "+".join(part.removeprefix(here) or part for part in label.split("+"))


def _tensors(shard: Shard) -> int:
    return len({part.tensor.name for part in shard.parts})


def _shard_table(plan: MergePlan, limit: int = 24) -> Any:
    from rich.table import Table

    table = Table("shard", "of", "tensors", "size", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for shard in plan.shards[:limit]:
        table.add_row(shard.file_name, str(shard.owner), str(_tensors(shard)), human_bytes(shard.nbytes))
    if len(plan.shards) > limit:
        table.add_row(f"and {len(plan.shards) - limit} more", "", "", "")
    return table


def _gate_line(plan: MergePlan) -> str:
    kept = len(plan.gates.kept or ())
    if plan.gates.keeps_all:
        return f"Gates: the rows of all {kept} experts are those of their mixture."
    if kept:
        others = _computed_gates_line(plan).removeprefix("Gates: ")
        return f"Gates: the rows of {kept} experts are those of their mixture; the others in their scale: {others}"
    return _computed_gates_line(plan)


def _computed_gates_line(plan: MergePlan) -> str:
    mode = MODES[plan.gates.mode]
    if not mode.needs_prompts:
        return f"Gates: {mode.name}, drawn from seed {plan.gates.seed}."
    count = sum(len(p.positive) + len(p.negative) for p in plan.gates.members)
    if not mode.needs_forward_pass:
        return f"Gates: {mode.name} from {count} prompts; no model is run."
    reads = human_bytes(plan.totals.gate_bytes)
    reading_model = {"base": "the base model", "expert": "the experts", "grafted": "the base with each expert's FFN"}
    reader = reading_model[plan.gates.prompt_model]
    return f"Gates: {mode.name} from {count} prompts, read by {reader}; {reads} of weights are read for them."


def print_result(result: MergeResult, *, has_gguf: bool, is_pushed: bool) -> None:
    """The last lines of a merge. `has_gguf`: it can be converted to GGUF. `is_pushed`: it is published next."""
    _print_work(result)
    say("next:")
    for step in next_steps(result.output, has_gguf=has_gguf, is_pushed=is_pushed):
        say_command(step)


def next_steps(output: str, *, has_gguf: bool, is_pushed: bool) -> list[str]:
    """Commands for the next steps with a finished merge."""
    place, file = quote(output), quote(f"{output.rstrip('/').rpartition('/')[2]}.gguf")
    return [
        f'raymoe try {place} "..."',
        f"raymoe eval {place} --data texts.jsonl",
        *([f"raymoe gguf {place} {file}"] if has_gguf else []),
        *([] if is_pushed else [f"raymoe push {place} ORG/NAME"]),
    ]


def print_extraction(result: MergeResult) -> None:
    """The last lines of an extraction."""
    _print_work(result)
    say("next:")
    say_command(f"raymoe inspect {quote(result.output)}")


def _print_work(result: MergeResult) -> None:
    size = sum(record.size for record in result.files)
    if result.was_complete:
        say(f"done: {result.output}, {len(result.files) + 1} files, {human_bytes(size)}, all from an earlier run")
        return
    kept = f" ({human_bytes(result.bytes_kept)} were there from an earlier run)" if result.bytes_kept else ""
    what = f"{len(result.files) + 1} files, {human_bytes(size)}{kept}"
    say(f"done: {result.output}, {what} in {result.run_seconds:.1f} s")
    for line in (*result.backbone_lines, *result.router_lines):
        say(line)
    actors = ", ".join(human_bytes(peak) for peak in result.peak_actor_bytes)
    say(f"peak memory: driver {human_bytes(result.peak_driver_bytes)}, actors {actors}")
    if any(result.peak_gpu_bytes):
        say(f"peak GPU memory: {', '.join(human_bytes(peak) for peak in result.peak_gpu_bytes)}")


def print_verification(verification: Verification, *, quiet: bool) -> None:
    for line in verification.differences:
        print_line(line)
    for line in verification.notes:
        print_line(f"note: {line}")
    if not quiet or not verification.ok:
        print_line(verification.summary)
