"""What a plan says that an actor will hold: it grows with what grows, and no further than passes are held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.gate_modes import MODES
from raymoe.planning.owner import Owner
from raymoe.planning.plan import MergePlan
from raymoe.planning.totals import largest_layer
from raymoe.report import memory_estimate
from raymoe.report.memory_estimate import actor_memory
from raymoe.routers import fit_memory, prompt_passes
from raymoe.routers import prompt_lengths as prompt_lengths_module
from raymoe.routers.fit_memory import max_layers_at_once
from raymoe.routers.prompt_lengths import count_distinct_tokens, prompt_lengths
from raymoe.sources.facts import SourceFile
from raymoe.sources.hub import HubOptions
from tests.pico import HIDDEN, merge_config, save_lora


@pytest.fixture
def planned(zoo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., MergePlan]:
    monkeypatch.setattr(memory_estimate, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(memory_estimate, "_is_cuda_build", lambda: False)

    def plan(mode: str, prompts: int, *, words: int = 50) -> MergePlan:
        content: dict[str, Any] = merge_config(
            zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode=mode, prompt_model="base"
        )
        for number, expert in enumerate(content["experts"]):
            expert["positive_prompts"] = [" ".join([f"{number}{n % 7}"] * words) for n in range(prompts)]
        return raymoe.plan(content)

    return plan


def test_lengths_are_those_of_the_tokenizer(planned: Callable[..., MergePlan]) -> None:
    from raymoe.routers.tokenize import load_tokenizer

    gates = planned("hidden", 3).gates
    lengths = prompt_lengths(gates)
    tokenizer = load_tokenizer(Path(gates.tokenizer_files[0].file.location).parent, trust_remote_code=False)
    for member in gates.experts:
        expected = [len(tokenizer(text)["input_ids"]) for text in member.positive]
        assert lengths[member.owner] == (expected, [])
    estimated = prompt_lengths(gates, exact=False)
    assert estimated[Owner.expert(0)][0] == [len(text) // 2 + 8 for text in gates.experts[0].positive]


def test_lengths_ignore_stored_padding_and_truncation(planned: Callable[..., MergePlan], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    plan = planned("hidden", 2)
    (side,) = [side for side in plan.gates.tokenizer_files if side.name == "tokenizer.json"]
    tokenizer = Tokenizer.from_file(side.file.location)
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    stored = replace(side, file=SourceFile(location=str(path), size=path.stat().st_size))
    experts = tuple(replace(expert, positive=("a", "a " * 200) * 150) for expert in plan.gates.experts)
    gates = replace(plan.gates, experts=experts)
    expected = prompt_lengths(gates)
    assert prompt_lengths(replace(gates, tokenizer_files=(stored,))) == expected
    lengths, _ = expected[Owner.expert(0)]
    assert len(lengths) == 300 and lengths[0] < 64 < lengths[1] and lengths == lengths[:2] * 150


def test_lengths_come_from_the_cache_that_planning_filled(
    planned: Callable[..., MergePlan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gates = planned("hidden", 2).gates
    (side,) = [side for side in gates.tokenizer_files if side.name == "tokenizer.json"]
    asked: list[HubOptions] = []

    def fetch(file: SourceFile, options: HubOptions) -> Path:
        asked.append(options)
        return Path(side.file.location)

    monkeypatch.setattr(prompt_lengths_module, "fetch_file", fetch)
    prompt_lengths(gates, hub=HubOptions(cache_dir=str(tmp_path), endpoint="http://hub"))
    assert asked == [HubOptions(cache_dir=str(tmp_path), endpoint="http://hub", offline=True)]  # nothing is downloaded


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_states_of_all_prompts_of_a_pass(
    planned: Callable[..., MergePlan], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    few, many = planned(mode, 100), planned(mode, 400)
    tokens = sum(sum(map(sum, of_member)) for of_member in prompt_lengths(many.gates).values())
    monkeypatch.setattr(memory_estimate, "_MIN_COUNTED_BYTES", 0)
    small, large = actor_memory(few)["cpu"], actor_memory(many)["cpu"]
    assert large - small >= 0.75 * tokens * HIDDEN * 4
    monkeypatch.setattr(prompt_passes, "STATE_BYTES", prompt_passes._state_bytes(many.gates.experts[0], HIDDEN) // 4)
    assert (
        memory_estimate._COMPUTING_ACTOR_BYTES < actor_memory(many)["cpu"] < small
    )  # a pass of a hundred prompts, not of 200


def test_the_longest_prompt_is_the_least_that_goes_through_a_layer(planned: Callable[..., MergePlan]) -> None:
    short, long = planned("hidden", 2, words=5), planned("hidden", 2, words=5000)
    tokens = max(prompt_lengths(long.gates, exact=False)[Owner.expert(0)][0])
    assert tokens > 2048
    assert actor_memory(long)["cpu"] - actor_memory(short)["cpu"] > tokens * HIDDEN * 4 * 6


@pytest.mark.parametrize(("hidden", "layers"), [(576, 4), (2048, 4), (4096, 2), (8192, 1), (16384, 1)])
def test_layers_that_are_fitted_at_once(planned: Callable[..., MergePlan], hidden: int, layers: int) -> None:
    gates = replace(planned("ridge", 2).gates, hidden=hidden, layers=8)
    assert max_layers_at_once(gates) == layers
    assert layers == 1 or layers * MODES["ridge"].fitting_bytes(hidden) <= 2 << 30
    assert MODES["hidden"].fitting_bytes(hidden) == 0
    assert max_layers_at_once(replace(gates, mode="hidden")) == 4  # they only sum, which takes no memory to speak of
    assert max_layers_at_once(replace(gates, layers=1)) == 1


def test_fitting_takes_what_was_measured() -> None:
    """Peaks of `fit_rows` in a process of its own, in MB, with what it was given."""
    measured = {(1024, 4016): 122, (1024, 16384): 268, (2048, 4016): 274, (2048, 16384): 462, (4096, 16384): 1028}
    for (hidden, tokens), megabytes in measured.items():
        planned_bytes = MODES["ridge"].fitting_bytes(hidden, tokens)
        assert planned_bytes == pytest.approx(megabytes * 1e6, rel=0.2), (hidden, tokens)


def test_all_layers_that_are_fitted_at_once_count(
    planned: Callable[..., MergePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("ridge", 2)
    plan = replace(plan, gates=replace(plan.gates, hidden=2048, layers=4))
    tokens = sum(sum(map(sum, of_member)) for of_member in prompt_lengths(plan.gates, exact=False).values())
    four = actor_memory(plan)["cpu"]
    monkeypatch.setattr(fit_memory, "_BUDGET_BYTES", 0)
    assert four - actor_memory(plan)["cpu"] == 3 * MODES["ridge"].fitting_bytes(2048, tokens)


def test_embeddings_are_counted_by_tokens_that_differ(
    planned: Callable[..., MergePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = planned("cheap_embed", 400)
    estimated = actor_memory(few)["cpu"]
    monkeypatch.setattr(memory_estimate, "_MIN_COUNTED_BYTES", 0)
    counted = count_distinct_tokens(few.gates)
    assert counted is not None and 1 < counted < few.gates.vocab
    assert estimated - actor_memory(few)["cpu"] == (few.gates.vocab - counted) * few.gates.hidden * 6
    assert count_distinct_tokens(replace(few.gates, tokenizer_files=())) is None


def test_modes_that_read_no_layers(planned: Callable[..., MergePlan]) -> None:
    random, embed = actor_memory(planned("random", 2)), actor_memory(planned("cheap_embed", 2))
    assert random == {"cpu": 140_000_000, "gpu": 0, "beside_gpu": 0}
    assert embed["cpu"] > 240_000_000 and embed["gpu"] == 0


def test_an_expert_with_more_prompts_hides_no_longer_ones(zoo: Callable[..., Path]) -> None:
    """Each expert reads its own prompts here: neither pass has both the most tokens and the longest prompt."""

    def bytes_with(second: list[str]) -> dict[str, int]:
        content = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], prompt_model="expert")
        content["experts"][0]["positive_prompts"] = ["ab " * 5000]
        content["experts"][1]["positive_prompts"] = second
        return actor_memory(raymoe.plan(content))

    few, many = bytes_with(["ab"]), bytes_with([f"{number} ab" * 40 for number in range(400)])
    assert all(many[key] >= few[key] for key in few)


@pytest.mark.parametrize(("cuda", "expected"), [("'13.0'", True), ('"12.4"', True), ("None", False)])
@pytest.mark.parametrize("form", ["cuda: Optional[str] = {}", "cuda = {}"])
def test_the_build_of_torch_is_read_from_its_files(
    cuda: str, form: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{form.format(cuda)}\nhip: Optional[str] = '6.2'\n")

    class Torch:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name.removeprefix("torch/")

    monkeypatch.setattr(memory_estimate, "distribution", lambda name: Torch())
    assert memory_estimate._is_cuda_build() is expected
    (tmp_path / "version.py").unlink()
    assert not memory_estimate._is_cuda_build()


def test_the_build_of_torch_counts(planned: Callable[..., MergePlan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, embed = planned("hidden", 2), planned("cheap_embed", 2)
    for_cpu, embedding = actor_memory(plan), actor_memory(embed)
    monkeypatch.setattr(memory_estimate, "_is_cuda_build", lambda: True)
    assert actor_memory(plan)["cpu"] - for_cpu["cpu"] > 300_000_000 and actor_memory(embed) == embedding


def test_layers_that_pad_sequences(zoo: Callable[..., Path]) -> None:
    """Short prompts count as a chunk each: in batches, and for what a layer holds of them."""
    from raymoe.routers.tokenize import batches, chunk_size

    mamba = {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 64, "mamba_d_head": 2, "mamba_expand": 2}
    sizes = {"granitemoehybrid": (mamba, 256, 64 * 256), "qwen3_5_text": ({}, 64, 4 * 64)}
    for family, (options, chunk, least) in sizes.items():
        base, expert = zoo(family, **options), zoo(family, seed=1, **options)
        content = merge_config(base, [base, expert])
        for word, entry in zip("ab", content["experts"], strict=True):
            entry["positive_prompts"] = [f"{word}{number}" for number in range(40)]
        plan = raymoe.plan(content)
        assert chunk_size(plan.gates.experts[0].config) == chunk
        (one,), _ = memory_estimate._passes(plan.gates, None)
        assert one.batch_tokens < one.scanned <= 2048
        assert memory_estimate._work_bytes(plan.gates.hidden, one, 4) > one.scanned * 4 * least
        prompts = [[0] * 3 for _ in range(40)]
        assert max(map(len, batches(prompts, chunk=chunk))) == min(40, 2048 // chunk)
    plain = raymoe.plan(
        merge_config(zoo("granitemoehybrid"), [zoo("granitemoehybrid", seed=1)] * 2), allow_all_same=True
    )
    assert chunk_size(plain.gates.experts[0].config) == 1  # attention in all layers


def test_weights_that_are_computed_and_uploads_count(zoo: Callable[..., Path], tmp_path: Path) -> None:
    base = zoo("llama")
    lora = save_lora(tmp_path / "lora", base, ["up_proj"])
    for mode in ("random", "hidden"):
        copied = raymoe.plan(merge_config(base, [base, zoo("llama", seed=1)], mode=mode))
        computed = raymoe.plan(merge_config(base, [base, f"{base}+{lora}"], mode=mode))
        noisy = raymoe.plan(
            merge_config(base, [base, base], mode=mode, expert_options={"noise_scale": 0.1}), allow_all_same=True
        )
        plain = actor_memory(copied)["cpu"]
        assert actor_memory(computed)["cpu"] - plain >= 7 << 24 and actor_memory(noisy)["cpu"] - plain >= 7 << 24
        assert actor_memory(copied, sent=1000)["cpu"] - plain == 3000
        assert actor_memory(copied, sent=10**10)["cpu"] - plain == 340_000_000


def test_adapters_that_are_read_together(zoo: Callable[..., Path], tmp_path: Path) -> None:
    """Each of them adds its factors, in float64, of two layers."""
    from raymoe.planning.plan import GatePrompts, WeightRef
    from raymoe.routers.prompt_passes import Reading, plan_readings
    from raymoe.sources.facts import LoraPair, TensorEntry

    def entry(name: str, *shape: int) -> TensorEntry:
        file = SourceFile(location=f"/{name}", size=10**9)
        return TensorEntry(name=name, dtype="BF16", shape=shape, file=file, start=0, end=2 * shape[0] * shape[1])

    def member(number: int, rank: int, wide: int = 1) -> GatePrompts:
        pair = LoraPair(a=entry(f"a{number}", rank, 64), b=entry(f"b{number}", 128, rank), scaling=1.0)
        weights = {
            f"model.layers.{layer}.mlp.up_proj.weight": WeightRef(entry=entry("up", 128, 64), lora=pair)
            for layer in range(3)
        }
        weights["model.layers.0.mlp.gate_proj.weight"] = WeightRef(
            entry=entry("gate", 128, 64), lora=pair if wide > 1 else None
        )
        return GatePrompts(owner=Owner.expert(number), positive=("x",), negative=(), config={}, weights=weights)

    def bytes_of(*members: GatePrompts) -> int:
        (taken,) = plan_readings(members, 1, 64)
        assert all(isinstance(part, Reading) for part in taken)
        largest = memory_estimate._Pass(tokens=1, batch_tokens=1, longest=1, members=taken)
        return memory_estimate._adapter_bytes(largest, 4)

    changed = 4 * 128 * 64
    one = 2 * 8 * 4 * (64 + 128)
    assert bytes_of(member(0, 4)) == one + changed
    assert bytes_of(member(0, 4), member(1, 4), member(2, 4)) == 3 * one + changed
    # The second adapter changes more.
    assert bytes_of(member(0, 4), member(1, 4, wide=2)) == 3 * one + 2 * changed


def test_layers_are_computed_with_as_the_embedding_is_stored(planned: Callable[..., MergePlan]) -> None:
    def with_layers(plan: MergePlan, dtype: str) -> MergePlan:
        width = {"F32": 4, "BF16": 2}[dtype]
        weights = {
            name: replace(
                ref, entry=replace(ref.entry, dtype=dtype, end=ref.entry.start + width * prod(ref.entry.shape))
            )
            if name.startswith("model.layers.")
            else replace(ref, entry=replace(ref.entry, dtype="F32"))
            for name, ref in plan.gates.experts[0].weights.items()
        }
        gates = replace(plan.gates, experts=tuple(replace(e, weights=weights) for e in plan.gates.experts))
        layer = largest_layer(gates, lambda entry: entry.nbytes)
        return replace(plan, gates=gates, totals=replace(plan.totals, peak_gate_bytes=layer))

    plan = planned("hidden", 2)
    halves, wholes = actor_memory(with_layers(plan, "BF16")), actor_memory(with_layers(plan, "F32"))
    assert (halves["cpu"], halves["gpu"]) == (wholes["cpu"], wholes["gpu"])
    assert halves["beside_gpu"] < wholes["beside_gpu"]  # pinned as they are stored


def test_states_of_shared_experts_count(planned: Callable[..., MergePlan]) -> None:
    plan = planned("hidden", 2)
    shared = replace(plan, gates=replace(plan.gates, shared=plan.gates.experts[:1]))
    more = memory_estimate._activation_bytes(shared, 10**9) - memory_estimate._activation_bytes(plan, 10**9)
    assert more * 2 == memory_estimate._activation_bytes(plan, 10**9)


def test_embeddings_are_summed_as_one_sum(zoo: Callable[..., Path]) -> None:
    """Row by row, and to the bit what numpy makes of them all at once."""
    import numpy as np

    from raymoe.gate_modes.directions import normalize
    from raymoe.routers.token_embeddings import embedding_rows
    from raymoe.storage.source_reader import SourceReader
    from raymoe.tensor_names import EMBEDDING

    gates = raymoe.plan(merge_config(zoo("llama"), [zoo("llama", seed=1)] * 2, mode="cheap_embed"), allow_all_same=True)
    ref = gates.gates.experts[0].weights[EMBEDDING]
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(0, 400, 300).tolist() for _ in range(5)]
    with SourceReader(HubOptions()) as reader:
        rows = embedding_rows(reader, ref, list(range(400)))
        total = np.sum([rows[token] for prompt in prompts for token in prompt], axis=0, dtype=np.float64)
        row = MODES["cheap_embed"].embedding_row(prompts, [], lambda ids: embedding_rows(reader, ref, ids))
    np.testing.assert_array_equal(row, normalize(normalize(total)))
