"""llama.cpp's name of a pre-tokenizer: how a byte-level BPE tokenizer splits text before it merges bytes.

llama.cpp implements each known pre-tokenizer in its own code, under its own names. Here the name is found from the
tokenizer.json: the steps of its `pre_tokenizer` must equal those of a row, character by character. Others are never
guessed: another split gives other tokens for the same text, and the only symptom is worse answers. The only normalizer
that is accepted is NFC, which llama.cpp leaves to the author of the text.

Source of the table: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp, which quotes the patterns of the
tokenizer.json that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)

Steps = tuple[tuple[str, ...], ...]
_BYTES: tuple[str, ...] = ("bytes",)
_GPT2_BYTES: tuple[str, ...] = ("bytes", "gpt2")  # ByteLevel itself splits by GPT-2's pattern

# (steps, whether a word that is a whole token is used without merging, name)
_TABLE: tuple[tuple[Steps, bool, str], ...] = (
    ((_GPT2_BYTES,), False, "gpt-2"),
    ((("digits", "each"), _GPT2_BYTES), False, "smollm"),
    ((("split", _LLAMA3), _BYTES), True, "llama-bpe"),
    ((("split", _LLAMA3), _BYTES), False, "smaug-bpe"),
    ((("split", _QWEN2), _BYTES), False, "qwen2"),
    ((("split", _QWEN35), _BYTES), False, "qwen35"),
    ((("split", _TEKKEN), _BYTES), True, "tekken"),
    ((("split", _GPT4O), _BYTES), False, "gpt-4o"),
)
KNOWN = tuple(name for _, _, name in _TABLE)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; None if the table does not have it."""
    if (tokenizer.get("normalizer") or {}).get("type") not in (None, "NFC"):
        return None
    steps = _steps(tokenizer.get("pre_tokenizer"))
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    for known, ignores_merges, name in _TABLE:
        if (steps, whole_words) == (known, ignores_merges):
            return name
    return None


def _steps(stage: Mapping[str, Any] | None) -> Steps:
    """A pre-tokenizer as the table writes it; a step of another kind, or with other settings, as ('other', ...)."""
    if stage is None:
        return ()
    if stage["type"] == "Sequence":
        return tuple(step for inner in stage["pretokenizers"] for step in _steps(inner))
    if stage["type"] == "ByteLevel" and not stage.get("add_prefix_space"):
        return (_GPT2_BYTES if stage.get("use_regex", True) else _BYTES,)
    if stage["type"] == "Digits" and stage.get("individual_digits"):
        return (("digits", "each"),)
    pattern = stage.get("pattern", {}).get("Regex")
    if stage["type"] == "Split" and pattern and stage.get("behavior") == "Isolated" and not stage.get("invert"):
        return (("split", pattern),)
    return (("other", str(stage)),)
