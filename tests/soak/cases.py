"""What a soak runs: kinds of merges (`Variant`), and from a seed which of them, how it is disturbed and where it goes.

`make_cases` is a pure function of its arguments: the same seed gives the same list, and case N does not depend on how
many come after it. Directions and servers take turns, so that short soaks see all of them; the rest is drawn. Every
third case is a takeover: a merge of another plan is at the output when the case's own merge begins.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymoe.gate_modes import MODES

__all__ = [
    "DIRECTIONS",
    "EXAMPLE_VARIANTS",
    "TAKEOVER_DIRECTIONS",
    "TO_FSSPEC",
    "VARIANTS",
    "WAYS",
    "Case",
    "Kill",
    "MergeCase",
    "Stage",
    "Takeover",
    "Variant",
    "draw_takeover",
    "is_takeover",
    "make_cases",
]

DIRECTIONS = ("S3 to S3", "local to S3", "S3 to local")
TO_FSSPEC = "local to fsspec"
TAKEOVER_DIRECTIONS = (*DIRECTIONS, TO_FSSPEC)
_TAKEOVER_EVERY = 3
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
        return MODES[self.mode].needs_prompts

    @property
    def with_other_experts(self) -> Variant:
        """Another plan whose shards have the same names and sizes: each expert is another one of the same models."""
        return replace(self, experts=(*self.experts[1:], self.experts[0]))


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A try is killed when it has sent this share of the requests of an undisturbed merge, and that many seconds later.

    Requests and not seconds: how far a merge has come by then does not depend on how busy the machine is.
    """

    share: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A moment of a merge, as its output shows it: `seconds` after `at` is reached.

    `at`: `start` (the command), `begin` (the journal is there), `shards` (`share` of them are finished), `end` (all
    are), `after` (the command is through).
    """

    at: str
    share: float = 0.0
    seconds: float = 0.0


WAYS = {
    "beside": "started at about the same time",
    "killed": "driver killed",
    "group": "driver and actors killed",
    "stopped": "driver stopped",
    "frozen": "driver and actors stopped",
    "orphaned": "driver killed, actors stopped",
    "held": "requests held back",
}
"""What becomes of a merge that is taken over. What was stopped or held back goes on at a later moment."""


@dataclass(frozen=True, kw_only=True)
class Takeover:
    """A merge of another plan (the older one) is at the output when the case's own merge starts with --overwrite.

    `way`: what is done to the older one (see WAYS) at `struck`, a moment of its own. At `back`, a moment of the newer
    one, it goes on.
    """

    way: str
    struck: Stage
    back: Stage

    @property
    def label(self) -> str:
        back = f", goes on at {self.back.at}" if self.way in ("stopped", "frozen", "orphaned", "held") else ""
        return f"takes over from another plan: {WAYS[self.way]} at {self.struck.at}{back}"


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
    def writes_fsspec(self) -> bool:
        return self.direction == TO_FSSPEC

    @property
    def plain(self) -> MergeCase:
        """The same merge as anybody would run it."""
        chosen = {key: getattr(self, key) for key in ("number", "seed", "variant", "direction", "server", "actors")}
        return MergeCase(**chosen)


@dataclass(frozen=True, kw_only=True)
class Case(MergeCase):
    """One merge with its disturbances. `kills`: when each try is killed, see `Kill`. `takeover`: from which merge it
    takes its output over, if it does; then it is not killed."""

    server: str
    rate: float
    kills: tuple[Kill, ...]
    takeover: Takeover | None = None

    @property
    def label(self) -> str:
        checked = ", sha256" if self.sha256 else ""
        kills = ", ".join(f"killed at {kill.share:.0%}" for kill in self.kills) or "not killed"
        kills = self.takeover.label if self.takeover else kills
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
    """`count` cases. Every third one is a takeover; of the others every second one is killed, once or (one in three of
    those) twice."""
    return [_case(number, seed, rate, servers, variants) for number in range(count)]


def is_takeover(number: int) -> bool:
    """Whether case `number` of a soak is one."""
    return number % _TAKEOVER_EVERY == _TAKEOVER_EVERY - 1


def draw_takeover(dice: random.Random, way: str) -> Takeover:
    """A takeover in this way, at moments that are drawn."""
    # A command needs a while to begin: what is started later than the first one's shards finds a finished merge.
    at, back = dice.choice(("start", "shards") if way == "beside" else _STRUCK), dice.choice(_BACK)
    return Takeover(
        way=way,
        struck=Stage(at=at, share=dice.random(), seconds=dice.random() * _SECONDS[at]),
        back=Stage(at=back, share=dice.random(), seconds=dice.random() * _SECONDS[back]),
    )


_STRUCK = ("start", "begin", "shards", "shards", "shards", "shards", "end")
_BACK = ("start", "begin", "begin", "begin", "shards", "shards", "shards", "end", "after")
# How long a moment lasts: it is struck somewhere within. A command needs seconds before it begins.
_SECONDS = {"start": 3.0, "begin": 0.3, "shards": 0.1, "end": 0.3, "after": 0.0}


# In turn. What goes on later has the most to do with the one that takes over.
_WAYS_BY_REQUESTS = ("stopped", "held", "killed", "stopped", "beside", "held")
_WAYS_ON_FOLDERS = ("stopped", "killed", "beside")


def _case(number: int, seed: int, rate: float, servers: Sequence[str], variants: Sequence[Variant]) -> Case:
    dice = random.Random(f"{seed}:{variants[0].name}:{number}")
    takes_over = is_takeover(number)
    # Each kind of case has its own turns through directions and servers.
    turn = number // _TAKEOVER_EVERY if takes_over else number - (number + 1) // _TAKEOVER_EVERY
    where = list(itertools.product(TAKEOVER_DIRECTIONS if takes_over else DIRECTIONS, servers))
    direction, server = where[turn % len(where)]
    # moto reads a whole object for each range of it: a model that is read tensor by tensor would take minutes.
    slow = direction.startswith("S3") and server == "moto" and variants is EXAMPLE_VARIANTS
    weights = [0 if slow and variant.mode == "hidden" else variant.share for variant in variants]
    variant = dice.choices(variants, weights)[0]
    # Directions and servers alternate with the turn; so that kills do not go with some of them, their turn moves on.
    is_killed = not takes_over and (turn + turn // 6) % 2 == 1
    tries = (2 if dice.random() < 1 / 3 else 1) if is_killed else 0
    ways = _WAYS_ON_FOLDERS if direction.endswith("local") else _WAYS_BY_REQUESTS
    way = ways[(turn // len(where) + turn % len(where)) % len(ways)]
    return Case(
        number=number,
        seed=dice.randrange(2**31),
        variant=variant,
        direction=direction,
        server=server,
        rate=rate * dice.choice((0.2, 1.0, 1.0, 2.0)),
        sha256=dice.random() < 1 / 6,
        actors=dice.choice((1, 1, 2)),
        kills=tuple(Kill(share=dice.random(), seconds=0.3 * dice.random()) for _ in range(tries)),
        takeover=draw_takeover(dice, way) if takes_over else None,
    )
