"""Reads a PEFT LoRA adapter: which weights of the model it changes, by which pair of factors, with which scaling.

    base_model.model.<module>.lora_A.weight  (rank, in_features)   \\
    base_model.model.<module>.lora_B.weight  (out_features, rank)   --> <module>.weight += scaling * B @ A
    base_model.model.<module>.lora_magnitude_vector  (out_features,), with DoRA: lengths of that weight's rows
    base_model.model.<module>.weight  --> replaces the model's own tensor (`modules_to_save`)

A key may contain peft's name for an adapter (`lora_A.default.weight`). Other content of an adapter (LoRA on an
embedding, trained rows, resized embeddings) is listed by module in `AdapterFacts.left_out`: planning rejects it only if
the merge needs it. An expert contributes only its FFN, so usually the merge does not.

Everything else is rejected by name: if part of an adapter were silently left out, the result would be an expert that
was never trained. Each kind of fault has its own remedy. "Merge it with peft" is advised only if peft 0.21 applies the
adapter. Names that peft does not find, it skips with a warning, and returns the model unchanged.

Sources: the checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint; the mapping of names,
`BaseTuner._remap_adapter_state_dict_for_load` in peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raymoe.architectures.wrappers import OTHER_PART, Wrapper, part_of
from raymoe.errors import CheckpointError, Problem
from raymoe.formatting import short_list
from raymoe.sources.dtypes import FLOAT_DTYPES
from raymoe.sources.facts import AdapterFacts, CheckpointIndex, LoraPair, TensorEntry
from raymoe.sources.lora_patterns import LONGEST_NAME, Patterns, pattern_problem, slow_patterns, too_many_patterns
from raymoe.tensor_names import EMBEDDING, HEAD

MERGE_WITH_PEFT = "merge the adapter into its model with peft (merge_and_unload, save_pretrained) and use the result"
"""A remedy that works for adapters that peft applies and raymoe does not."""
LORA_ON_TIED_HEAD = "LoRA on the output head, which the model ties to its embedding"
_SAVE_AGAIN = "save the adapter again with peft (save_pretrained), or download it again"
_GATHER = (
    "save the adapter again with gathered weights (stage3_gather_16bit_weights_on_model_save: true in DeepSpeed's "
    "config), or recover it from the training checkpoint with DeepSpeed's zero_to_fp32.py"
)
EMPTY_ADAPTER = f"DeepSpeed's ZeRO-3 leaves such files: {_GATHER}"
"""The remedy for an adapter's file without tensors."""
_UNCHANGED = "Merging it with peft would return the model unchanged"
_PREFIX = "base_model.model."
# `default` is peft's name for an adapter that it loads: it finds keys with this name, but not with other names.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_(?P<factor>[AB])(\.(?P<name>[^.]+))?\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(\.weight|\.(?P<magnitude_name>[^.]+)(\.weight)?)?)"
)
_MAGNITUDE = "magnitude"
_MAX_COMPONENTS = 8
_NAMED = 5  # how many problems of one kind are listed

# Settings that do not change the meaning of the factors. (The tensors themselves show which modules are targeted.)
_HARMLESS_SETTINGS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # peft turns it off for linear layers, and there are no other layers here
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",  # the tensors show which modules those are
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)

# Settings that do, with a description, and those of them that peft can't merge into a model either.
_UNSUPPORTED_SETTINGS: Mapping[str, str] = {
    "lora_bias": "biases on the factors",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA, which depends on the prompt",
    "arrow_config": "Arrow routing between adapters",
    "kasa_config": "KaSA, which adds singular values",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "loftq_config": "LoftQ, which changed the model's weights",
}
_NEVER_MERGED = frozenset({"lora_bias", "layer_replication", "alora_invocation_tokens", "arrow_config"})
_PROMPT_TYPES = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
)

# `init_lora_weights` that do not change the model's own weights. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# change them, so that the factors only fit the changed model.
_INITS_KEEPING_BASE = ("gaussian", "eva", "orthogonal", "mica")

