"""Keyword arguments of the Python functions, as the values that the packages take.

    copy_tokenizer, strict, ...    --merge_options-->     MergeOptions
    address, actors, device, ...   --runtime_settings-->  RuntimeSettings
    transformers_cache             --hub_options-->       HubOptions
    a path, a mapping, or keys     --merge_config-->      MergeConfig

The names are those of the commands' options. Each value may also be given whole; then none of its single arguments may
be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from raymoe.config import MergeConfig, load_config, make_config
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import parse_size
from raymoe.planning import MergeOptions
from raymoe.sources.hub import HubOptions

if TYPE_CHECKING:
    from raymoe.runtime.settings import RuntimeSettings

ConfigSource = MergeConfig | Mapping[str, Any] | str | Path
_Value = TypeVar("_Value")


class ConfigKeys(TypedDict, total=False):
    """The keys of a merge config, for functions that take them as keyword arguments."""

    base_model: str | Mapping[str, Any]
    experts: Sequence[Mapping[str, Any]]
    shared_experts: Sequence[Mapping[str, Any]]
    gate_mode: str
    dtype: str
    experts_per_token: int
    architecture: str
    engines: Sequence[str]
    prompt_model: str
    chat_template: bool
    backbone: str | Mapping[str, Any]
    modality: str
    granularity: int
    reinit: float
    moe_layers: str | Sequence[int]
    keep_routers: str | Mapping[str, Any]
    storage: Mapping[str, Any]


def merge_config(
    config: ConfigSource | None, keys: Mapping[str, Any], *, function: str, allow_all_same: bool
) -> MergeConfig:
    """The config that a function was given, in any of its forms. A MergeConfig is checked when it is planned.

    Raises ProblemReport for what is wrong in it, and TypeError for keyword arguments that `function` does not take.
    """
    known = tuple(MergeConfig.model_fields)
    if unknown := [key for key in keys if key not in known]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}{hint}")
    if config is None:
        if not keys:
            raise TypeError(f"{function}() needs a config: a path, a mapping, a MergeConfig, or its keys as arguments")
        return make_config(keys, allow_all_same=allow_all_same)
    if keys:
        raise TypeError(f"{function}() got a config and {', '.join(keys)}: put {', '.join(keys)} into the config")
    if isinstance(config, (str, Path)):
        return load_config(config, allow_all_same=allow_all_same)
    return make_config(config, allow_all_same=allow_all_same) if isinstance(config, Mapping) else config


def merge_options(
    whole: MergeOptions | None,
    *,
    copy_tokenizer: bool,
    allow_crimes: bool,
    out_shard_size: str | int,
    random_seed: int,
    load_in_8bit: bool,
    load_in_4bit: bool,
    strict: bool,
    write_model_card: bool = True,
) -> MergeOptions:
    """The options that decide the bytes of a merge. Raises ProblemReport, or TypeError for options given twice."""
    problems = []
    try:
        max_shard_bytes = parse_size(str(out_shard_size))
    except ValueError as error:
        problems.append(Problem(where="out_shard_size", what=str(error)))
    if load_in_8bit and load_in_4bit:
        problems.append(Problem(where="load_in_8bit", what="can't go with load_in_4bit", remedy="choose one"))
    if problems:
        raise ProblemReport(problems)
    made = MergeOptions(
        max_shard_bytes=max_shard_bytes,
        seed=random_seed,
        allow_crimes=allow_crimes,
        copy_tokenizer=copy_tokenizer,
        model_card=write_model_card,
        quantize_gates="8bit" if load_in_8bit else "4bit" if load_in_4bit else None,
        strict=strict,
    )
    return only_one("options", whole, made, MergeOptions())


def runtime_settings(
    whole: RuntimeSettings | None,
    *,
    address: str | None,
    actors: int | None,
    device: str | None,
    stall_timeout: float,
    trust_remote_code: bool,
    transformers_cache: str | None,
    verbose: int,
    quiet: bool,
    gpus_per_expert: float | None = None,
    keep_uploads: bool = False,
    overwrite: bool = False,
    trust_record: bool = False,
) -> RuntimeSettings:
    """How a merge or a verification runs. Raises ProblemReport, or TypeError for settings given twice."""
    from raymoe.runtime.settings import RuntimeSettings

    least = {"actors": (actors, 1), "stall_timeout": (stall_timeout, 0.05), "gpus_per_expert": (gpus_per_expert, 0)}
    if problems := [
        Problem(where=name, what=f"{value!r} is less than {minimum}", remedy=f"give {minimum} or more")
        for name, (value, minimum) in least.items()
        if value is not None and value < minimum
    ]:
        raise ProblemReport(problems)
    made = RuntimeSettings(
        address=address,
        gpus_per_expert=gpus_per_expert,
        actors=actors,
        device=chosen_device(device),
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        overwrite=overwrite,
        verbosity=verbose or (-1 if quiet else 0),
        stall_timeout_s=60 * stall_timeout,
        keep_uploads=keep_uploads,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    return only_one("settings", whole, made, RuntimeSettings(verbosity=-1))


def hub_options(whole: HubOptions | None, transformers_cache: str | None) -> HubOptions:
    """How the Hub is reached. Raises TypeError if both are given."""
    return only_one("hub", whole, HubOptions(cache_dir=transformers_cache), HubOptions())


def chosen_device(device: str | None) -> str | None:
    """`cpu`, `cuda`, or None (chosen automatically). An unknown device is refused later, together with other
    problems."""
    name = device.strip().lower() if device is not None else None
    return None if name == "auto" else name


def only_one(name: str, whole: _Value | None, made: _Value, default: _Value) -> _Value:
    """The value that was given whole as `name`, or the one `made` of single arguments.

    Raises TypeError if both were given, since one of them would have no effect.
    """
    if whole is None:
        return made
    if made != default:
        raise TypeError(f"{name} is given as a whole and in single arguments: set all of it in {name}")
    return whole
