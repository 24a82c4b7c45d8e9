"""All routers computed in this process, one expert after the other: what actors and the coordinator do together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raymoe.config.modes import MODES
from raymoe.gates.assemble import Rows, collected, embedding_rows_by_owner, random_gate_rows
from raymoe.gates.capture import LayerDone, MemberLayer, capture_layers, readings
from raymoe.gates.embeddings import embedding_gate_rows
from raymoe.gates.layer_rows import layer_rows
from raymoe.gates.summary import RouterSummary
from raymoe.planning.types import GatePlan
from raymoe.storage.reader import SourceReader

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
    """The rows of all members, and what held-out prompts say of them. `begun` is told what comes next."""
    mode, members = MODES[gates.mode], [p for p in (*gates.experts, *gates.shared) if p.positive]
    if not mode.needs_prompts:
        return random_gate_rows(gates), None
    if not mode.reads_layers:
        rows = {m.owner: embedding_gate_rows(gates, m, reader, trust_remote_code=trust_remote_code) for m in members}
        return embedding_rows_by_owner(gates, rows), None
    by_owner: dict[str, Sequence[MemberLayer]] = {}
    for together in readings(members, 1):
        owners = [member.owner for member in together]
        if begun is not None:
            begun(f"reading the prompts of {', '.join(owners)}")
        options: dict[str, Any] = {
            "members": len(gates.experts),
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        layers = capture_layers(gates, together, reader, layer_done=layer_done, **options)
        by_owner |= dict(zip(owners, zip(*layers, strict=True), strict=True))
    captured = [by_owner[member.owner] for member in members]
    count = len(gates.experts)
    found = {}
    for layer in range(gates.layers):
        if begun is not None:
            begun(f"router of layer {layer}")
        experts, shared = ([each[layer] for each in part] for part in (captured[:count], captured[count:]))
        found[layer] = layer_rows(gates.mode, experts, shared, device)
    return collected(found, [member.owner for member in gates.experts])
