"""`build_plan`: facts in, MergePlan out. Pure: no I/O, no Ray, no torch; the same facts give the same plan.

Every problem that configs and headers can show is collected and raised once, as one ProblemReport.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from raymoe.architectures import DenseSpec, MoeArchitecture, MoeShape, select_moe_architecture
from raymoe.architectures.moe_architecture import MIXTURE_KEYS, moe_config
from raymoe.architectures.wrappers import MIXTURE_WRAPPERS, Wrapper, wrapped_config, wrapped_text_config
from raymoe.config import ExpertConfig, MergeConfig
from raymoe.config.model_refs import ModelRef
from raymoe.config.prompt_sources import expand_prompts
from raymoe.config.start_keys import MoeLayers, chosen_layers
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import human_bytes
from raymoe.gate_modes import MODES
from raymoe.planning.backbone import Backbone, plan_backbone, plan_moments
from raymoe.planning.compatibility import (
    are_of_one_family,
    check_expert,
    check_tensors,
    expert_warnings,
    ffn_names,
    find_non_finite,
    is_tied_by_config,
    load_spec,
    text_part_warnings,
    whole_mixture_problem,
)
from raymoe.planning.digest import plan_digest
from raymoe.planning.engine_checks import engine_requirement, engine_warnings, merge_features
from raymoe.planning.invariants import check_plan
from raymoe.planning.modality import choose_wrapper, in_wrapper, wrap_tensors
from raymoe.planning.owner import ALL_EXPERTS, ALL_SHARED, BASE, CONFIG_KEYS, ROUTER, Owner
from raymoe.planning.plan import GatePlan, GatePrompts, KeptRows, MergeOptions, MergePlan, Source, WeightRef
from raymoe.planning.prompt_checks import prompt_warnings
from raymoe.planning.shard_packing import OutputTensor, pack_shards
from raymoe.planning.tensor_sources import (
    Member,
    adapter_problems,
    adapter_warnings,
    base_tensors,
    computed_tensors,
    expert_tensors,
    graft_ffn,
    plain_ffn_tensors,
    weight_refs,
)
from raymoe.planning.totals import compute_totals
from raymoe.sources.dtypes import DTYPE_OF_NAME, NAME_OF_DTYPE, dtype_code, is_dtype
from raymoe.sources.facts import ModelFacts, SideFile, slice_rows
from raymoe.sources.folder_protocol import PROCESSOR_FILES, has_vocabulary, matches
from raymoe.sources.quantization_check import QUANTIZATION_KEYS
from raymoe.tensor_names import HEAD, layer_of

# Keys of the base's config.json that describe the dense model, and would be wrong or unused in the MoE's.
_DROPPED_KEYS = frozenset(
    [
        "architectures",
        "model_type",
        "auto_map",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "use_sliding_window",
        "max_window_layers",
        "attention_bias",
        "mlp_bias",
        "pretraining_tp",
        "head_dim",
        "_attn_implementation_autoset",
        *QUANTIZATION_KEYS,
    ]
)
_FINITE_REMEDY = "correct the number, get the model again, or merge without --strict"
_GENERATION_CONFIG = "generation_config.json"


def build_plan(
    config: MergeConfig,
    facts: Mapping[ModelRef, ModelFacts],
    options: MergeOptions,
    differing: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> MergePlan:
    """Plan a merge.

    `facts` holds every model that `config` names, and `config` holds the prompts of its files
    (`sources.prompt_sampling`). `differing` is as in `plan_backbone`, for the plan's report only.
    Raises ProblemReport with all problems found.
    """
    base_facts = facts[config.base_model]
    base, problems = load_spec(base_facts, "base_model")
    members = _plan_members(config, facts, base, problems)
    if base is None:
        raise ProblemReport(problems)
    problems += _tokenizer_problems(config, base_facts)
    problems += _prompt_model_problems(config, base_facts)
    problems += _permuted_head_problems(
        config, {"base_model": base_facts, **{_expert_key(m): m.facts for m in members}}
    )
    chosen = chosen_layers(config.moe_layers, base.layers)
    if isinstance(chosen, str):
        what = f"moe_layers is {_as_text(config.moe_layers)}, but {chosen}"
        remedy = f"name layers from 0 to {base.layers - 1}, or leave it out"
        raise ProblemReport([*problems, Problem(where="moe_layers", what=what, remedy=remedy)])
    moe = _moe_shape(config, base, chosen)
    problems += _plain_layer_problems(config, base_facts, moe)
    problems += _granularity_problems(config, base)
    selection = select_moe_architecture(
        base,
        moe,
        forced=config.architecture,
        preferred=base_facts.mixture.architecture if base_facts.mixture else None,
        where="architecture" if config.architecture or not config.engines else "engines",
        requirement=engine_requirement(config.engines, base, moe),
    )
    problems += selection.problems
    problems += check_tensors(base_facts, base, "base_model", ffn_only=False)
    problems += adapter_problems(base_facts, base, "base_model", ffn_only=False)
    for member in members:
        where = f"{_expert_key(member)} ({member.facts.label})"
        problems += check_expert(
            base,
            member.spec,
            where,
            allow_crimes=options.allow_crimes,
            are_of_one_family=are_of_one_family(base_facts, base, member.facts, member.spec),
        )
        problems += _graft_problems(config, base, member, where)
        reads_gates = _prompt_model(config) == "expert" and MODES[config.gate_mode].needs_forward_pass
        reads_backbone = config.backbone.needs_prompts and not member.is_shared
        whole = reads_gates or reads_backbone
        problems += check_tensors(member.facts, member.spec, _expert_key(member), ffn_only=not whole)
        problems += adapter_problems(member.facts, member.spec, _expert_key(member), ffn_only=not reads_gates)
        if config.backbone.is_merged and not member.is_shared and not reads_gates:
            problems += adapter_problems(
                member.facts, member.spec, _expert_key(member), ffn_only=False, instead="use backbone: base"
            )
    if options.strict:
        for where, what in find_non_finite({"base_model": base_facts, **{_expert_key(m): m.facts for m in members}}):
            problems.append(Problem(where=where, what=f"{what}, which --strict refuses", remedy=_FINITE_REMEDY))
    if selection.architecture is not None:
        problems += _kept_router_problems(config, members, selection.architecture, base, moe)
    wrapper, modality_problems = choose_wrapper(config.modality, base_facts, selection.architecture)
    problems = list(dict.fromkeys([*problems, *modality_problems]))
    if problems or selection.architecture is None:
        raise ProblemReport(problems)
    dtype, architecture = _output_dtype(config, base_facts), in_wrapper(selection.architecture, wrapper)
    backbone = plan_backbone(config.backbone, base_facts, base, members, architecture, dtype, differing)
    return _assemble(config, options, base_facts, base, members, moe, architecture, backbone, dtype, wrapper)


def _tokenizer_problems(config: MergeConfig, base: ModelFacts) -> list[Problem]:
    if not config.reads_prompts or has_vocabulary(base.side_files):
        return []
    needed = config.needs_prompts
    reader = f"gate_mode {config.gate_mode}" if needed else f"backbone: {config.backbone.method}"
    what = f"there is no tokenizer in it, with which {reader} reads prompts"
    other = "gate_mode: random" if needed else "backbone: linear"
    remedy = f"copy the files of its tokenizer (tokenizer.json, for one) to it, or use {other}"
    return [Problem(where=f"base_model ({base.label})", what=what, remedy=remedy)]


def _prompt_model_problems(config: MergeConfig, base: ModelFacts) -> list[Problem]:
    """Whether the base has FFNs, if prompts pass its layers."""
    is_read = config.needs_prompts and MODES[config.gate_mode].needs_forward_pass
    if base.has_ffn or base.mixture is None or not is_read:
        return []
    if _prompt_model(config) != "base":
        return []
    what = (
        f"gate_mode {config.gate_mode} reads prompts with base_model, and this is a {base.mixture.title}, and "
        "only its backbone is used"
    )
    remedy = (
        "use prompt_model: grafted, in which each expert's FFNs read its prompts, or write base_model: "
        f"{config.base_model}#0, whose expert 0 reads all prompts"
    )
    return [Problem(where=f"base_model ({base.label})", what=what, remedy=remedy)]


def _plain_layer_problems(config: MergeConfig, base: ModelFacts, moe: MoeShape) -> list[Problem]:
    """Whether the base has FFNs, if there are layers without experts."""
    if base.has_ffn or base.mixture is None or not moe.dense_layers:
        return []
    what = (
        "moe_layers leaves out layers, which get the base's FFN, and this is a "
        f"{base.mixture.title}, and only its backbone is used"
    )
    remedy = f"write base_model: {config.base_model}#0, whose expert 0 gives these layers their FFN"
    return [Problem(where=f"base_model ({base.label})", what=what, remedy=remedy)]


def _permuted_head_problems(config: MergeConfig, models: Mapping[str, ModelFacts]) -> list[Problem]:
    """Views of mixtures whose attention only their own architecture computes, where it is computed or averaged."""
    reader = f"gate_mode {config.gate_mode}" if MODES[config.gate_mode].needs_forward_pass else ""
    reader = f"backbone: {config.backbone.method}" if config.backbone.is_merged else reader
    of_experts = _prompt_model(config) == "expert" or config.backbone.is_merged
    return [
        Problem(
            where=f"{where} ({facts.label})",
            what=f"it is a {facts.mixture.title} with the rows of its heads in another order than those of a "
            f"{facts.config['model_type']} model, and {reader} computes with them",
            remedy="use a gate mode that runs no model (`raymoe merge --help` lists them) and backbone: base",
        )
        for where, facts in models.items()
        if facts.mixture and facts.mixture.has_permuted_heads and reader and (where == "base_model" or of_experts)
    ]


def _graft_problems(config: MergeConfig, base: DenseSpec, member: Member, where: str) -> list[Problem]:
    """Whether an expert's FFNs have the names of the base's, if they take their place when prompts are read."""
    if _prompt_model(config) != "grafted" or not MODES[config.gate_mode].needs_forward_pass:
        return []
    if member.spec.model_type == base.model_type or ffn_names(member.spec) == ffn_names(base):
        return []
    what = f"a {member.spec.model_type} model stores its FFN differently from a {base.model_type} model"
    return [Problem(where=where, what=what, remedy="use prompt_model: base or expert")]


def _prompt_model(config: MergeConfig) -> str:
    return config.prompt_model or MODES[config.gate_mode].default_prompt_model


def _expert_key(member: Member) -> str:
    return f"{CONFIG_KEYS[member.owner.kind]}[{member.owner.index}]"


def _plan_members(
    config: MergeConfig, facts: Mapping[ModelRef, ModelFacts], base: DenseSpec | None, problems: list[Problem]
) -> list[Member]:
    members = []
    said = {problem.what for problem in problems}
    specs = [base] if base is not None else []  # one per kind: members share their tensor tables
    for kind, key in CONFIG_KEYS.items():
        for number, expert in enumerate(getattr(config, key)):
            model = facts[expert.source_model]
            where = f"{key}[{number}].source_model"
            if (whole := whole_mixture_problem(model, where)) is not None:
                problems.append(whole)
                continue
            spec, found = load_spec(model, where)
            # A problem of a model type is reported once.
            problems += [problem for problem in found if problem.what not in said]
            said.update(problem.what for problem in found)
            if spec is not None:
                if spec not in specs:
                    specs.append(spec)
                shared = specs[specs.index(spec)]
                whole = expert.model_copy(update={"reinit": config.reinit_of(expert, key)})
                members.append(Member(owner=Owner(kind, number), config=whole, facts=model, spec=shared))
    return members


def _granularity_problems(config: MergeConfig, base: DenseSpec) -> list[Problem]:
    """A problem if the FFN can't be cut into so many experts of equal width."""
    if not (uneven := [width for width in base.ffn_widths if width % config.granularity]):
        return []
    common = math.gcd(*base.ffn_widths)
    some = [number for number in range(2, 65) if common % number == 0]
    what = f"granularity is {config.granularity}, which does not divide the width of the base's FFN, {uneven[0]}"
    remedy = f"write a number that divides it: {', '.join(map(str, some))}" if some else "leave it out"
    return [Problem(where="granularity", what=what, remedy=remedy)]


