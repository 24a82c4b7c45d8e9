"""All routers computed in this process, one expert after the other: what actors and the coordinator do together."""

from __future__ import annotations

from collections.abc import Callable

from raymoe.config.gate_modes import MODES
from raymoe.planning.plan import GatePlan
from raymoe.routers.activations import LayerDone, MemberLayer, capture_layers
from raymoe.routers.cheap_embed import embedding_gate_rows
from raymoe.routers.fit_layer import joined, layer_rows
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.prompt_passes import readings
from raymoe.routers.router_matrices import Rows, collected, embedding_rows_by_owner, random_gate_rows
from raymoe.storage.source_reader import SourceReader

__all__ = ["gate_rows_here"]


def gate_rows_here(
    gates: GatePlan,
    reader: SourceReader,
    *,
    device: str,
    trust_remote_code: bool = False,
    layer_done: LayerDone | None = None,
    begun: Callable[[str], None] | None = None,
) -> tuple[Rows, RouterSummary | None]:
    """The rows of all members, and what held-out prompts say of them. `begun` is told what comes next.

    A layer's router is made when the last prompts have passed it, and what they left there is dropped.
    """
    mode, members = MODES[gates.mode], [p for p in (*gates.experts, *gates.shared) if p.positive]
    if not mode.needs_prompts:
        return random_gate_rows(gates), None
    if not mode.reads_layers:
        rows = {m.owner: embedding_gate_rows(gates, m, reader, trust_remote_code=trust_remote_code) for m in members}
        return embedding_rows_by_owner(gates, rows), None
    passes = readings(members, 1, gates.hidden)
    left: list[dict[str, list[MemberLayer]]] = [{member.owner: [] for member in members} for _ in range(gates.layers)]
    found = {}
    for together in passes:
        if begun is not None:
            begun(f"reading the prompts of {', '.join(part.name for part in together)}")
        layers = capture_layers(
            gates,
            together,
            reader,
            members=len(gates.experts),
            device=device,
            trust_remote_code=trust_remote_code,
            layer_done=layer_done,
        )
        for layer, captured in enumerate(layers):
            for part, each in zip(together, captured, strict=True):
                left[layer][part.owner].append(each)
            if together is passes[-1]:
                everyone = [joined(left[layer].pop(member.owner)) for member in members]
                count = len(gates.experts)
                found[layer] = layer_rows(gates.mode, everyone[:count], everyone[count:], device)
    return collected(found, [member.owner for member in gates.experts])
