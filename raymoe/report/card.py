"""README.md of a merged model: what it was made of, how, and how to load it."""

from __future__ import annotations

import yaml

from raymoe.architectures import HOSTS
from raymoe.config import MergeConfig
from raymoe.planning.types import MergePlan
from raymoe.text import human_count

__all__ = ["model_card"]


def model_card(plan: MergePlan, config: MergeConfig) -> str:
    """A model card in Hub form: metadata, experts, how the router was made, the config."""
    host = HOSTS[plan.host]
    metadata = {"library_name": "transformers", "tags": ["merge", "moe", "frankenmoe", "raymoe", plan.host]}
    # Paths on somebody's machine are no base models for anybody else.
    models = sorted({source.label.partition("@")[0] for source in plan.sources if source.revision})
    if models:
        metadata["base_model"] = models
    counts = [len(prompts.positive) or "-" for prompts in plan.gates.experts]
    experts = [f"| {n} | `{e.source_model}` | {counts[n]} |" for n, e in enumerate(config.experts)]
    shared = [f"| shared {n} | `{e.source_model}` | - |" for n, e in enumerate(config.shared_experts)]
    plain = {k: v for k, v in config.to_plain().items() if v not in (None, False, [], ())}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {host.title} mixture of {len(config.experts)} experts",
            "",
            f"{human_count(plan.totals.parameters)} parameters, {human_count(plan.totals.active_parameters)} active "
            f"for a token ({config.experts_per_token} of {len(config.experts)} experts). Attention, norms and "
            f"embeddings come from `{config.base_model}`; each expert gives its feed-forward weights.",
            "",
            "| expert | model | prompts |",
            "|---|---|---|",
            *experts,
            *shared,
            "",
            f"The routers were made from prompts without training: gate mode `{config.gate_mode}`.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
            "```",
            "",
            "Merge config:",
            "",
            "```yaml",
            yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110).rstrip(),
            "```",
            "",
        ]
    )