def _as_text(layers: MoeLayers) -> str:
    return layers if isinstance(layers, str) else f"[{', '.join(map(str, layers))}]"


def _moe_shape(config: MergeConfig, base: DenseSpec, moe_layers: Sequence[int]) -> MoeShape:
    return MoeShape(
        experts=len(config.experts) * config.granularity,
        experts_per_token=config.experts_per_token * config.granularity,
        shared=len(config.shared_experts),
        shared_has_prompts=any(e.positive_prompts or e.negative_prompts for e in config.shared_experts),
        needs_prompts=config.reads_shared_prompts,
        granularity=config.granularity,
        dense_layers=tuple(layer for layer in range(base.layers) if layer not in moe_layers),
    )


def _assemble(
    config: MergeConfig,
    options: MergeOptions,
    base_facts: ModelFacts,
    base: DenseSpec,
    members: Sequence[Member],
    moe: MoeShape,
    architecture: MoeArchitecture,
    backbone: Backbone,
    dtype: str,
    wrapper: Wrapper | None,
) -> MergePlan:
    tensors: list[OutputTensor] = list(base_tensors(base_facts, base, architecture, dtype, backbone.refs))
    tensors += plain_ffn_tensors(base_facts, base, moe, architecture, dtype)
    tensors += expert_tensors(members, moe, architecture, dtype, options.seed)
    tensors += computed_tensors(base, moe, architecture, dtype)
    output_config = _output_config(base_facts.config, base, architecture, moe, dtype)
    if wrapper is not None:
        tensors = wrap_tensors(tensors, wrapper, base_facts)
    owners = [BASE, ALL_EXPERTS, *(m.owner for m in members), ALL_SHARED, ROUTER]
    gates = _gate_plan(config, options, base_facts, base, moe, members, backbone, bool(architecture.shared_router))
    moments = plan_moments(config, members, backbone, gates.tokenizer_files)
    shards = pack_shards(tensors, owners, options.max_shard_bytes)
    check_plan(shards, tensors)
    warnings = [f"{architecture.title}: {architecture.note}"] if architecture.note and not moe.shared else []
    if (since := architecture.min_transformers_for(output_config.get("layer_types"))) != architecture.min_transformers:
        warnings.append(
            f"{architecture.title}: windows on some layers only take transformers {since} or later; 4 puts the window "
            "on all layers and says nothing"
        )
    if architecture.stores_tied_head(base):
        size = next(tensor.nbytes for tensor in tensors if tensor.name == HEAD)
        warnings.append(
            f"{architecture.title}: the output holds {HEAD} ({human_bytes(size)}), a copy of the embedding that it is "
            f"tied to, since {architecture.tied_head_for} do not tie them"
        )
    if architecture.code_repository:
        warnings.append(
            f"{architecture.title}: transformers loads it with the code of {architecture.code_repository} on the Hub "
            "(trust_remote_code), which is for transformers 4"
        )
    if options.copy_tokenizer and not has_vocabulary(base_facts.side_files):
        warnings.append(f"base_model ({base_facts.label}): there is no tokenizer in it, and so none in the output")
    if options.copy_tokenizer and (code := [f.name for f in base_facts.side_files if f.name.endswith(".py")]):
        warnings.append(
            f"base_model ({base_facts.label}): its tokenizer has code of its own ({', '.join(code)}), which is copied "
            "with it and runs where it is loaded with trust_remote_code=True; here only with --trust-remote-code"
        )
    if base_facts.own_head and is_tied_by_config(base_facts):
        warnings.append(
            f"base_model ({base_facts.label}): tie_word_embeddings is true, but lm_head.weight differs from the "
            "embedding. The output keeps this head and has tie_word_embeddings: false. transformers 5 loads the base "
            "in the same way; transformers 4 replaces its head by the embedding"
        )
    if (pad := output_config.get("pad_token_id")) is not None and not _is_token_of(pad, base.vocab):
        output_config["pad_token_id"] = None
        warnings.append(
            f"base_model ({base_facts.label}): pad_token_id is {pad!r:.80}, which has no row in the embedding of "
            f"{base.vocab} rows. transformers loads no model with such a key: in the output it is null"
        )
    if moe_keys := _moe_keys_in_dense(base_facts.config, base):
        warnings.append(
            f"base_model ({base_facts.label}): its config.json has keys of mixtures of experts, which a "
            f"{base.model_type} model does not have: {', '.join(moe_keys)}. They are not used, and not in the output"
        )
    for where, what in find_non_finite({"base_model": base_facts, **{_expert_key(m): m.facts for m in members}}):
        warnings.append(f"{where}: {what}")
    warnings += [
        w
        for m in members
        for w in [
            *expert_warnings(
                base,
                m.spec,
                _expert_key(m),
                are_of_one_family=are_of_one_family(base_facts, base, m.facts, m.spec),
            ),
            *adapter_warnings(m, _expert_key(m), backbone.used_of(m.owner)),
            *text_part_warnings(m.facts, _expert_key(m)),
        ]
    ]
    warnings += text_part_warnings(base_facts, "base_model", is_text_base=wrapper is None)
    warnings += [
        w for facts in {id(f): f for f in [base_facts, *(m.facts for m in members)]}.values() for w in facts.warnings
    ]
    warnings += prompt_warnings(gates)
    side_files = tuple(
        file
        for file in base_facts.side_files
        if travels_with_text(file, copy_tokenizer=options.copy_tokenizer)
        or (matches(file.name, PROCESSOR_FILES) and wrapper is not None)
    )
    if wrapper is not None:
        output_config = wrapped_config(wrapper, base_facts.wrapper_config, output_config)
    elif architecture.wrapper:
        output_config = wrapped_text_config(MIXTURE_WRAPPERS[architecture.wrapper], output_config)
    return MergePlan(
        architecture=architecture.name,
        config=output_config,
        dtype=dtype,
        shards=shards,
        side_files=side_files,
        gates=gates,
        sources=(plan_source(BASE, base_facts), *(plan_source(m.owner, m.facts) for m in members)),
        totals=compute_totals(shards, moe, gates, moments),
        options=options,
        warnings=tuple(dict.fromkeys(warnings)),
        features=merge_features(base, moe, architecture),
        # Of an image-text merge's own class, no engine was looked at.
        engine_warnings=() if wrapper else tuple(engine_warnings(config.engines, base, moe, architecture)),
        backbone=backbone.report,
        moments=moments,
        granularity=config.granularity,
        digest=plan_digest(shards, output_config, side_files, gates, moments=moments, strict=options.strict),
    )


