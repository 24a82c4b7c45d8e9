"""What an actor will hold at most, told from the plan.

The terms are those of the code that holds them, and `scripts/measure_prompt_memory.py` compares their sum with what
merges take (docs/memory.md). What a process holds before it does anything was measured on Linux with Python 3.11,
Ray 2.60, torch 2.13 and transformers 5.23; other versions differ by tens of MB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raymoe.config import MODES
from raymoe.config.modes import EMBEDDING
from raymoe.gates.capture import FOLDS, token_limit
from raymoe.gates.fitting import fitting_bytes, most_layers_at_once
from raymoe.gates.prompt_lengths import prompt_lengths
from raymoe.gates.prompts import batches
from raymoe.gates.readings import Reading, readings
from raymoe.planning.types import GatePlan, MergePlan, WeightRef
from raymoe.sources.resolve import HubOptions

__all__ = ["actor_memory"]

# Resident bytes of an actor that only copies, of one that has read embeddings, and of one that has imported torch and
# what it needs of transformers, and has tokenized its prompts.
_COPYING_ACTOR_BYTES = 140_000_000
_EMBEDDING_ACTOR_BYTES = 240_000_000
_COMPUTING_ACTOR_BYTES = 505_000_000
# CUDA's libraries in an actor's memory, and what they hold on the GPU; measured on H100.
_GPU_ACTOR_BYTES, _GPU_WORK_BYTES = 2_000_000_000, 60_000_000
_TOKEN_BYTES = 64  # a token's id as a Python object, in a batch, and its masks
_WORTH_COUNTING_BYTES = 32 << 20  # states by estimate, from which on the tokenizer is asked
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """The largest of the passes in which prompts are read: `tokens` in all, of which `batch_tokens` at most go through
    a layer at once, the longest prompt having `longest`. Padding is counted."""

    tokens: int
    batch_tokens: int
    longest: int
    members: tuple[Reading, ...]


def actor_memory(plan: MergePlan, hub: HubOptions | None = None) -> dict[str, int]:
    """What one actor holds at most, in bytes: `cpu` where it computes there; `gpu` of a GPU's memory, and `beside_gpu`
    of the machine's then. Taken to read all the prompts that one model reads. `hub` says where the Hub's cache is."""
    gates, mode = plan.gates, MODES[plan.gates.mode]
    if not mode.needs_prompts:
        return {"cpu": _COPYING_ACTOR_BYTES, "gpu": 0, "beside_gpu": 0}
    if not mode.reads_layers:
        return {"cpu": _EMBEDDING_ACTOR_BYTES + _embedding_bytes(plan), "gpu": 0, "beside_gpu": 0}
    largest, tokens = _largest_pass(plan, hub)
    hidden, layer = gates.hidden, plan.totals.peak_gate_bytes
    dtype = largest.members[0].weights[EMBEDDING].entry.dtype
    elements = _layer_elements(gates)  # computed with as the embedding is stored, whatever their own dtypes are
    stored = {"BF16": 2, "F16": 2}.get(dtype, 4)
    here = 2 if dtype == "BF16" and _multiplies_bfloat16() else 4
    left = _left_bytes(plan, largest, tokens)
    fitting = fitting_bytes(gates)
    common = _TOKEN_BYTES * largest.tokens + left
    reading = {
        width: largest.tokens * hidden * width + _work_bytes(plan, largest, width) + _adapter_bytes(largest, width)
        for width in {here, stored}
    }
    return {
        "cpu": _COMPUTING_ACTOR_BYTES
        + common
        + max(2 * elements * here + reading[here], fitting * most_layers_at_once(gates)),
        "gpu": 3 * max(layer, elements * stored) + _GPU_WORK_BYTES + reading[stored],
        "beside_gpu": _GPU_ACTOR_BYTES + common + max(2 * layer, fitting),
    }


def _layer_elements(gates: GatePlan) -> int:
    """Numbers in the largest layer that prompts pass."""
    found = 0
    for member in (*gates.experts, *gates.shared):
        layers: dict[str, int] = {}
        for name, weight in member.weights.items():
            if match := _LAYER.match(name):
                layers[match[1]] = layers.get(match[1], 0) + math.prod(weight.entry.shape)
        found = max([found, *layers.values()])
    return found


def _embedding_bytes(plan: MergePlan) -> int:
    """The embedding rows of one member's tokens, each once: as they are stored, and in float32."""
    lengths = prompt_lengths(plan.gates, exact=False)
    tokens = max(sum(positive) + sum(negative) for positive, negative in lengths.values())
    return min(tokens, plan.gates.vocab) * plan.gates.hidden * 6 + _TOKEN_BYTES * tokens


