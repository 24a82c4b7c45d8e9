"""The space that SentencePiece's tokenizers put before a text, so that its first word has the same token as elsewhere.

llama.cpp puts one before a text and after every special token, or none at all. In transformers a normalizer does the
same. A Metaspace adds none if there is a space already, and may add it only at the beginning of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymoe.architectures import FAMILIES, find_moe_architecture

_ALWAYS_DIFFERENCE = "adds none where there is one already"
_FIRST_DIFFERENCE = "adds it before the text only, and none if the text begins with one"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpacePrefix:
    """`difference`: how the tokenizer differs from llama.cpp; empty if it does not."""

    is_added: bool
    difference: str = ""

    @property
    def warnings(self) -> list[str]:
        if not self.difference:
            return []
        return [f"llama.cpp puts a space before a text and after every special token; transformers {self.difference}"]


def space_prefix(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], of_model: bool, model_type: object
) -> SpacePrefix:
    """The space prefix of a tokenizer, from its config, its tokenizer.json (empty if there is none) and its
    tokenizer.model.

    A LlamaTokenizer that transformers rebuilds follows its config, every other tokenizer its tokenizer.json.
    """
    add_prefix_space = config.get("add_prefix_space")
    name = config.get("tokenizer_class")
    is_llamas = isinstance(name, str) and name.removesuffix("Fast") == "LlamaTokenizer"
    is_made_anew = is_llamas and not _is_read_as_is(model_type)
    of_files = _read_space_prefix(tokenizer) if tokenizer else SpacePrefix(is_added=of_model)
    if tokenizer and not is_made_anew:
        return of_files
    if not (add_prefix_space if isinstance(add_prefix_space, bool) else of_files.is_added):
        return SpacePrefix(is_added=False)
    if not is_made_anew:
        return SpacePrefix(is_added=True)
    return SpacePrefix(
        is_added=True, difference=_ALWAYS_DIFFERENCE if config.get("legacy") is True else _FIRST_DIFFERENCE
    )


def _is_read_as_is(model_type: object) -> bool:
    """Whether transformers 5 reads a tokenizer.json as it is, and does not rebuild it as a LlamaTokenizer."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    rows = (family, find_moe_architecture({"model_type": model_type}))
    return any(row is not None and row.reads_tokenizer_as_is for row in rows)


def _read_space_prefix(tokenizer: Mapping[str, Any]) -> SpacePrefix:
    """The space prefix of the normalizer or the pre-tokenizer."""
    if any(stage["type"] == "Prepend" for stage in _stages(tokenizer.get("normalizer"), "normalizers")):
        return SpacePrefix(is_added=True)
    found = [s for s in _stages(tokenizer.get("pre_tokenizer"), "pretokenizers") if s["type"] == "Metaspace"]
    schemes = {s.get("prepend_scheme", "always") for s in found if s.get("add_prefix_space", True)} - {"never"}
    if not schemes:
        return SpacePrefix(is_added=False)
    return SpacePrefix(is_added=True, difference=_FIRST_DIFFERENCE if "first" in schemes else _ALWAYS_DIFFERENCE)


def _stages(stage: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences (under the key `inner`) one by one."""
    if stage is None:
        return []
    return [step for part in stage[inner] for step in _stages(part, inner)] if inner in stage else [stage]
