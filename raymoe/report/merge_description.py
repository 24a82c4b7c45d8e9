"""The description of a merge: its model card and its record.

    MergePlan, MergeConfig, routers' scores on held-out prompts --> README.md, raymoe.json

The coordinator writes both, without depending on the config or the content of cards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raymoe.checkpoints.edit_record import Edit
from raymoe.checkpoints.merge_record import merge_record
from raymoe.config import MergeConfig
from raymoe.errors import RaymoeError
from raymoe.planning.plan import MergePlan
from raymoe.report.backbone_lines import backbone_lines
from raymoe.report.model_card import card_metadata, model_card
from raymoe.report.source_metadata import SourceCard, source_cards
from raymoe.routers.heldout_report import RouterSummary
from raymoe.sources.hub import HubOptions
from raymoe.sources.prompt_sampling import read_chat_template
from raymoe.sources.resolve import fetch_file
from raymoe.storage.file_names import FileRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeDescription:
    """Implements `raymoe.runtime.coordinator.Description`. `config` is the user's config, from which the plan was
    made; `edit` is what was done to a mixture, if the merge is an edit of it."""

    plan: MergePlan
    config: MergeConfig
    hub: HubOptions
    edit: Edit | None = None

    def card(self, summary: RouterSummary | None) -> str | None:
        """README.md; None if the merge writes no card."""
        if not self.plan.options.model_card:
            return None
        return model_card(
            self.plan,
            self.config,
            summary,
            self._source_cards(),
            has_chat_template=self._has_chat_template(),
            edit=self.edit,
        )

    def card_head(self) -> str | None:
        """The card's front matter, the only part that the Hub checks; None if the merge writes no card."""
        if not self.plan.options.model_card:
            return None
        return f"---\n{card_metadata(self.plan, self._source_cards())}\n---\n"

    def backbone_lines(self) -> Sequence[str]:
        """Describes the backbone of the merge."""
        return backbone_lines(self.plan)

    def record(self, files: Sequence[FileRecord], summary: RouterSummary | None) -> dict[str, Any]:
        """The content of raymoe.json."""
        return merge_record(self.plan, self.config, files, summary, self.edit)

    def _source_cards(self) -> Sequence[SourceCard]:
        return source_cards(self.plan, self.hub, self.config.storage)

    def _has_chat_template(self) -> bool:
        """Whether the output's tokenizer has a chat template; false if it can't be read."""
        files = {side.name: side.file for side in self.plan.side_files}
        try:
            return bool(
                read_chat_template(files, lambda file: fetch_file(file, self.hub, self.config.storage).read_bytes())
            )
        except (RaymoeError, OSError, ValueError):
            return False