def _largest_pass(plan: MergePlan, hub: HubOptions | None) -> tuple[_Pass, int]:
    """The largest pass of one actor, and the tokens of all prompts together."""
    gates = plan.gates
    members = [member for member in (*gates.experts, *gates.shared) if member.positive]
    lengths = prompt_lengths(gates, exact=False)
    total = sum(sum(map(sum, of_member)) for of_member in lengths.values())
    if total * gates.hidden * 4 > _WORTH_COUNTING_BYTES:
        lengths = prompt_lengths(gates, hub=hub)
        total = sum(sum(map(sum, of_member)) for of_member in lengths.values())
    sizes = {owner: _batch_sizes(*of_member) for owner, of_member in lengths.items()}
    passes = [
        _Pass(
            tokens=sum(sum(sizes[part.owner]) // part.parts for part in taken),
            batch_tokens=max(max(sizes[part.owner]) for part in taken),
            longest=max(max(map(max, filter(None, lengths[part.owner]))) for part in taken),
            members=taken,
        )
        for taken in readings(members, 1, gates.hidden)
    ]
    return max(passes, key=lambda each: each.tokens), total


def _batch_sizes(*lengths: list[int]) -> list[int]:
    """Tokens of a member's batches, padding included."""
    groups = [group for some in lengths for group in batches([range(length) for length in some])]
    return [len(group) * max(map(len, group)) for group in groups]


def _work_bytes(plan: MergePlan, largest: _Pass, width: int) -> int:
    """Activations of one batch in one layer: three as wide as the FFN, six as wide as the states. Attention holds no
    scores, but a mask where a sliding window is shorter than a prompt."""
    config = largest.members[0].config
    wide = max(int(config.get(key) or 0) for key in ("intermediate_size", "ffn_hidden_size"))
    window = config.get("sliding_window") or largest.longest
    mask = 5 * largest.longest**2 if largest.longest > window else 0
    return largest.batch_tokens * width * (3 * wide + 6 * plan.gates.hidden) + mask


def _left_bytes(plan: MergePlan, largest: _Pass, tokens: int) -> int:
    """What prompts leave at the layers, which the kernel counts as this process's though it lies in Ray's store."""
    gates = plan.gates
    members = sum(1 for member in (*gates.experts, *gates.shared) if member.positive)
    kept = min(tokens, members * token_limit(gates.mode, len(gates.experts)))
    sums = 0 if MODES[gates.mode].fits_rows else (FOLDS + 1) * 8 * members
    return gates.layers * gates.hidden * (2 * kept + sums)


def _adapter_bytes(largest: _Pass, width: int) -> int:
    """Factors of all adapters that are read together, in float64, of the layer in use and the next one; and the weights
    that one adapter changes, made anew."""
    factors: dict[str, int] = {}
    changed = 0
    for adapter in _adapters(largest.members):
        made: dict[str, int] = {}
        for name, weight in adapter.items():
            layer = match[1] if (match := _LAYER.match(name)) else ""
            assert weight.lora is not None
            elements = sum(math.prod(entry.shape) for entry in weight.lora.entries.values())
            factors[layer] = factors.get(layer, 0) + 8 * elements
            made[layer] = made.get(layer, 0) + width * math.prod(weight.entry.shape)
        changed = max([changed, *made.values()])
    return 2 * max(factors.values(), default=0) + changed


def _adapters(members: tuple[Reading, ...]) -> list[Mapping[str, WeightRef]]:
    """The different adapters on the weights that these members' prompts are read with."""
    found: list[Mapping[str, WeightRef]] = []
    for member in members:
        adapter = {name: weight for name, weight in member.weights.items() if weight.lora is not None}
        if adapter and adapter not in found:
            found.append(adapter)
    return found


def _multiplies_bfloat16() -> bool:
    """Whether this machine's CPU does, as `gates.loading.compute_dtype` asks torch."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_tile)\b", flags) is not None
