"""`plan_extraction`: the plan that writes one expert of a mixture as a dense model. Pure, as `build_plan`.

The plan is that of a merge with a base and without experts or routers, so that it is run, resumed and recorded as one.
Each tensor is copied in the dtype that it has in the mixture. Two kinds are computed:

    shared expert without a gate    the FFNs of both as one of their total width, which is exactly their sum
    heads in another order          rows of q and k in the order of the dense family's RoPE
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from raymoe.architectures import MOE_ARCHITECTURES, DenseSpec, MoeShape
from raymoe.architectures.wrappers import find_wrapper
from raymoe.errors import Problem, ProblemReport
from raymoe.gate_modes import MODES
from raymoe.planning.build import plan_source, travels_with_text
from raymoe.planning.compatibility import check_tensors, load_spec, text_part_warnings
from raymoe.planning.digest import plan_digest
from raymoe.planning.invariants import check_plan
from raymoe.planning.owner import BASE
from raymoe.planning.plan import (
    BackboneReport,
    Columns,
    Copy,
    GatePlan,
    HeadPermutation,
    MergeOptions,
    MergePlan,
    Part,
    PartSource,
    Transform,
    WeightRef,
)
from raymoe.planning.shard_packing import OutputTensor, Piece, pack_shards
from raymoe.planning.tensor_sources import ROTARY_ROLES, adapter_problems, slice_lora, weight_ref
from raymoe.planning.totals import compute_totals
from raymoe.sources.dtypes import NAME_OF_DTYPE
from raymoe.sources.facts import ModelFacts, slice_rows

_KEYS_OF_DTYPE = ("torch_dtype", "dtype")


def plan_extraction(facts: ModelFacts, shared: ModelFacts | None, options: MergeOptions) -> MergePlan:
    """Plan the dense model of one expert.

    Args:
        facts: The expert, as a dense model (`ModelFacts.mixture`).
        shared: The shared expert of the same mixture, which is added to the expert's FFN. None: it is left out.
        options: Of these, `max_shard_bytes`, `copy_tokenizer`, `model_card` and `strict` count.

    Returns:
        The plan. Its `architecture` is the dense family's `model_type`.

    Raises:
        ProblemReport: With everything that is wrong with the mixture's files.
    """
    spec, problems = load_spec(facts, "mixture")
    if spec is None or facts.mixture is None:
        raise ProblemReport(problems)
    problems += check_tensors(facts, spec, "mixture", ffn_only=False)
    problems += adapter_problems(facts, spec, "mixture", ffn_only=False, instead="use another adapter")
    if shared is not None:
        problems += _shared_problems(facts, spec, shared)
    if problems:
        raise ProblemReport(problems)
    of_shared = None if shared is None else load_spec(shared, "mixture")[0]
    tensors = list(_tensors(facts, spec, shared, of_shared))
    config, dtype = _dense_config(facts, spec, of_shared, tensors)
    shards = pack_shards(tensors, [BASE], options.max_shard_bytes)
    check_plan(shards, tensors)
    side_files = tuple(
        file for file in facts.side_files if travels_with_text(file, copy_tokenizer=options.copy_tokenizer)
    )
    gates = GatePlan(
        mode=next(name for name, mode in MODES.items() if not mode.needs_prompts),  # there is no router
        prompt_model="base",
        layers=spec.layers,
        hidden=spec.hidden,
        experts=(),
        shared=(),
        tokenizer_files=(),
        vocab=spec.vocab,
        seed=options.seed,
        quantize=None,
    )
    warnings = [*facts.warnings, *text_part_warnings(facts, "mixture", is_text_base=_has_encoder(facts))]
    return MergePlan(
        architecture=spec.model_type,
        config=config,
        dtype=dtype,
        shards=shards,
        side_files=side_files,
        gates=gates,
        sources=(plan_source(BASE, facts),),
        totals=compute_totals(shards, MoeShape(experts=1, experts_per_token=1), gates),
        options=options,
        warnings=tuple(dict.fromkeys([*warnings, *_scaling_warnings(facts)])),
        backbone=BackboneReport(method="base"),
        digest=plan_digest(shards, config, side_files, gates, strict=options.strict),
    )


def _has_encoder(facts: ModelFacts) -> bool:
    return find_wrapper(facts.wrapper_config) is not None


def _shared_problems(facts: ModelFacts, spec: DenseSpec, shared: ModelFacts) -> list[Problem]:
    of_shared, problems = load_spec(shared, "mixture")
    if of_shared is not None:
        problems += check_tensors(shared, of_shared, "mixture", ffn_only=True)
    mixture = facts.mixture
    if mixture is not None and not mixture.adds_shared:
        has_gate = bool(MOE_ARCHITECTURES[mixture.architecture].shared_router)
        why = "has a gate" if has_gate else "is averaged with the others"
        what = f"its shared expert {why}, which no dense model has: the expert and the shared expert can't be one FFN"
        remedy = "use --without-shared to leave the shared expert out, or extract the shared expert: #shared"
        problems.append(Problem(where=facts.label, what=what, remedy=remedy))
    return problems


def _scaling_warnings(facts: ModelFacts) -> Iterator[str]:
    scale = facts.mixture.output_factor if facts.mixture else 1.0
    if not math.isclose(scale, 1.0, rel_tol=1e-5):
        yield (
            f"{facts.label}: the mixture multiplies the output of its experts by routed_scaling_factor, {scale:g}. "
            "The dense model does not: its FFNs are those of the expert"
        )


def _dense_config(
    facts: ModelFacts, spec: DenseSpec, shared: DenseSpec | None, tensors: Sequence[OutputTensor]
) -> tuple[dict[str, Any], str]:
    """The config.json of the dense model, and the dtype of most of its bytes."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(sizes, key=lambda each: sizes[each])
    keys = ("intermediate_size", *spec.family.keys.get("intermediate_size", ()))
    width = spec.intermediate + (shared.intermediate if shared is not None else 0)
    config = {
        **{key: value for key, value in facts.config.items() if key not in _KEYS_OF_DTYPE},
        **dict.fromkeys(keys, width),
        "architectures": [spec.family.class_name],
        "tie_word_embeddings": spec.tied,
        "torch_dtype": NAME_OF_DTYPE[dtype],
    }
    return dict(sorted(config.items())), dtype


