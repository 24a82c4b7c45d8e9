"""The space that SentencePiece's tokenizers put before a text: its first word is then the token that it is elsewhere.

llama.cpp puts one before a text and behind every special token, or none at all. In transformers a normaliser does the
same; a Metaspace puts none where there is a space already, and may do it at the beginning of the text only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ALWAYS_DIFFERENCE = "puts none where there is one already"
_FIRST_DIFFERENCE = "puts it before the text only, and none where the text begins with one"
# Model types for which transformers 5 reads a tokenizer.json as it is, whatever class the tokenizer's config names; for
# others it makes a LlamaTokenizer anew. Source: TOKENIZER_MAPPING_NAMES in its models/auto/tokenization_auto.py, 5.23.
_READ_AS_IS_TYPES = frozenset(
    {
        *("mistral", "mixtral", "granite", "granitemoe", "granitemoeshared", "granitemoehybrid"),
        *("ernie4_5", "ernie4_5_moe", "glm4_moe"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpacePrefix:
    """`difference`: what the tokenizer does otherwise than llama.cpp, empty where it does the same."""

    is_added: bool
    difference: str = ""

    @property
    def warnings(self) -> list[str]:
        if not self.difference:
            return []
        return [f"llama.cpp puts a space before a text and behind every special token; transformers {self.difference}"]


def space_prefix(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], of_model: bool, model_type: object
) -> SpacePrefix:
    """What a tokenizer does by its config, its tokenizer.json (empty if there is none) and its tokenizer.model.

    A LlamaTokenizer that is made anew goes by its config, every other one by its tokenizer.json.
    """
    add_prefix_space = config.get("add_prefix_space")
    name = config.get("tokenizer_class")
    is_made_anew = (
        isinstance(name, str) and name.removesuffix("Fast") == "LlamaTokenizer" and model_type not in _READ_AS_IS_TYPES
    )
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


def _read_space_prefix(tokenizer: Mapping[str, Any]) -> SpacePrefix:
    """What the normaliser or the pre-tokenizer puts before the text."""
    if any(stage["type"] == "Prepend" for stage in _stages(tokenizer.get("normalizer"), "normalizers")):
        return SpacePrefix(is_added=True)
    found = [s for s in _stages(tokenizer.get("pre_tokenizer"), "pretokenizers") if s["type"] == "Metaspace"]
    schemes = {s.get("prepend_scheme", "always") for s in found if s.get("add_prefix_space", True)} - {"never"}
    if not schemes:
        return SpacePrefix(is_added=False)
    return SpacePrefix(is_added=True, difference=_FIRST_DIFFERENCE if "first" in schemes else _ALWAYS_DIFFERENCE)


def _stages(stage: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, those of sequences (under the key `inner`) one by one."""
    if stage is None:
        return []
    return [step for part in stage[inner] for step in _stages(part, inner)] if inner in stage else [stage]