_TRAINED_ROWS = "trained embedding rows"
# Tensors that do not belong to a pair of factors: part of the key -> description.
_FOREIGN_KEYS: Mapping[str, str] = {
    ".lora_embedding_": "LoRA on an embedding",
    ".token_adapter.": _TRAINED_ROWS,
    ".trainable_tokens_": _TRAINED_ROWS,
    ".lora_B.bias": "a bias on a factor",
    ".lora_A.bias": "a bias on a factor",
    ".base_layer.": "a copy of the model's own weight",
}
_CLASSIFIERS = frozenset({"classifier", "score"})
_SAVED_MODULE = re.compile(r"\.modules_to_save(\.default)?\.")


def adapter_facts(
    label: str,
    revision: str | None,
    config: Mapping[str, Any],
    index: CheckpointIndex,
    model: CheckpointIndex,
    wrapper: Wrapper | None = None,
) -> AdapterFacts:
    """Check an adapter against its model, and pair its tensors.

    `config` is adapter_config.json, `index` the adapter's tensors, `model` the tensors of the model that it is applied
    to. If that is the text part of an image-text model, `wrapper` is the latter: the adapter may have its names.
    `base_model_name_or_path` is not compared, since models move and are renamed; shapes are compared. Raises
    CheckpointError with all problems.
    """
    if faults := _config_faults(config):  # without a valid config the tensors can't be interpreted
        raise CheckpointError([fault.at(label) for fault in _first_faults(faults, "problems of adapter_config.json")])
    other_base = _other_base(config)
    found = _sort(index, model, other_base, wrapper)
    faults = [*found.faults, *_missing_modules(config, found)]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if slow := slow_patterns((ranks, alphas), found.written.values()):
        faults.append(_Fault(f"rank_pattern and alpha_pattern in adapter_config.json: {slow}", MERGE_WITH_PEFT))
        ranks = alphas = {}
    patterns = Patterns(ranks, config["r"]), Patterns(alphas, config["lora_alpha"])
    pairs: dict[str, LoraPair] = {}
    for module, factors in found.factors.items():
        try:
            pairs[f"{module}.weight"] = _make_pair(module, found.written[module], factors, config, model, *patterns)
        except _Misfit as misfit:
            faults.append(_Fault(str(misfit), misfit.remedy or other_base))
    if not (pairs or faults or found.replaced or found.left_out or found.outside):
        faults.append(_Fault("the adapter holds no LoRA factors", _SAVE_AGAIN))
    if faults:
        raise CheckpointError([fault.at(label) for fault in _first_faults(faults)])
    return AdapterFacts(
        label=label,
        revision=revision,
        config=config,
        index=index,
        pairs=pairs,
        replaced=found.replaced,
        left_out=found.left_out,
        outside=found.outside,
    )


class _Fault(NamedTuple):
    what: str
    remedy: str

    def at(self, label: str) -> Problem:
        return Problem(where=label, what=self.what, remedy=self.remedy)


class _Misfit(ValueError):
    """A problem with the factors of a module."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


def _first_faults(faults: Sequence[_Fault], kind: str = "that don't fit") -> list[_Fault]:
    if len(faults) <= _NAMED:
        return list(faults)
    return [*faults[:_NAMED], _Fault(f"and {len(faults) - _NAMED} more {kind}", faults[_NAMED].remedy)]


def _other_base(config: Mapping[str, Any]) -> str:
    """The remedy for tensors that do not fit this model: peft can't load them either."""
    made_for = config.get("base_model_name_or_path")
    return f"put it on the model that it was made for{f', {made_for}' if made_for else ''}"


