"""What a chaos run does: from a seed which merges, what is done to them, and at which moments.

`make_case` is a pure function: the same kind, number and seed give the same case. Moments and directions take turns, so
that short runs see all of them; the rest is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from raymoe.gate_modes import MODES
from tests.soak.cases import TO_FSSPEC, MergeCase, Takeover, Variant, draw_takeover

__all__ = [
    "CHAOS_VARIANTS",
    "FULL_STORE",
    "KINDS",
    "MOMENTS",
    "NODE_KINDS",
    "ChaosCase",
    "Moment",
    "make_case",
    "variant_named",
]

KINDS = {
    "actor": "SIGKILL of an expert actor",
    "node": "loss of a worker node",
    "driver": "SIGKILL of the driver",
    "sigterm": "SIGTERM to the driver",
    "cut off": "a worker node that stands still, and comes back at the end",
    "takeover": "takeover by a merge of another plan",
    "store": "Ray's object store too small",
}
NODE_KINDS = ("node", "cut off")
MOMENTS = ("start", "prompts", "routers", "shards", "end")
"""Of a merge: planning, connecting, starting actors; reading prompts; making routers; writing the rest of the shards;
router shard, small files, index, record."""
MB = 1_000_000
_MODELLED = tuple(mode.name for mode in MODES.values() if mode.needs_forward_pass)  # actors run models for them


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to strike: when `share` of what happens at this moment of the merge is over."""

    at: str
    share: float


@dataclass(frozen=True, kw_only=True)
class ChaosCase:
    """One merge, and what is done to it at each of `moments`.

    `way`: `command` runs `raymoe merge` on the cluster, `job` sends it there by `raymoe submit`, `own` lets the command
    start a Ray of its own. A takeover has no `moments`: it is the older of its two merges that is struck.
    """

    kind: str
    merge: MergeCase
    moments: tuple[Moment, ...]
    way: str
    takeover: Takeover | None = None

    @property
    def has_gates(self) -> bool:
        """Whether its actors run models."""
        return self.merge.variant.mode in _MODELLED

    @property
    def label(self) -> str:
        merge = self.merge
        server = f" ({merge.server})" if merge.server else ""
        when = "".join(f", at {moment.at} {moment.share:.0%}" for moment in self.moments)
        when += f", {self.takeover.label}" if self.takeover else ""
        return f"{self.kind} {merge.number}: {merge.variant.name}, {merge.direction}{server}, by {self.way}{when}"


_ADAPTERS = tuple(f"adapter-{name}" for name in ("go", "metamath", "spanish", "dictionary"))


def _example(mode: str, prompts: int = 0) -> Variant:
    name = f"example experts, {mode}"
    return Variant(name=name, base="adapter-base", experts=_ADAPTERS, mode=mode, prompts=prompts, shard_bytes=100 * MB)


_DEEP = ("deep-1", "deep-2", "deep-3")

CHAOS_VARIANTS = (
    Variant(name="ridge", base="deep-0", experts=_DEEP, mode="ridge", prompts=12, shard_bytes=1 * MB, share=5),
    Variant(
        name="many shards",
        base="deep-0",
        experts=_DEEP,
        config={"dtype": "float32"},
        expert_keys={"noise_scale": 0.01, "reinit": 0.25},
        shard_bytes=MB // 2,
        share=3,
    ),
    Variant(name="wide", base="wide-0", experts=("wide-1", "wide-2"), shard_bytes=10 * MB, share=2),
)
FULL_STORE = Variant(name="full store", base="deep-0", experts=_DEEP, mode="ridge", prompts=48, shard_bytes=1 * MB)
"""Its gate pass leaves some 270 MB in Ray's object store."""
EXAMPLES = (_example("cheap_embed"), _example("ridge", 8), _example("random"), _example("hidden", 8))
_WAYS = ("stopped", "frozen", "killed", "beside", "group", "orphaned")
"""Of takeovers, in turn (WAYS of tests/soak/cases.py)."""
_TAKEOVER_OUTPUTS = ("local to local", "local to S3", TO_FSSPEC)
_OWN_EVERY = 6
_EXAMPLE_EVERY = 6  # they take long, and are no different


def variant_named(name: str) -> Variant:
    return next(variant for variant in (*CHAOS_VARIANTS, *EXAMPLES) if variant.name == name)


def make_case(
    kind: str, number: int, seed: int, servers: Sequence[str], *, only: Variant | None = None, examples: bool = True
) -> ChaosCase:
    """Case `number` of a kind. `servers`: object stores; none: local outputs alone. `only`: merge nothing else."""
    if kind == "takeover":
        return _takeover_case(number, seed, servers, only)
    dice = random.Random(f"{seed}:{kind}:{number}")
    variant = only or dice.choices(CHAOS_VARIANTS, [variant.share for variant in CHAOS_VARIANTS])[0]
    turn = number + list(KINDS).index(kind)
    if examples and only is None and turn % _EXAMPLE_EVERY == _EXAMPLE_EVERY - 1:
        variant = EXAMPLES[turn // _EXAMPLE_EVERY % len(EXAMPLES)]
    server = servers[number // 2 % len(servers)] if servers and number % 2 else None
    way = _way(kind, number, server)
    merge = MergeCase(
        number=number,
        seed=dice.randrange(2**31),
        variant=variant,
        direction="local to S3" if server else "local to local",
        server=server,
        actors=3 if kind in NODE_KINDS else dice.choice((1, 2)),
    )
    strikes = dice.choice((1, 1, 2)) if kind in ("actor", "driver") else 1
    possible = _moments(kind, variant, way)
    if way == "own":  # every sixth, which would be at the same moment again and again
        turn += number // _OWN_EVERY
    moments = (Moment(at=possible[(turn + more) % len(possible)], share=dice.random()) for more in range(strikes))
    return ChaosCase(kind=kind, merge=merge, moments=tuple(moments), way=way)


def _takeover_case(number: int, seed: int, servers: Sequence[str], only: Variant | None) -> ChaosCase:
    """Outputs take turns, and on each of them the ways."""
    dice = random.Random(f"{seed}:takeover:{number}")
    outputs = _TAKEOVER_OUTPUTS if servers else _TAKEOVER_OUTPUTS[:1]
    turn, output = divmod(number, len(outputs))
    is_local = outputs[output] == "local to local"
    merge = MergeCase(
        number=number,
        seed=dice.randrange(2**31),
        variant=only or dice.choices(CHAOS_VARIANTS, [variant.share for variant in CHAOS_VARIANTS])[0],
        direction=outputs[output],
        server=None if is_local else servers[turn % len(servers)],
        actors=1,  # of each of the two merges
    )
    takeover = draw_takeover(dice, _WAYS[(turn + output) % len(_WAYS)])
    return ChaosCase(kind="takeover", merge=merge, moments=(), way="command", takeover=takeover)


def _way(kind: str, number: int, server: str | None) -> str:
    if kind in ("actor", *NODE_KINDS):
        return "command"
    if kind == "driver" and number % _OWN_EVERY == 4 and server is None:
        return "own"
    return ("command", "job")[number // 2 % 2]


def _moments(kind: str, variant: Variant, way: str) -> list[str]:
    """The moments that there are, and at which it would be noticed."""
    found = set(MOMENTS)
    if variant.mode not in _MODELLED or way == "own":  # nobody sees into a Ray of its own
        found -= {"prompts", "routers"}
    if kind == "actor":  # at the end there are none
        found -= {"end"}
    return [moment for moment in MOMENTS if moment in found]
