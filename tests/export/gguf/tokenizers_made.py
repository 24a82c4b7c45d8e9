"""Small tokenizers of every kind that is converted, trained on the licence text: at most 400 tokens."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.pico import REPOSITORY

SPECIAL = ["<s>", "</s>", "<pad>"]
CORPUS = (REPOSITORY / "LICENSE").read_text() + " I'll don't we've 2024 1234 ünï日本 DON'T\n\n\n    return x\t\t"
TEXTS = (
    "The License is granted, isn't it? I'LL say: we've 12345 copies of 3.14!",
    "  two spaces,   three\n\n\nand lines \r\n\tdef f(x):\n        return x ** 2  # done   ",
    "Übermäßig naïve façade: 日本語のテキスト, Ελληνικά, Привет мир، مرحبا ٣٤٥",
    "emoji 👩‍💻 and ½ ² x₁ — “quotes” … CamelCaseWords snake_case_42",
    "<s>special</s> tokens<pad> inside",
    " ",
    "a",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def byte_level(steps: Sequence[tuple[str, ...]], *, whole_words: bool = False, bos: bool = False) -> Tokenizer:
    """A byte-level BPE whose text is cut by `steps` as raymoe.export.gguf.pretokenizer's table writes them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _step(step: tuple[str, ...]) -> Any:
    if step[0] == "split":
        return pre_tokenizers.Split(Regex(step[1]), "isolated")
    if step[0] == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step[1:] == ("gpt2",))


@functools.cache
def sentencepiece_model(**options: Any) -> bytes:
    """A tokenizer.model: SentencePiece's BPE with bytes to fall back on, as Llama 2 has it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        vocab_size=400,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "minloglevel": 2,
            **options,
        },
    )
    return model.getvalue()


@functools.cache
def sentencepiece_as_json(model: bytes) -> str:
    """The tokenizer.json that transformers makes of a tokenizer.model: its pieces, merges in the order of scores."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number, piece in enumerate(pieces):
        if processor.is_byte(number) or processor.is_control(number) or processor.is_unknown(number):
            continue
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(number, left, right) for left, right in splits if left in vocab and right in vocab]
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, "special": True, **dict.fromkeys(_FLAGS, False)}
            for number, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in sorted(merges, key=lambda merge: merge[0])],
        },
    }
    return json.dumps(content, ensure_ascii=False)


def put(folder: Path, *, json_text: str | None = None, model: bytes | None = None, **config: Any) -> None:
    """Replace the tokenizer of a checkpoint."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    if json_text is not None:
        (folder / "tokenizer.json").write_text(json_text, encoding="utf-8")
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
