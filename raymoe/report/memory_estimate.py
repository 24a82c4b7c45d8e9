"""Estimates an actor's peak memory from the plan.

Each term stands for data that the code holds, and `scripts/measure_prompt_memory.py` compares their sum with the memory
of merges (docs/memory.md). The memory of a process before any work was measured on Linux with Python 3.11, Ray 2.60,
torch 2.13 and transformers 5.23; for a CUDA build of torch, with torch 2.11+cu130 and transformers 5.17. Other versions
differ by tens of MB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from raymoe.architectures import DenseSpec, read_spec
from raymoe.gate_modes import MODES
from raymoe.gate_modes.layer_values import FOLDS
from raymoe.gate_modes.least_squares_memory import GPU_LIBRARY_BYTES
from raymoe.planning.plan import (
    Columns,
    Combine,
    MergePlan,
    MomentPlan,
    Part,
    PartSource,
    PromptPlan,
    Transform,
    Transposed,
    WeightRef,
)
from raymoe.planning.totals import largest_layer
from raymoe.routers.attention_inputs import MAX_TOKENS
from raymoe.routers.fit_memory import max_layers_at_once
from raymoe.routers.prompt_lengths import count_distinct_tokens, prompt_lengths
from raymoe.routers.prompt_passes import Reading, plan_readings
from raymoe.routers.regmean_memory import inputs_bytes, max_merges_at_once, merging_bytes
from raymoe.routers.tokenize import batches, chunk_size, read_scan, round_up
from raymoe.sources.hub import HubOptions
from raymoe.storage.transform import THREADS
from raymoe.tensor_names import EMBEDDING, LAYER_EMBEDDINGS, layer_of

# Resident bytes of an actor that only copies, of one that has read embeddings, and of one that has imported torch and
# parts of transformers, and has tokenized its prompts.
_COPYING_ACTOR_BYTES = 140_000_000
_EMBEDDING_ACTOR_BYTES = 240_000_000
_COMPUTING_ACTOR_BYTES = 520_000_000
# The last one with a CUDA build of torch, which loads its libraries also without a GPU; and the same on a GPU. Then the
# memory of cuBLAS there. Measured on H200.
_CUDA_ACTOR_BYTES, _GPU_ACTOR_BYTES, _GPU_WORK_BYTES = 915_000_000, 1_530_000_000, 22_000_000
_BLOCK_BYTES = 7 << 24  # per thread that computes blocks of noise and LoRA, or combined ones
_UPLOAD_BYTES = (
    340_000_000  # parts of uploads, measured (docs/object-storage.md); at most three times the bytes to send
)
_SHARDS_AT_ONCE = 2  # of one actor; more where a machine has many more CPUs than actors
_TOKEN_BYTES = 64  # a token's id as a Python object, in a batch, and its masks
_MIN_COUNTED_BYTES = 32 << 20  # above this estimate of states, the tokenizer counts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One pass over prompts, counted in tokens with padding.

    tokens         all tokens of the pass
    batch_tokens   the largest batch, which goes through a layer at once
    scanned        the same if layers pad each sequence to a chunk
    longest        the longest prompt
    """

    tokens: int
    batch_tokens: int
    longest: int
    members: tuple[Reading, ...]
    scanned: int = 0


def actor_memory(plan: MergePlan, hub: HubOptions | None = None, *, sent: int = 0) -> dict[str, int]:
    """The peak memory of one actor in bytes: `cpu` if it computes on the CPU; `gpu` of a GPU's memory, and `beside_gpu`
    of the host's memory then. It assumes that the actor reads all prompts of a model.

    Args:
        plan: The plan of a merge.
        hub: Where the Hub's cache is.
        sent: Bytes of the output that actors send to S3.

    Returns:
        Bytes by `cpu`, `gpu` and `beside_gpu`; the last two are 0 if no model is run.
    """
    writing = _writing_bytes(plan, sent)
    if not plan.runs_model:
        if not plan.gates.needs_prompts:
            return {"cpu": _COPYING_ACTOR_BYTES + writing, "gpu": 0, "beside_gpu": 0}
        return {"cpu": _EMBEDDING_ACTOR_BYTES + writing + _embedding_bytes(plan, hub), "gpu": 0, "beside_gpu": 0}
    each = []
    if plan.moments is not None:
        passes, tokens = _passes(plan.moments, hub)
        each += [_moment_pass_bytes(plan.moments, one, tokens) for one in passes]
    if plan.gates.runs_model:
        passes, tokens = _passes(plan.gates, hub)
        each += [_pass_bytes(plan, one, tokens) for one in passes]
    largest = {key: max(found[key] for found in each) for key in ("cpu", "gpu", "beside_gpu")}
    computing = _CUDA_ACTOR_BYTES if _is_cuda_build() else _COMPUTING_ACTOR_BYTES
    return {
        "cpu": computing + writing + largest["cpu"],
        "gpu": _GPU_WORK_BYTES + largest["gpu"],
        "beside_gpu": _GPU_ACTOR_BYTES + writing + largest["beside_gpu"],
    }


