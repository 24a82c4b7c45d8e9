"""What every gate mode that is found keeps to. A new mode is tested by being there."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import raymoe
from raymoe.config import MergeConfig, PromptModel
from raymoe.gate_modes import ALIASES, DEFAULT_MODE, MODES, GateMode, better_mode
from raymoe.planning.owner import ALL_SHARED, Owner
from raymoe.planning.plan import GatePlan
from raymoe.report.memory_estimate import actor_memory
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.router_matrices import RouterRows
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
from raymoe.tensor_names import EMBEDDING
from tests.package_source import all_nodes, trees
from tests.pico import HIDDEN, LAYERS, REPOSITORY, merge_config, tensors_of

Zoo = Callable[..., Path]

EACH = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
THAT_SUM = pytest.mark.parametrize(
    "mode", [mode for mode in MODES.values() if mode.sums_layer_inputs], ids=lambda mode: mode.name
)


def gates_of(zoo: Zoo, mode: GateMode, experts: int = 3) -> GatePlan:
    """Experts with prompts, one of them also with negative ones, and a shared expert with the second one's prompts."""
    models = [zoo("llama", seed=seed) for seed in range(1, experts + 1)]
    config = merge_config(zoo("llama"), models, mode=mode.name, experts_per_token=1)
    if mode.needs_prompts:
        config["experts"][0]["negative_prompts"] = ["It rained", "Add two eggs"]
    gates = raymoe.plan(config).gates
    return replace(gates, shared=(replace(gates.experts[-1], owner=Owner.shared(0)),))


def routers_of(gates: GatePlan) -> tuple[RouterRows, RouterSummary | None]:
    with SourceReader(HubOptions()) as reader:
        return compute_routers_locally(gates, reader, device="cpu")


@EACH
def test_configs_name_it(mode: GateMode, zoo: Zoo) -> None:
    config = merge_config(zoo("llama"), [zoo("llama", seed=1)] * 2, mode=mode.name)
    for name in (mode.name, *mode.aliases):
        assert MergeConfig.model_validate({**config, "gate_mode": name}).gate_mode == mode.name
        assert ALIASES.get(name, name) == mode.name
    assert MODES[mode.name] is mode
    assert mode.default_prompt_model in get_args(PromptModel)


@EACH
def test_it_is_a_file_of_its_name(mode: GateMode) -> None:
    assert type(mode).__module__ == f"raymoe.gate_modes.modes.{mode.name}"
    assert type(mode).__doc__ and not type(mode).__doc__.startswith("How router rows are made")


@EACH
def test_the_docs_describe_it(mode: GateMode) -> None:
    for page in ("config", "routing"):
        assert f"`{mode.name}`" in (REPOSITORY / f"docs/{page}.md").read_text()


@EACH
def test_the_benchmark_of_routing_measures_it(mode: GateMode) -> None:
    assert f'"{mode.name}"' in (REPOSITORY / "scripts/bench_routing.py").read_text(encoding="utf-8")


@EACH
def test_what_it_needs_goes_together(mode: GateMode) -> None:
    assert mode.needs_prompts or not (mode.needs_forward_pass or mode.needs_text or mode.has_directions)
    assert mode.needs_forward_pass or not (mode.sums_layer_inputs or mode.max_tokens or mode.fitting_bytes(HIDDEN))
    assert (mode.max_tokens > 0) is mode.needs_forward_pass
    assert mode.token_limit(10**9) == 1
    assert mode.fitting_bytes(HIDDEN, 10) <= mode.fitting_bytes(HIDDEN, 100) <= mode.fitting_bytes(HIDDEN)
    assert mode.fitting_bytes(HIDDEN, 10**9) == mode.fitting_bytes(HIDDEN)
    better = better_mode(mode)
    assert better is not mode
    assert better is None or (better.measured_accuracy or (0, 0)) >= (mode.measured_accuracy or (0, 0))


