"""What a soak runs: kinds of merges (`Variant`), and from a seed which of them, how it is disturbed and where it goes.

`make_cases` is a pure function of its arguments: the same seed gives the same list, and case N does not depend on how
many come after it. Directions and servers take turns, so that short soaks see all of them; the rest is drawn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DIRECTIONS", "EXAMPLE_VARIANTS", "VARIANTS", "Case", "Kill", "MergeCase", "Variant", "make_cases"]

DIRECTIONS = ("S3 to S3", "local to S3", "S3 to local")
MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A merge: the models `base` and `experts` (names in models.py), keys of the config, and the size of shards.

    `prompts`: so many made-up prompts an expert, for gate passes that take a while; 0: two short ones.
    """

    name: str
    base: str
    experts: tuple[str, ...]
    mode: str = "random"
    config: Mapping[str, Any] = field(default_factory=dict)
    expert_keys: Mapping[str, Any] = field(default_factory=dict)
    shard_bytes: int
    prompts: int = 0
    share: int = 1  # how often it is drawn, relative to others

    @property
    def has_prompts(self) -> bool:
        return self.mode not in ("random", "uniform_random")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A try is killed when it has sent this share of the requests of an undisturbed merge, and that many seconds later.

    Requests and not seconds: how far a merge has come by then does not depend on how busy the machine is.
    """

    share: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MergeCase:
    """What is merged, from where to where. `server`: of the object store; None where none takes part."""

    number: int
    seed: int
    variant: Variant
    direction: str
    server: str | None
    actors: int
    sha256: bool = False
    impatient: bool = False  # gives up a request after a second, so that some faults end the merge

    @property
    def reads_s3(self) -> bool:
        return self.direction.startswith("S3")

    @property
    def writes_s3(self) -> bool:
        return self.direction.endswith("S3")

    @property
    def plain(self) -> MergeCase:
        """The same merge as anybody would run it."""
        chosen = {key: getattr(self, key) for key in ("number", "seed", "variant", "direction", "server", "actors")}
        return MergeCase(**chosen)


@dataclass(frozen=True, kw_only=True)
class Case(MergeCase):
    """One merge with its disturbances. `kills`: when each try is killed, see `Kill`."""

    server: str
    rate: float
    kills: tuple[Kill, ...]

    @property
    def label(self) -> str:
        checked = ", sha256" if self.sha256 else ""
        kills = ", ".join(f"killed at {kill.share:.0%}" for kill in self.kills) or "not killed"
        kills += ", impatient" if self.impatient else ""
        return f"{self.variant.name}, {self.direction}, {self.server}, rate {self.rate:.3f}{checked}, {kills}"


_PICO = tuple(f"pico-{number}" for number in (1, 2, 3))
_WIDE = tuple(f"wide-{number}" for number in (1, 2))

VARIANTS = (
    Variant(name="many shards", base="pico-0", experts=_PICO, shard_bytes=90_000, share=4),
    Variant(
        name="noise and cast",
        base="pico-0",
        experts=_PICO[:2],
        config={"dtype": "float32"},
        expert_keys={"noise_scale": 0.01},
        shard_bytes=200_000,
        share=3,
    ),
    Variant(name="cheap_embed", base="pico-0", experts=_PICO, mode="cheap_embed", shard_bytes=150_000),
    Variant(name="hidden", base="pico-0", experts=_PICO[:2], mode="hidden", shard_bytes=400_000),
    Variant(name="wide", base="wide-0", experts=_WIDE, shard_bytes=20 * MB, share=4),
    Variant(name="wide, one shard", base="wide-0", experts=_WIDE, shard_bytes=5000 * MB, share=2),
    Variant(
        name="wide, cast",
        base="wide-0",
        experts=_WIDE,
        config={"dtype": "float16"},
        shard_bytes=45 * MB,
        share=2,
    ),
)

_EXAMPLES = tuple(f"example-{name}" for name in ("go", "metamath", "spanish", "dictionary"))


def _example(mode: str, shard_bytes: int, share: int) -> Variant:
    name = f"example experts, {mode}"
    return Variant(name=name, base="example-base", experts=_EXAMPLES, mode=mode, shard_bytes=shard_bytes, share=share)


EXAMPLE_VARIANTS = (
    _example("random", 100 * MB, 5),
    _example("cheap_embed", 5000 * MB, 3),
    _example("hidden", 200 * MB, 2),
)


def make_cases(
    count: int, seed: int, rate: float, servers: Sequence[str], variants: Sequence[Variant] = VARIANTS
) -> list[Case]:
    """`count` cases; every second one is killed, once or (one in three of those) twice."""
    combinations = list(itertools.product(DIRECTIONS, servers))
    return [_case(number, seed, rate, combinations[number % len(combinations)], variants) for number in range(count)]


def _case(number: int, seed: int, rate: float, where: tuple[str, str], variants: Sequence[Variant]) -> Case:
    dice = random.Random(f"{seed}:{variants[0].name}:{number}")
    # moto reads a whole object for each range of it: a model that is read tensor by tensor would take minutes.
    slow = where[0].startswith("S3") and where[1] == "moto" and variants is EXAMPLE_VARIANTS
    weights = [0 if slow and variant.mode == "hidden" else variant.share for variant in variants]
    variant = dice.choices(variants, weights)[0]
    # Directions and servers alternate with the number; so that kills do not go with some of them, their turn moves on.
    is_killed = (number + number // 6) % 2 == 1
    tries = (2 if dice.random() < 1 / 3 else 1) if is_killed else 0
    return Case(
        number=number,
        seed=dice.randrange(2**31),
        variant=variant,
        direction=where[0],
        server=where[1],
        rate=rate * dice.choice((0.2, 1.0, 1.0, 2.0)),
        sha256=dice.random() < 1 / 6,
        actors=dice.choice((1, 1, 2)),
        kills=tuple(Kill(share=dice.random(), seconds=0.3 * dice.random()) for _ in range(tries)),
    )