def _output_dtype(config: MergeConfig, base: ModelFacts) -> str:
    """The config's dtype; else the dtype in the base's config.json; else the dtype of most of its bytes.

    An entry there that is not a dtype of weights (`auto`, `int8`) is ignored.
    """
    if config.dtype:
        return DTYPE_OF_NAME[config.dtype]
    for key in ("torch_dtype", "dtype"):
        named = base.config.get(key)
        if isinstance(named, str) and is_dtype(named) and dtype_code(named) in NAME_OF_DTYPE:
            return dtype_code(named)
    weights: dict[str, int] = {}
    for entry in base.index.tensors.values():
        weights[entry.dtype] = weights.get(entry.dtype, 0) + entry.nbytes
    return max(weights, key=lambda dtype: weights[dtype])


def _output_config(
    base_config: Mapping[str, Any], base: DenseSpec, architecture: MoeArchitecture, moe: MoeShape, dtype: str
) -> dict[str, Any]:
    family_ids = {k: v for k, v in base.family.defaults.items() if k.endswith("_token_id")}
    dropped = {*_DROPPED_KEYS, *base.family.dropped, *_moe_keys_in_dense(base_config, base)}
    kept = {k: v for k, v in base_config.items() if k not in dropped}
    output = {**family_ids, **kept, **moe_config(architecture, base, moe), "torch_dtype": NAME_OF_DTYPE[dtype]}
    return dict(sorted(output.items()))


