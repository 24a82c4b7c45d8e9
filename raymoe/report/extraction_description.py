"""The description of an expert that is taken out of a mixture: its card and its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raymoe._version import __version__
from raymoe.checkpoints.merge_record import extraction_record
from raymoe.config.model_refs import short_name
from raymoe.formatting import human_count
from raymoe.object_store.options import StorageOptions
from raymoe.planning.plan import MergePlan
from raymoe.report.model_card import PATH_PLACEHOLDER, code_span
from raymoe.report.source_metadata import common_value, source_cards
from raymoe.routers.heldout_report import RouterSummary
from raymoe.sources.hub import HubOptions
from raymoe.storage.file_names import FileRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionDescription:
    """Implements `raymoe.runtime.coordinator.Description` for the plan of an extraction."""

    plan: MergePlan
    hub: HubOptions
    storage: StorageOptions

    def card(self, summary: RouterSummary | None) -> str | None:
        """README.md; None if none is written."""
        if not self.plan.options.model_card:
            return None
        from huggingface_hub import ModelCardData

        (source,) = self.plan.sources
        sources = source_cards(self.plan, self.hub, self.storage)
        license = common_value([each.license for each in sources])
        languages = common_value([each.languages for each in sources])
        bases = [name for each in sources for name in ((each.hub_id,) if each.hub_id else each.bases)]
        data = ModelCardData(
            base_model=list(dict.fromkeys(bases)) or None,
            language=list(languages) if languages else None,
            library_name="transformers",
            license=license.name if license else None,
            license_name=license.title if license else None,
            license_link=license.link if license else None,
            pipeline_tag="text-generation",
            tags=["raymoe", "expert"],
        )
        name = code_span(short_name(source.label, source.adapter))
        lines = [
            f"# {self.plan.title} model of one expert: {name}",
            "",
            f"{human_count(self.plan.totals.parameters)} parameters. The feed-forward weights of one expert of a "
            f"mixture, in the mixture's attention, norms and embeddings: what the mixture computes if every token goes "
            f"to this expert. Taken out by raymoe {__version__} (`raymoe extract`). Nothing was trained.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{PATH_PLACEHOLDER}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{PATH_PLACEHOLDER}")',
            "```",
        ]
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"

    def backbone_lines(self) -> Sequence[str]:
        """Nothing: the backbone is the mixture's."""
        return ()

    def record(self, files: Sequence[FileRecord], summary: RouterSummary | None) -> dict[str, Any]:
        """The content of raymoe.json."""
        return extraction_record(self.plan, files)