def _tensors(
    facts: ModelFacts, spec: DenseSpec, shared: ModelFacts | None, of_shared: DenseSpec | None
) -> Iterator[OutputTensor]:
    permuted = facts.mixture is not None and facts.mixture.has_permuted_heads
    heads = HeadPermutation(head_dim=spec.head_dim, rotary_dim=spec.rotary_dim, inverse=True) if permuted else None
    for row, _, name in spec.tensors():
        ref = weight_ref(facts, name)
        shape = ref.entry.shape
        rotates = heads if row.role in ROTARY_ROLES else None
        what: PartSource | tuple[Piece, ...] = _copied(ref, rotates)
        if row.is_ffn and shared is not None and of_shared is not None:
            other = weight_ref(shared, name)
            if row.role == "ffn.down":
                shape = (shape[0], shape[1] + other.entry.shape[1])
                what = Columns(matrices=tuple(_part(name, number, each) for number, each in enumerate((ref, other))))
            else:
                shape = (shape[0] + other.entry.shape[0], *shape[1:])
                what = _joined_rows(name, row.role, (ref, spec), (other, of_shared))
        yield OutputTensor(name=name, dtype=ref.entry.dtype, shape=shape, owner=BASE, what=what)


def _copied(ref: WeightRef, heads: HeadPermutation | None = None) -> Copy | Transform:
    if ref.lora is None and heads is None:
        return Copy(source=ref.entry)
    return Transform(source=ref.entry, lora=ref.lora, heads=heads)


def _part(name: str, number: int, ref: WeightRef) -> Part:
    entry = ref.entry
    return Part(
        name=f"{name}[{number}]", dtype=entry.dtype, shape=entry.shape, start=0, end=entry.nbytes, what=_copied(ref)
    )


def _joined_rows(
    name: str, role: str, own: tuple[WeightRef, DenseSpec], other: tuple[WeightRef, DenseSpec]
) -> tuple[Piece, ...]:
    """The rows of the expert and of the shared expert, one below the other: of a fused tensor, matrix by matrix."""
    pieces = []
    row = next(row for row in own[1].rows() if row.role == role)
    parts = [list(spec.fused_parts(row)) for _, spec in (own, other)]
    for matrices in zip(*parts, strict=True):
        for number, ((ref, _), (_, first, last)) in enumerate(zip((own, other), matrices, strict=True)):
            entry = slice_rows(ref.entry, first, last)
            lora = None if ref.lora is None else slice_lora(ref.lora, first, last)
            piece = WeightRef(entry=entry, lora=lora)
            pieces.append(Piece(name=f"{name}[{number}].{first}", shape=entry.shape, what=_copied(piece)))
    return tuple(pieces)