def _is_token_of(token: object, rows: int) -> bool:
    """Whether an embedding with so many rows can have this padding index; negative ones count from the end."""
    return isinstance(token, int) and not isinstance(token, bool) and -rows <= token < rows


def _moe_keys_in_dense(base_config: Mapping[str, Any], base: DenseSpec) -> list[str]:
    """Keys of mixtures of experts in the config.json of a dense model, unless its family has such keys."""
    return sorted((MIXTURE_KEYS & base_config.keys()) - set(base.family.mixture_keys))


def _gate_plan(
    config: MergeConfig,
    options: MergeOptions,
    base_facts: ModelFacts,
    base: DenseSpec,
    moe: MoeShape,
    members: Sequence[Member],
    backbone: Backbone,
    has_shared_gate: bool,
) -> GatePlan:
    mode, prompt_model, moe_layers = MODES[config.gate_mode], _prompt_model(config), moe.layers(base)
    layers = moe_layers[-1] + 1  # later ones have no router, so that prompts need not pass them

    @cache
    def is_needed(name: str) -> bool:
        layer = layer_of(name)
        return (layer is None or layer < layers) and mode.needs_parameter(name, layers, base.family.ffn)

    def needed(weights: Mapping[str, WeightRef]) -> dict[str, WeightRef]:
        return {name: ref for name, ref in weights.items() if is_needed(name)}

    # The base as the merge uses it.
    base_weights = needed(weight_refs(base_facts, base, backbone.refs)) if config.needs_prompts else {}

    def prompts(member: Member) -> GatePrompts:
        expert: ExpertConfig = member.config
        model_config, weights = base_facts.config, base_weights
        is_read = config.reads_shared_prompts if member.is_shared else config.needs_prompts_of(expert)
        if not is_read:
            weights = {}
        elif prompt_model == "expert" and mode.needs_forward_pass:
            weights, model_config = needed(weight_refs(member.facts, member.spec)), member.facts.config
        elif prompt_model == "grafted":
            weights = graft_ffn(base_weights, base, moe, member, is_needed)
        return GatePrompts(
            owner=member.owner,
            positive=expand_prompts(expert.positive_prompts) if is_read else (),
            negative=expand_prompts(expert.negative_prompts) if is_read else (),
            chat_template=is_read and config.uses_chat_template(expert),
            config=model_config,
            weights=weights,
        )

    tokenizer: tuple[SideFile, ...] = tuple(
        f for f in base_facts.side_files if not matches(f.name, (_GENERATION_CONFIG, *PROCESSOR_FILES))
    )
    return GatePlan(
        mode=config.gate_mode,
        prompt_model=prompt_model,
        layers=layers,
        router_layers=tuple(moe_layers) if moe.dense_layers else None,
        hidden=base.hidden,
        experts=tuple(prompts(m) for m in members if not m.is_shared),
        shared=tuple(prompts(m) for m in members if m.is_shared and has_shared_gate),
        tokenizer_files=tokenizer,
        vocab=base.vocab,
        seed=options.seed,
        quantize=options.quantize_gates,
        kept=_kept_rows(config, members),
    )


