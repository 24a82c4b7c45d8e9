"""Owners: which models the bytes of a shard come from. Only this module knows their names in records.

base            the base model               experts          several experts
expert 0, ...   one expert                   shared experts   several shared experts
shared 0, ...   one shared expert            router           none: the values are computed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class OwnerKind(Enum):
    """The values are the names in records and messages."""

    BASE = "base"
    EXPERT = "expert"
    SHARED = "shared"
    ALL_EXPERTS = "experts"
    ALL_SHARED = "shared experts"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Owner:
    """A model of the merge, a group of them, or the router. Only single experts and shared experts have an `index`."""

    kind: OwnerKind
    index: int | None = None

    @classmethod
    def expert(cls, index: int) -> Owner:
        return cls(OwnerKind.EXPERT, index)

    @classmethod
    def shared(cls, index: int) -> Owner:
        return cls(OwnerKind.SHARED, index)

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Read an owner from a record.

        Args:
            text: the `str` of an owner, such as `base` or `expert 0`.

        Returns:
            The owner; None if the text is not one, which is possible in a record of another version.

        Example:
            >>> Owner.parse("expert 2")
            Owner(kind=<OwnerKind.EXPERT: 'expert'>, index=2)
        """
        word, _, index = text.rpartition(" ")
        for kind in OwnerKind:
            if kind not in CONFIG_KEYS and text == kind.value:
                return cls(kind)
            if kind in CONFIG_KEYS and word == kind.value and index.isdecimal():
                return cls(kind, int(index))
        return None

    def __str__(self) -> str:
        return self.kind.value if self.index is None else f"{self.kind.value} {self.index}"


CONFIG_KEYS: Mapping[OwnerKind, str] = {OwnerKind.EXPERT: "experts", OwnerKind.SHARED: "shared_experts"}
"""The config's lists of models, by the kind of owner of their entries."""

BASE, ROUTER = Owner(OwnerKind.BASE), Owner(OwnerKind.ROUTER)
ALL_EXPERTS, ALL_SHARED = Owner(OwnerKind.ALL_EXPERTS), Owner(OwnerKind.ALL_SHARED)
