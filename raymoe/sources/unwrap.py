"""Takes the dense text model out of an image-text (or audio-text) checkpoint.

    config.json + index of the wrapper --unwrap--> config + index as the text model alone would have them, and the rest

Only names change: tensors stay where they are in their files, so their bytes are read and copied as before. What is
not text (vision encoder, projector) is kept apart in `Unwrapped.rest`. The table of wrappers is in
architectures/wrappers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raymoe.architectures.wrappers import find_wrapper, part_of, text_config
from raymoe.formatting import human_bytes, short_list
from raymoe.sources.facts import CheckpointIndex, TensorEntry
from raymoe.sources.folder_protocol import unusable_checkpoint
from raymoe.tensor_names import HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwrapped:
    """The text model of a checkpoint.

    `config` and `index` are those of a text model. Of a wrapper's checkpoint, `wrapper_config` is its config.json, and
    `rest` are all other tensors by their names there; both are empty for a text model.
    """

    config: Mapping[str, Any]
    index: CheckpointIndex
    wrapper_config: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, TensorEntry] = field(default_factory=dict)


def unwrap(label: str, config: Mapping[str, Any], index: CheckpointIndex) -> Unwrapped:
    """The text model of a checkpoint: its text part if its config.json describes a wrapper, otherwise all of it.

    Raises CheckpointError if the checkpoint holds no text part, or holds a tensor of it twice.
    """
    wrapper = find_wrapper(config)
    if wrapper is None:
        return Unwrapped(config=config, index=index)
    text: dict[str, TensorEntry] = {}
    rest: dict[str, TensorEntry] = {}
    twice: list[str] = []
    for name, entry in index.tensors.items():
        plain = wrapper.text_name(name)
        if not plain:
            rest[name] = entry
        elif plain in text:
            twice.append(name)
        else:
            text[plain] = replace(entry, name=plain)
    if twice:
        what = f"{len(twice)} tensor(s) of its text model are there under two names: {short_list(twice)}"
        raise unusable_checkpoint(label, what, "save the model again with save_pretrained, or download it again")
    if not text:
        what = (
            f"a {wrapper.title} checkpoint (model_type {wrapper.model_type}) without a text model: no tensor begins "
            f"with {' or '.join(wrapper.prefixes)}"
        )
        raise unusable_checkpoint(label, what, "use the checkpoint as published, or a text model saved by itself")
    plain_config = text_config(wrapper, config)
    if HEAD not in text:
        plain_config["tie_word_embeddings"] = True  # transformers has no other source for the head
    return Unwrapped(wrapper_config=config, config=plain_config, index=replace(index, tensors=text), rest=rest)


def parts_summary(rest: Mapping[str, TensorEntry]) -> str:
    """What the tensors outside the text part are, with their sizes: for messages. Empty if there are none."""
    sizes: dict[str, int] = {}
    for name, entry in rest.items():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + entry.nbytes
    return ", ".join(f"{part} ({human_bytes(size)})" for part, size in sizes.items())