def _config_faults(config: Mapping[str, Any]) -> list[_Fault]:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        what = f"an adapter of type {peft_type!r:.80} (adapter_config.json: peft_type); only LORA is supported"
        changes_nothing = "it changes no weights, so that no expert can be made of it: use a LoRA adapter"
        return [_Fault(what, changes_nothing if str(peft_type) in _PROMPT_TYPES else MERGE_WITH_PEFT)]
    faults = [
        _Fault(
            f"the adapter uses {what} ({key}), which is not supported",
            "use an adapter trained without it: peft can't merge it into a model either"
            if key in _NEVER_MERGED
            else MERGE_WITH_PEFT,
        )
        for key, what in _UNSUPPORTED_SETTINGS.items()
        if config.get(key)
    ]
    others = []
    if config.get("bias", "none") != "none":
        others.append(f"the adapter trains biases (bias: {config['bias']!r:.80}), which is not supported")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None and str(init).lower() not in _INITS_KEEPING_BASE:
        others.append(
            f"the adapter was made with init_lora_weights {init!r:.80}, which changed its model's own weights"
        )
    for key in sorted(config.keys() - _HARMLESS_SETTINGS - _UNSUPPORTED_SETTINGS.keys() - {"bias"}):
        if config[key]:
            others.append(f"unknown setting {key!r:.80} = {config[key]!r:.80} in adapter_config.json")
    faults += [_Fault(what, MERGE_WITH_PEFT) for what in others]
    return faults + [
        _Fault(what, f"correct adapter_config.json, or {_SAVE_AGAIN}") for what in _number_problems(config)
    ]


