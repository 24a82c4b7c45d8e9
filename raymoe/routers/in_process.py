"""Computes all routers in this process, one expert after the other, without Ray."""

from __future__ import annotations

from collections.abc import Callable

from raymoe.gate_modes import MODES
from raymoe.gate_modes.layer_values import LayerActivations, join_parts
from raymoe.planning.owner import Owner
from raymoe.planning.plan import GatePlan
from raymoe.routers.activations import LayerDone, capture_layers
from raymoe.routers.heldout_report import RouterSummary
from raymoe.routers.prompt_passes import plan_readings
from raymoe.routers.router_matrices import RouterRows, embedding_rows_by_owner, fitted_rows, random_router_rows
from raymoe.routers.token_embeddings import embedding_router_row
from raymoe.storage.source_reader import SourceReader


def compute_routers_locally(
    gates: GatePlan,
    reader: SourceReader,
    *,
    device: str,
    trust_remote_code: bool = False,
    layer_done: LayerDone | None = None,
    on_begin: Callable[[str], None] | None = None,
) -> tuple[RouterRows, RouterSummary | None]:
    """The rows of all experts, and their scores on held-out prompts. `on_begin` is called with each next step.

    A layer's router is computed when the last prompts have passed the layer; then its activations are freed.
    """
    mode, members = MODES[gates.mode], gates.prompted
    if gates.keeps_all:
        return {}, None
    if not mode.needs_prompts:
        return random_router_rows(gates), None
    if not mode.needs_forward_pass:
        rows = {m.owner: embedding_router_row(gates, m, reader, trust_remote_code=trust_remote_code) for m in members}
        return embedding_rows_by_owner(gates, rows), None
    passes = plan_readings(members, 1, gates.hidden)
    activations: list[dict[Owner, list[LayerActivations]]] = [
        {member.owner: [] for member in members} for _ in range(gates.layers)
    ]
    found = {}
    for pass_prompts in passes:
        if on_begin is not None:
            on_begin(f"reading the prompts of {', '.join(part.name for part in pass_prompts)}")
        layers = capture_layers(
            gates,
            pass_prompts,
            reader,
            members=len(gates.fitted),
            device=device,
            trust_remote_code=trust_remote_code,
            layer_done=layer_done,
        )
        for layer, captured in enumerate(layers):
            if layer not in gates.layers_with_router:
                continue
            for part, each in zip(pass_prompts, captured, strict=True):
                activations[layer][part.owner].append(each)
            if pass_prompts is passes[-1]:
                joined = [join_parts(activations[layer].pop(member.owner)) for member in members]
                count = len(gates.fitted)
                found[layer] = mode.fit_layer(joined[:count], joined[count:], device)
    return fitted_rows(gates, found)
