"""Which host a merge goes into: the one that the config forces, or the first that can hold the models exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymoe.architectures.dense_spec import DenseSpec
from raymoe.architectures.moe import HOSTS
from raymoe.architectures.moe_architecture import MoeHost, MoeShape
from raymoe.errors import Problem

__all__ = ["Selection", "select_host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    host: MoeHost | None
    problems: tuple[Problem, ...] = ()


def select_host(base: DenseSpec, moe: MoeShape, *, forced: str | None, where: str) -> Selection:
    """Choose the host for a base model; the experts' own types are checked against the base's by the planner.

    `forced` is the config's `architecture` and may be the start of a host's name or title ("qwen", "Mixtral").
    """
    candidates: Sequence[MoeHost] = [host for host in HOSTS.values() if base.model_type in host.accepts]
    if forced is not None:
        candidates = _named(forced)
        if not candidates:
            names = ", ".join(f"{h.name} ({h.title})" for h in HOSTS.values())
            what = f"unknown architecture {forced!r}"
            return Selection(host=None, problems=(Problem(where=where, what=what, remedy=f"one of: {names}"),))
    reasons = [(host, _reasons(host, base, moe)) for host in candidates]
    for host, why_not in reasons:
        if not why_not:
            return Selection(host=host)
    details = "".join(f"\n      {host.title}: {'; '.join(why)}" for host, why in reasons)
    nothing = "no MoE architecture" if forced is None else f"architecture {forced!r}"
    can = "can" if forced is None else "can't"
    what = f"{nothing} {can} hold a {base.model_type} base with {_describe(moe)}:{details}"
    remedy = "change what is named above, or use other models"
    if forced is not None:
        others = [host.name for host in HOSTS.values() if not _reasons(host, base, moe)]
        able = f" ({', '.join(others)} can)" if others else ""
        remedy += f", or another architecture{able}, or leave it out to let raymoe choose"
    return Selection(host=None, problems=(Problem(where=where, what=what, remedy=remedy),))


def _named(forced: str) -> list[MoeHost]:
    wanted = forced.strip().lower()
    exact = [host for host in HOSTS.values() if wanted in (host.name, host.title.lower())]
    starts = [h for h in HOSTS.values() if h.name.startswith(wanted) or h.title.lower().startswith(wanted)]
    return exact or starts


def _reasons(host: MoeHost, base: DenseSpec, moe: MoeShape) -> list[str]:
    if base.model_type not in host.accepts:
        return [f"takes {', '.join(host.accepts)} models only"]
    return host.refusals(base, moe)


def _describe(moe: MoeShape) -> str:
    shared = f", {moe.shared} shared" if moe.shared else ""
    return f"{moe.experts} experts, {moe.experts_per_token} per token{shared}"