def _number_problems(config: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        if not _is_positive(config.get(key), kind):
            problems.append(f"{key!r} in adapter_config.json is {config.get(key)!r:.80}, not a number over 0")
    for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            problems.append(f"{key!r} in adapter_config.json is not an object")
            continue
        if problem := too_many_patterns(patterns):
            problems.append(f"{key!r} {problem}")
            continue
        for pattern, value in patterns.items():
            if not _is_positive(value, kind):
                problems.append(f"{key!r} gives {pattern!r:.80} the value {value!r:.80}, not a number over 0")
            if problem := pattern_problem(pattern):
                problems.append(f"{key!r} {problem}")
    return problems


def _is_positive(value: Any, kind: type[int] | tuple[type[int], type[float]]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 2**63


@dataclass(slots=True)
class _Sorted:
    """An adapter's tensors. `factors`: module -> 'A', 'B', with DoRA 'magnitude'; `written`: the adapter's own names
    of their modules; the rest is as in AdapterFacts."""

    factors: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, TensorEntry] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    faults: list[_Fault] = field(default_factory=list)


def _sort(index: CheckpointIndex, model: CheckpointIndex, other_base: str, wrapper: Wrapper | None) -> _Sorted:
    found = _Sorted()
    empty, misnamed, unknown = [], [], []
    for name, entry in index.tensors.items():
        match = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        module = _text_name(match["module"], wrapper) if match else ""
        if 0 in entry.shape:
            empty.append(name)
        elif wrapper and (part := part_of(name.removeprefix(_PREFIX))) != OTHER_PART:
            found.outside[name] = part
        elif foreign := next((part for part in _FOREIGN_KEYS if part in name), None):
            found.left_out[_text_name(name.removeprefix(_PREFIX).partition(foreign)[0], wrapper)] = _FOREIGN_KEYS[
                foreign
            ]
        elif match is None and name.startswith(_PREFIX) and name.endswith((".weight", ".bias")):
            _add_whole(found, _text_name(_SAVED_MODULE.sub(".", name.removeprefix(_PREFIX)), wrapper), entry, model)
        elif match is None:
            unknown.append(name)
        elif not name.startswith(_PREFIX) or (match["name"] or match["magnitude_name"] or "default") != "default":
            misnamed.append(name)
        elif f"{module}.weight" in model.tensors:
            _add_factor(found, module, match, entry)
        elif module == "lm_head":
            found.left_out["lm_head"] = LORA_ON_TIED_HEAD
        else:
            misnamed.append(name)
    for name in [name for name in found.replaced if name.rpartition(".")[0] in found.factors]:
        del found.replaced[name]
        found.left_out[name.rpartition(".")[0]] = "a whole tensor beside LoRA factors"
    for module in found.left_out.keys() & found.factors.keys():
        del found.factors[module]  # DoRA's lengths of an embedding, factors with biases
    found.faults += [*_empty_faults(empty), *_name_faults(misnamed, model, other_base), *_unknown_faults(unknown)]
    return found


def _text_name(name: str, wrapper: Wrapper | None) -> str:
    """The name of a module or tensor in the text part of a wrapped model. Adapters of the text model alone have it."""
    return (wrapper.text_name(name) if wrapper else "") or name


def _missing_modules(config: Mapping[str, Any], found: _Sorted) -> Iterator[_Fault]:
    """Problems of settings that name tensors which are not in the file; peft can't load such an adapter."""
    held = [*(name.rpartition(".")[0] for name in found.replaced), *found.left_out, *found.outside]
    components = {component for module in held for component in module.split(".")}
    named = config.get("modules_to_save") or []
    named = named if isinstance(named, list) else [named]
    missing = [name for name in named if not isinstance(name, str) or name.rpartition(".")[2] not in components]
    # For sequence and token classifiers, peft writes all names that the head may have; a model has one of them.
    if _CLASSIFIERS.issubset(name for name in named if isinstance(name, str)) and not _CLASSIFIERS.issubset(missing):
        missing = [name for name in missing if name not in _CLASSIFIERS]
    if missing:
        what = f"modules_to_save in adapter_config.json names {short_list([repr(n) for n in missing])}"
        yield _Fault(f"{what}, and the adapter's file holds no tensors of it", _SAVE_AGAIN)
    if config.get("trainable_token_indices") and _TRAINED_ROWS not in found.left_out.values():
        what = "adapter_config.json has trainable_token_indices, and the adapter's file holds no trained rows"
        yield _Fault(what, _SAVE_AGAIN)


def _add_factor(found: _Sorted, module: str, match: re.Match[str], entry: TensorEntry) -> None:
    of_module = found.factors.setdefault(module, {})
    found.written[module] = match["module"]
    part = match["factor"] or _MAGNITUDE
    if part in of_module:
        what = f"{module!r} has two tensors for one factor: {of_module[part].name!r} and {entry.name!r}"
        found.faults.append(_Fault(what, _SAVE_AGAIN))
    of_module[part] = entry


def _add_whole(found: _Sorted, name: str, entry: TensorEntry, model: CheckpointIndex) -> None:
    """A whole tensor of the model's own: it replaces the model's, if its shape fits."""
    own, module = model.tensors.get(name), name.rpartition(".")[0]
    if name == EMBEDDING and HEAD not in model.tensors:
        found.left_out[module] = "a whole embedding, without the output head that the model ties to it"
    elif own is None or entry.dtype not in FLOAT_DTYPES:
        found.left_out[module] = "a whole tensor that the model does not have in this form"
    elif own.shape != entry.shape:
        found.left_out[module] = f"a whole tensor of another shape, {list(entry.shape)} for {list(own.shape)}"
    else:
        found.replaced[name] = entry


def _empty_faults(names: Sequence[str]) -> Iterator[_Fault]:
    if names:
        what = f"{len(names)} tensor(s) have no elements, as DeepSpeed's ZeRO-3 leaves them: {short_list(names)}"
        yield _Fault(what, _GATHER)


def _unknown_faults(names: Sequence[str]) -> Iterator[_Fault]:
    for name in names:
        yield _Fault(
            f"tensor {name!r} is no LoRA factor (base_model.model.<module>.lora_A.weight or lora_B)", _SAVE_AGAIN
        )


def _name_faults(names: Sequence[str], model: CheckpointIndex, other_base: str) -> Iterator[_Fault]:
    """Problems of factors with names that peft does not find: it skips them, and returns the model unchanged."""
    modules = _modules_by_ending(model)
    foreign, renamed = [], {}
    for name in names:
        match = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        assert match is not None
        module = _same_module(match["module"], modules)
        if module is None:
            foreign.append(f"{match['module']}.weight")
        else:
            part = f"lora_{match['factor']}.weight" if match["factor"] else "lora_magnitude_vector"
            renamed[name] = f"{_PREFIX}{module}.{part}"
    if foreign:
        some_names = short_list([repr(name) for name in dict.fromkeys(foreign)])
        what = f"the adapter changes {some_names}, which the model does not have: another base model?"
        yield _Fault(what, f"{other_base}. {_UNCHANGED}")
    if renamed:
        name, good = next(iter(renamed.items()))
        what = (
            f"{len(renamed)} tensor(s) have names of another model class, wrapper or adapter: {name!r} would have to "
            f"be {good!r}"
        )
        remedy = (
            "rename these tensors in the adapter's file (with load_file and save_file of safetensors), or save the "
            f"adapter again from the model class that config.json names. {_UNCHANGED}"
        )
        yield _Fault(what, remedy)


def _modules_by_ending(model: CheckpointIndex) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in model.tensors:
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            for ending in _endings(module):
                found.setdefault(ending, []).append(module)
    return found


def _same_module(module: str, modules: Mapping[str, Sequence[str]]) -> str | None:
    """The only module of the model that another name can mean: by the longest suffix that is unique."""
    for ending in _endings(module):
        candidates = modules.get(ending, ())
        if len(candidates) == 1:
            return candidates[0]
    return None


def _endings(module: str) -> Iterator[str]:
    """The suffixes of a module's name, longest first, with at least three components: layer, block, matrix.

    With eight components at most: wrappers add a few at the front, and a name may have hundreds.
    """
    parts = module.split(".")
    for start in range(max(0, len(parts) - _MAX_COMPONENTS), max(1, len(parts) - 2)):
        yield ".".join(parts[start:])


def _make_pair(
    module: str,
    written: str,
    found: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    model: CheckpointIndex,
    ranks: Patterns,
    alphas: Patterns,
) -> LoraPair:
    """The factors of one module, which adapter_config.json calls `written`. Raises _Misfit with the first problem."""
    for factor, other in (("A", "B"), ("B", "A")):
        if factor not in found:
            raise _Misfit(f"{module!r} has lora_{other} but no lora_{factor}", _SAVE_AGAIN)
    a, b = found["A"], found["B"]
    target = model.tensors[f"{module}.weight"]
    for entry in (a, b):
        if entry.dtype not in FLOAT_DTYPES or len(entry.shape) != 2:
            what = f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; a float matrix is expected"
            raise _Misfit(what, _SAVE_AGAIN)
    rank, alpha = _rank_and_alpha(written, ranks, alphas)
    if a.shape[0] != rank or b.shape[1] != rank:
        shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        what = f"{module!r}: {shapes} don't have the rank {rank} of adapter_config.json"
        raise _Misfit(what, "correct r or rank_pattern in adapter_config.json; peft can't load the adapter either")
    if target.shape != (b.shape[0], a.shape[1]):
        delta = [b.shape[0], a.shape[1]]
        raise _Misfit(f"{module!r}: the adapter's delta is {delta}, the model's weight {list(target.shape)}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(a=a, b=b, scaling=scaling, magnitude=_find_magnitude(module, found, config, rows=b.shape[0]))


def _find_magnitude(
    module: str, found: Mapping[str, TensorEntry], config: Mapping[str, Any], rows: int
) -> TensorEntry | None:
    """DoRA's row lengths, if the adapter uses DoRA. Raises _Misfit if only the tensor or only the setting is there."""
    entry = found.get(_MAGNITUDE)
    if bool(config.get("use_dora")) is not (entry is not None):
        there, not_there = ("a", "no use_dora") if entry is not None else ("no", "use_dora")
        what = f"{module!r} has {there} lora_magnitude_vector, and adapter_config.json has {not_there}"
        raise _Misfit(what, _SAVE_AGAIN if entry is None else "set use_dora: true in adapter_config.json")
    if entry is not None and (entry.dtype not in FLOAT_DTYPES or entry.shape != (rows,)):
        what = f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}; {rows} floats are expected"
        raise _Misfit(what, _SAVE_AGAIN)
    return entry


def _rank_and_alpha(module: str, ranks: Patterns, alphas: Patterns) -> tuple[int, float]:
    if (ranks or alphas) and len(module) > LONGEST_NAME:
        raise _Misfit(
            f"{module!r:.120}: its name is too long to be matched with rank_pattern and alpha_pattern", MERGE_WITH_PEFT
        )
    return ranks.value(module), alphas.value(module)