def _kept_rows(config: MergeConfig, members: Sequence[Member]) -> tuple[KeptRows, ...] | None:
    """The router rows of the experts that keep them; None if the config keeps none."""
    if config.keep_routers is None:
        return None
    kept = []
    for member in members:
        number, mixture = member.config.source_model.expert, member.facts.mixture
        if mixture is None:
            continue
        if not member.is_shared and config.keeps_row(member.config) and isinstance(number, int):
            rows = tuple(slice_rows(router, number, number + 1) for _, router in sorted(mixture.routers.items()))
            kept.append(KeptRows(owner=member.owner, layers=rows))
        elif member.is_shared and config.keeps_shared_gate and mixture.shared_routers:
            gates = tuple(gate for _, gate in sorted(mixture.shared_routers.items()))
            kept.append(KeptRows(owner=ALL_SHARED, layers=gates))
    return tuple(kept)


def _kept_router_problems(
    config: MergeConfig, members: Sequence[Member], architecture: MoeArchitecture, base: DenseSpec, moe: MoeShape
) -> Iterator[Problem]:
    """Whether the rows that are kept mean the same in the output's architecture."""
    layers = set(range(base.layers)).difference(moe.dense_layers)
    if architecture.shared_router and config.keep_routers and config.shared_experts and not config.keeps_shared_gate:
        what = f"the shared experts of a {architecture.title} mixture have a gate, which is not kept"
        remedy = "take the shared expert of that mixture (expert: shared), or remove keep_routers"
        yield Problem(where="keep_routers", what=what, remedy=remedy)
    for member in members:
        mixture = member.facts.mixture
        if member.is_shared or not config.keeps_row(member.config) or mixture is None:
            continue
        where = f"keep_routers ({member.facts.label})"
        if mixture.architecture != architecture.name:
            what = f"it is a {mixture.title}, and the output is a {architecture.title} mixture, whose routers differ"
            yield Problem(
                where=where, what=what, remedy=f"write architecture: {mixture.architecture}, or remove keep_routers"
            )
        elif mixture.routers.keys() != layers or any(
            router.shape != (mixture.experts, base.hidden) for router in mixture.routers.values()
        ):
            what = "its routers are not one matrix of (experts, hidden) for each layer with experts"
            yield Problem(where=where, what=what, remedy="remove keep_routers, so that routers are computed")


def travels_with_text(file: SideFile, *, copy_tokenizer: bool) -> bool:
    """Whether a small file of a model is copied to an output that reads text only."""
    return file.name == _GENERATION_CONFIG or (copy_tokenizer and not matches(file.name, PROCESSOR_FILES))


def plan_source(owner: Owner, facts: ModelFacts) -> Source:
    """A model as a plan lists it."""
    files = facts.index.files + (facts.adapter.index.files if facts.adapter else ())
    adapter = facts.adapter.label if facts.adapter else None
    return Source(
        owner=owner,
        label=facts.label,
        revision=facts.revision,
        adapter=adapter,
        files=files,
        folders=facts.folders,
    )