def _pass_bytes(plan: MergePlan, one: _Pass, tokens: int) -> dict[str, int]:
    """The memory of a pass, without the actor's libraries; `tokens` are those of all passes together."""
    gates, mode = plan.gates, MODES[plan.gates.mode]
    fitting = mode.fitting_bytes(gates.hidden, tokens)
    return _reading_bytes(
        gates,
        one,
        run=mode.layers_run(gates.layers),
        layer=plan.totals.peak_gate_bytes,
        kept=_activation_bytes(plan, tokens),
        computing=fitting,
        computed_at_once=max_layers_at_once(gates),
        gpu_libraries=mode.gpu_library_bytes,
    )


def _moment_pass_bytes(moments: MomentPlan, one: _Pass, tokens: int) -> dict[str, int]:
    """The memory of a pass for the backbone, without the actor's libraries; `tokens` are those of all passes
    together. Inputs and merged matrices are in Ray's object store, as activations are."""
    kept = sum(map(inputs_bytes, moments.matrices)) * min(tokens, MAX_TOKENS) // MAX_TOKENS
    return _reading_bytes(
        moments,
        one,
        run=moments.layers,
        layer=largest_layer(moments, lambda entry: entry.nbytes),
        kept=kept + moments.nbytes,
        computing=max(map(merging_bytes, moments.matrices)),
        computed_at_once=max_merges_at_once(moments),
        gpu_libraries=GPU_LIBRARY_BYTES,
    )


def _reading_bytes(
    plan: PromptPlan,
    one: _Pass,
    *,
    run: int,
    layer: int,
    kept: int,
    computing: int,
    computed_at_once: int,
    gpu_libraries: int,
) -> dict[str, int]:
    """The memory of a pass that runs `run` layers of up to `layer` bytes and keeps `kept` bytes of activations. What is
    computed of them takes `computing` bytes per layer."""
    hidden, elements = plan.hidden, largest_layer(plan, lambda entry: math.prod(entry.shape))
    # The dtype of computation follows from the embedding, whatever the layers' own dtypes are.
    dtype = one.members[0].weights[EMBEDDING].entry.dtype
    stored = {"BF16": 2, "F16": 2}.get(dtype, 4)
    here = 2 if dtype == "BF16" and _multiplies_bfloat16() else 4
    common = _TOKEN_BYTES * one.tokens + kept
    vocab = one.members[0].weights[EMBEDDING].entry.shape[0]
    held = one.tokens * (hidden + _kept_keys(one)) + min(one.tokens, vocab) * _layer_input_numbers(one)
    reading = {
        width: held * width + _work_bytes(hidden, one, width) + _adapter_bytes(one, width) for width in {here, stored}
    }
    return {
        "cpu": common + max(min(2, run) * elements * here + reading[here], computing * computed_at_once),
        "gpu": max(min(3, run) * max(layer, elements * stored) + reading[stored], computing),
        "beside_gpu": common + min(2, run) * layer + gpu_libraries,
    }


def _writing_bytes(plan: MergePlan, sent: int) -> int:
    """The memory of writing shards: blocks that are computed ahead, and parts of uploads."""
    parts = [part for shard in plan.shards for part in shard.parts]
    computed = any(_is_slow(matrix.what) for part in parts for matrix in _matrices(part))
    ahead = THREADS * _BLOCK_BYTES if computed else 0
    transposed = max((part.nbytes for part in parts if isinstance(part.what, Transposed)), default=0)
    return ahead + _SHARDS_AT_ONCE * transposed + min(_UPLOAD_BYTES, 3 * sent)


def _matrices(part: Part) -> tuple[Part, ...]:
    return part.what.matrices if isinstance(part.what, (Columns, Transposed)) else (part,)


def _is_slow(what: PartSource) -> bool:
    if isinstance(what, Transform):
        return what.lora is not None or what.noise_scale is not None or what.reinit is not None
    return isinstance(what, Combine)


def _embedding_bytes(plan: MergePlan, hub: HubOptions | None) -> int:
    """The embedding rows of one expert's distinct tokens: as they are stored, and in float32."""
    lengths = prompt_lengths(plan.gates, exact=False)
    tokens = max(sum(positive) + sum(negative) for positive, negative in lengths.values())
    different, row = min(tokens, plan.gates.vocab), plan.gates.hidden * 6
    if different * row > _MIN_COUNTED_BYTES and (counted := count_distinct_tokens(plan.gates, hub=hub)) is not None:
        different = counted
    return different * row + _TOKEN_BYTES * tokens


