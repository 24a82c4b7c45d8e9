"""Plans of a thousand experts: work and memory grow with the number of tensors, and no faster."""

from __future__ import annotations

import cProfile
import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from raymoe.config import MergeConfig, make_config
from raymoe.config.model_refs import ModelRef
from raymoe.planning import MergeOptions, MergePlan, build_plan
from raymoe.planning.multipart import upload_parts
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Copy, Shard
from raymoe.routers.prompt_passes import plan_readings
from raymoe.runtime.placement import FileRequirements
from raymoe.runtime.shard_jobs import ShardQueue, SharedReads
from raymoe.sources.facts import CheckpointIndex, ModelFacts, SideFile, SourceFile, TensorEntry
from raymoe.storage.outputs.protocol import ShardJob
from tests.planning.test_multipart import SMOLLM2, tensor_shapes
from tests.runtime.fake_cluster import FakeCluster

LAYERS = 66  # of three matrices: 198 tensors per expert
PROMPTS = [f"text {number}" for number in range(8)]


def facts_of(ref: ModelRef, layers: int) -> ModelFacts:
    """A small model as its header would show it."""
    config = SMOLLM2 | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "vocab_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    file = SourceFile(location=f"s3://models/{ref.model.path[-8:]}/model.safetensors", size=1 << 40)
    tensors, end = {}, 0
    for name, shape in tensor_shapes(config).items():
        name, start, nbytes = sys.intern(name), end, 2
        for size in shape:
            nbytes *= size
        end += nbytes
        tensors[name] = TensorEntry(name=name, dtype="BF16", shape=shape, file=file, start=start, end=end)
    side = SideFile(name="tokenizer.json", file=SourceFile(location="/base/tokenizer.json", size=10))
    index = CheckpointIndex(files=(file,), tensors=tensors)
    return ModelFacts(label=ref.model.path, revision=None, config=config, index=index, side_files=(side,))


def inputs(experts: int, layers: int, mode: str = "ridge") -> tuple[MergeConfig, dict[ModelRef, ModelFacts]]:
    listed = [
        {"source_model": f"/models/{number:08}", "positive_prompts": [f"expert {number}", *PROMPTS]}
        for number in range(experts)
    ]
    config = make_config({"base_model": "/models/99999999", "gate_mode": mode, "dtype": "bfloat16", "experts": listed})
    refs = [config.base_model, *(expert.source_model for expert in config.experts)]
    return config, {ref: facts_of(ref, layers) for ref in refs}


def calls(function: Callable[[], Any]) -> int:
    """How many functions, in Python and in C, a call of this one takes. cProfile counts them in C."""
    profile = cProfile.Profile()
    gc.disable()  # finalizers of other tests are not counted
    profile.enable()
    try:
        function()
    finally:
        profile.disable()
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


def assert_linear(work: Callable[[int], Callable[[], Any]], size: int) -> None:
    """Twice as much takes about twice the calls; what is quadratic takes nearly four times as many."""
    work(2)()  # what is imported or kept for the process is not counted
    once, twice = calls(work(size)), calls(work(2 * size))
    assert twice < 2.3 * once, f"{once:,} calls for {size}, {twice:,} for {2 * size}"


def planning(experts: int, layers: int = 2, mode: str = "ridge") -> MergePlan:
    config, facts = inputs(experts, layers, mode)
    return build_plan(config, facts, MergeOptions())


@pytest.mark.parametrize(
    "mode", ["ridge", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("hidden", "cheap_embed", "random"))]
)
def test_planning_is_linear_in_experts(mode: str) -> None:
    def work(experts: int) -> Callable[[], Any]:
        config, facts = inputs(experts, 2, mode)
        return lambda: build_plan(config, facts, MergeOptions())

    assert_linear(work, 64)


