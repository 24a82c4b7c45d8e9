"""What an edit did to a mixture, for the record and the card of the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raymoe.formatting import plural, short_list


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedExpert:
    """One expert of the result.

    Attributes:
        how: `kept`, `added` or `replaced`.
        number: Its number in the mixture that was edited; of an added expert, None.
        model: The model that it is from, as far as it is known; of a kept expert, that of the mixture's record.
        before: Of a replaced expert, the model that was there.
        name: Of a kept expert, its display name, which labels of `raymoe eval` may have. Empty: unknown.
    """

    how: str
    number: int | None
    model: str | None
    before: str | None = None
    name: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON values; what is not known is left out."""
        values = {"how": self.how, "expert": self.number, "model": self.model, "before": self.before}
        values |= {"name": self.name or None}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """An edit of the mixture `mixture`, whose plan had the digest `plan_digest` if raymoe wrote it.

    Attributes:
        mixture: The mixture's name, with the commit of a Hub repository.
        plan_digest: The digest in its record; None if it has no record.
        routers: `computed` for all experts, or `kept` for those that stay.
        backbone: `base`: that of the base model; `kept`: that of the mixture.
        experts: The experts of the result.
        removed: Number and model of each expert that is no longer there.
    """

    mixture: str
    plan_digest: str | None
    routers: str
    backbone: str
    experts: tuple[EditedExpert, ...]
    removed: tuple[tuple[int, str | None], ...]

    def plain(self) -> dict[str, Any]:
        """The record's `edit`."""
        return {
            "mixture": self.mixture,
            "plan_digest": self.plan_digest,
            "routers": self.routers,
            "backbone": self.backbone,
            "experts": [expert.plain() for expert in self.experts],
            "removed": [{"expert": number, "model": model} for number, model in self.removed],
        }

    def lines(self) -> Iterator[str]:
        """One sentence for each kind of change, without its full stop. Names of models are not in them."""
        kept = [str(expert.number) for expert in self.experts if expert.how == "kept"]
        if kept:
            yield f"{plural('expert', len(kept))} {short_list(kept, most=16)} {'is' if len(kept) == 1 else 'are'} kept"
        for number, expert in enumerate(self.experts):
            if expert.how == "replaced":
                moved = "" if number == expert.number else f", and is expert {number} now"
                yield f"expert {expert.number} is replaced{moved}"
            elif expert.how == "added":
                yield f"expert {number} is added"
        for number, _ in self.removed:
            yield f"expert {number} is removed"
        rows = "of the experts that stay are kept" if self.routers == "kept" else "are computed anew"
        yield f"router rows {rows}"