def _passes(plan: PromptPlan, hub: HubOptions | None) -> tuple[list[_Pass], int]:
    """The passes of one actor, and the tokens of all prompts together."""
    members = plan.prompted
    lengths = prompt_lengths(plan, exact=False)
    total = sum(sum(map(sum, of_member)) for of_member in lengths.values())
    if total * plan.hidden * 4 > _MIN_COUNTED_BYTES:
        lengths = prompt_lengths(plan, hub=hub)
        total = sum(sum(map(sum, of_member)) for of_member in lengths.values())
    chunks = {member.owner: chunk_size(member.config) for member in members}
    sizes = {owner: _batch_sizes(*lengths[owner], chunk=chunk) for owner, chunk in chunks.items()}
    return [
        _Pass(
            tokens=sum(_part_tokens([size for size, _ in sizes[part.owner]], part.parts) for part in taken),
            batch_tokens=max(size for part in taken for size, _ in sizes[part.owner]),
            longest=max(max(map(max, filter(None, lengths[part.owner]))) for part in taken),
            members=taken,
            scanned=max(scanned for part in taken for _, scanned in sizes[part.owner]),
        )
        for taken in plan_readings(members, 1, plan.hidden)
    ], total


def _part_tokens(sizes: list[int], parts: int) -> int:
    """The tokens of the largest part. A batch is never split, even if it is larger than a part."""
    return max(sum(sizes) // parts, *sizes)


def _batch_sizes(*lengths: list[int], chunk: int) -> list[tuple[int, int]]:
    """Tokens of an expert's batches, with padding; and with padding to a multiple of `chunk`."""
    groups = [group for some in lengths for group in batches([range(length) for length in some], chunk=chunk)]
    longest = [max(map(len, group)) for group in groups]
    return [(len(g) * most, len(g) * round_up(most, chunk)) for g, most in zip(groups, longest, strict=True)]


def _work_bytes(hidden: int, one: _Pass, width: int) -> int:
    """Activations of one batch in one layer: three of the FFN's width, six of the states' width. Attention holds no
    scores, but it holds a mask if a sliding window is shorter than a prompt. Linear attention computes in float32."""
    config = one.members[0].config
    wide = max(int(config.get(key) or 0) for key in ("intermediate_size", "ffn_hidden_size"))
    window = config.get("sliding_window") or one.longest
    mask = 5 * one.longest**2 if one.longest > window else 0
    scan = read_scan(config)
    scanning = 4 * one.scanned * scan.numbers if scan else 0
    return one.batch_tokens * width * (3 * wide + 6 * hidden) + mask + scanning


def _kept_keys(one: _Pass) -> int:
    """How many numbers per token layers keep for later ones."""
    spec = read_spec(one.members[0].config, "")
    return spec.kept_keys if isinstance(spec, DenseSpec) else 0


def _layer_input_numbers(one: _Pass) -> int:
    """How many numbers the layers are given for each distinct token besides hidden states."""
    ref = one.members[0].weights.get(LAYER_EMBEDDINGS)
    return ref.entry.shape[1] if ref is not None else 0


def _activation_bytes(plan: MergePlan, tokens: int) -> int:
    """The captured activations. They are in Ray's object store, but the kernel counts them as this process's memory."""
    gates, mode = plan.gates, MODES[plan.gates.mode]
    members = len(gates.prompted)
    kept = min(tokens, members * mode.token_limit(len(gates.experts)))
    sums = (FOLDS + 1) * 8 * members if mode.sums_layer_inputs else 0
    return gates.layers * gates.hidden * (2 * kept + sums)


def _adapter_bytes(one: _Pass, width: int) -> int:
    """Factors in float64 of all adapters that are read together, for the current layer and the next one; and the
    weights that one adapter changes."""
    factors: dict[int | None, int] = {}
    changed = 0
    for adapter in _adapters(one.members):
        made: dict[int | None, int] = {}
        for name, weight in adapter.items():
            layer = layer_of(name)
            assert weight.lora is not None
            elements = sum(math.prod(entry.shape) for entry in weight.lora.entries.values())
            factors[layer] = factors.get(layer, 0) + 8 * elements
            made[layer] = made.get(layer, 0) + width * math.prod(weight.entry.shape)
        changed = max([changed, *made.values()])
    return 2 * max(factors.values(), default=0) + changed


def _adapters(members: tuple[Reading, ...]) -> list[Mapping[str, WeightRef]]:
    """The distinct adapters on the weights that read these prompts."""
    found: list[Mapping[str, WeightRef]] = []
    for member in members:
        adapter = {name: weight for name, weight in member.weights.items() if weight.lora is not None}
        if adapter and adapter not in found:
            found.append(adapter)
    return found


def _multiplies_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16, without torch, as `routers.layer_loader.compute_dtype` checks
    with it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_tile)\b", flags) is not None


def _is_cuda_build() -> bool:
    """Whether the installed torch is built for CUDA, found without an import. The version of PyPI's package does not
    show it."""
    try:
        path = distribution("torch").locate_file("torch/version.py")
        return re.search(r"^cuda\b[^=\n]*= *['\"]", Path(str(path)).read_text(), re.MULTILINE) is not None
    except (PackageNotFoundError, OSError):
        return False