def test_planning_is_linear_in_tensors() -> None:
    """Of one expert: as neighbours in one file they are one run, in one shard."""

    def work(layers: int) -> Callable[[], Any]:
        config, facts = inputs(2, layers, "random")
        return lambda: build_plan(config, facts, MergeOptions(max_shard_bytes=1 << 40))

    assert_linear(work, 64)


@pytest.mark.parametrize(("experts", "layers"), [(64, 4), pytest.param(1024, LAYERS, marks=pytest.mark.soak)])
def test_what_tensors_have_in_common_is_shared(experts: int, layers: int) -> None:
    """A thousand experts have 200,000 tensors in one plan."""
    plan = planning(experts, layers)
    parts = [part for shard in plan.shards for part in shard.parts]
    assert len(parts) > 3 * layers * experts
    copies = [part for part in parts if isinstance(part.what, Copy)]
    assert len({id(part.what.source.file) for part in copies if isinstance(part.what, Copy)}) == experts + 1
    assert all(part.shape is part.what.source.shape for part in copies if isinstance(part.what, Copy))
    backbone = "model.layers.0.self_attn.q_proj.weight"
    assert len({id(member.weights[backbone]) for member in plan.gates.members}) == 1, "the base's, for all experts"


@pytest.mark.parametrize(("experts", "layers"), [(16, 20), pytest.param(32, LAYERS, marks=pytest.mark.slow)])
def test_memory_per_tensor(experts: int, layers: int) -> None:
    """Bytes that a plan keeps per tensor, and that planning needs meanwhile, beside the facts that it is made of."""
    config, facts = inputs(experts, layers)
    gc.collect()
    tracemalloc.start()
    try:
        plan = build_plan(config, facts, MergeOptions())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tensors = sum(len(shard.parts) for shard in plan.shards)
    print(f"{held / tensors:.0f} bytes per tensor, {peak / tensors:.0f} at most")
    assert held / tensors < 1_000 and peak / tensors < 1_500


# --- what a merge makes of the plan


def test_readings_and_requirements_are_linear_in_experts() -> None:
    for mode in ("ridge", "hidden"):
        plans = {experts: planning(experts, mode=mode) for experts in (2, 64, 128)}
        assert_linear(lambda n, plans=plans: lambda: plan_readings(plans[n].gates.prompted, 8, 16), 64)  # type: ignore[misc]
        assert_linear(lambda n, plans=plans: lambda: FileRequirements(plans[n]), 64)  # type: ignore[misc]
        assert_linear(lambda n, plans=plans: lambda: SharedReads(plans[n], lambda file: True), 64)  # type: ignore[misc]


def test_giving_out_shards_is_linear_in_shards() -> None:
    """No shard is looked at before it is opened, and few are open at once."""
    plans = {experts: planning(experts, mode="random") for experts in (2, 128, 256)}

    class Work:
        def jobs(self, shard: Shard) -> list[ShardJob]:
            return [ShardJob(shard=shard)]

        def complete(self, shard: Shard, results: object) -> str:
            return shard.file_name

    def work(experts: int) -> Callable[[], Any]:
        shards, cluster = list(plans[experts].worker_shards), FakeCluster()
        queue = ShardQueue(shards, Work(), cluster)  # type: ignore[arg-type]

        def give_out() -> None:
            while queue.has_work:
                queue.open_ahead([(Owner.expert(1),)], 8)
                while (job := queue.next_for((Owner.expert(1),), lambda job: True)) is not None:
                    job.complete("done")
                for ref in list(queue.calls):
                    queue.take(ref)
            assert len(queue.results) == len(shards)

        return give_out

    assert_linear(work, 128)


def test_cutting_is_linear_in_ranges() -> None:
    """Of shards whose ranges fit; where they do not, the search for the shortest takes a logarithm more."""
    from tests.planning.test_multipart import is_remote, separate_ranges

    assert_linear(lambda n: lambda: upload_parts(separate_ranges(n, seed=n), is_remote), 2_000)