@EACH
def test_it_loads_what_it_runs(mode: GateMode, zoo: Zoo) -> None:
    loaded = {name for name in tensors_of(zoo("llama")) if mode.needs_parameter(name, LAYERS, "mlp")}
    assert (EMBEDDING in loaded) is mode.needs_prompts
    layers = {int(name.split(".")[2]) for name in loaded - {EMBEDDING}}
    assert layers == (set(range(mode.layers_run(LAYERS))) if mode.needs_forward_pass else set())
    assert not any(name.startswith(f"model.layers.{LAYERS - 1}.mlp.") for name in loaded)
    assert not {"model.norm.weight", "lm_head.weight"} & loaded


@EACH
def test_it_makes_rows_for_all_experts_and_layers(mode: GateMode, zoo: Zoo) -> None:
    gates = gates_of(zoo, mode)
    rows, summary = routers_of(gates)
    assert list(rows) == [*map(Owner.expert, range(3)), ALL_SHARED]
    for owner, layers in rows.items():
        assert (layers.shape, layers.dtype) == ((LAYERS, HIDDEN), np.float32), owner
        assert np.isfinite(layers).all() and layers.any(axis=1).all()
        if mode.has_directions:
            np.testing.assert_allclose(np.linalg.norm(layers, axis=1), 1.0, atol=1e-6)
    assert (summary is not None) is mode.needs_forward_pass
    assert len({layers.tobytes() for layers in rows.values()}) >= 3  # a shared expert may have an expert's own row
    for owner, layers in routers_of(gates)[0].items():
        np.testing.assert_array_equal(layers, rows[owner])


@EACH
def test_rows_come_from_prompts_or_from_the_seed(mode: GateMode, zoo: Zoo) -> None:
    gates = gates_of(zoo, mode)
    rows, _ = routers_of(gates)
    other, _ = routers_of(replace(gates, seed=gates.seed + 1))
    first = Owner.expert(0)
    assert np.array_equal(rows[first], other[first]) is mode.needs_prompts
    if mode.needs_prompts:
        changed = replace(gates.experts[0], positive=("Another text", "of two prompts"))
        other, _ = routers_of(replace(gates, experts=(changed, *gates.experts[1:])))
        assert not np.array_equal(rows[first], other[first])


@EACH
def test_one_expert_has_a_router_too(mode: GateMode, zoo: Zoo) -> None:
    rows, summary = routers_of(replace(gates_of(zoo, mode, experts=1), shared=()))
    assert list(rows) == [Owner.expert(0)] and np.isfinite(rows[Owner.expert(0)]).all()
    assert summary is None  # nothing to tell apart


@EACH
def test_its_memory_is_foretold(mode: GateMode, zoo: Zoo) -> None:
    plan = raymoe.plan(merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode=mode.name))
    assert {key for key, count in actor_memory(plan).items() if count} == (
        {"cpu", "gpu", "beside_gpu"} if mode.needs_forward_pass else {"cpu"}
    )


@THAT_SUM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompts_vector_does_not_depend_on_its_batch(mode: GateMode, dtype: torch.dtype) -> None:
    lengths = torch.tensor([3, 5, 1])
    hidden = torch.randn((3, 5, HIDDEN), generator=torch.Generator().manual_seed(0)).to(dtype)
    together = mode.prompt_vectors(hidden, lengths)
    assert (together.shape, together.dtype) == ((3, HIDDEN), torch.float32)
    for number, length in enumerate(lengths.tolist()):
        alone = mode.prompt_vectors(hidden[number : number + 1, :length], lengths[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], alone)


def test_the_modes_are_told_in_this_order() -> None:
    """Messages list them so."""
    needs = [(mode.needs_forward_pass, mode.needs_prompts) for mode in MODES.values()]
    assert needs == sorted(needs, reverse=True)
    assert next(iter(MODES)) == DEFAULT_MODE
    assert not ALIASES.keys() & MODES.keys()


def test_no_other_package_knows_a_modes_name() -> None:
    """A mode is asked. `hidden` is the default, a dimension and a row of evaluations as well."""
    names = {*MODES, *ALIASES} - {DEFAULT_MODE}
    for path, tree in trees().items():
        if "gate_modes" not in Path(path).parts:
            found = {node.value for node in all_nodes(tree) if isinstance(node, ast.Constant)}
            assert not names & {value for value in found if isinstance(value, str)}, path
