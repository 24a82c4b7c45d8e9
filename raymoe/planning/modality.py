"""What a mixture reads: text alone, or images too if its base does.

A mixture of image-text models keeps the base's encoder and projector byte for byte, and its text part is the mixture
that is written otherwise, under the names of the wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raymoe.architectures import MoeArchitecture, find_moe_architecture
from raymoe.architectures.wrappers import MIXTURE_WRAPPERS, Wrapper, find_wrapper, mixture_wrapper
from raymoe.config.schema import Modality
from raymoe.errors import Problem
from raymoe.planning.owner import BASE
from raymoe.planning.plan import Copy
from raymoe.planning.shard_packing import OutputTensor
from raymoe.sources.facts import ModelFacts


def choose_wrapper(
    modality: Modality | None, base: ModelFacts, architecture: MoeArchitecture | None
) -> tuple[Wrapper | None, list[Problem]]:
    """The wrapper of the output, None for a text model; and why `modality: image-text` is not possible.

    A config without `modality` gets an image-text model wherever transformers has one. `in_wrapper` gives the form that
    the architecture has there.
    """
    wrapper = mixture_wrapper(base.wrapper_config, architecture.model_type) if architecture else None
    if modality == "text" or architecture is None:
        return None, []
    if modality is None or wrapper is not None:
        return wrapper, []
    of_base = find_wrapper(base.wrapper_config)
    if of_base is None:
        what = f"image-text, but base_model ({base.label}) reads text only"
        remedy = "use an image-text model as base_model, or modality: text"
    else:
        what = f"image-text, but {architecture.title} has no form with the encoder of {of_base.title}"
        known = ", ".join(mixture.title for mixture in MIXTURE_WRAPPERS.values())
        remedy = f"use modality: text, which leaves the encoder out (image-text mixtures: {known})"
    return None, [Problem(where="modality", what=what, remedy=remedy)]


def in_wrapper(architecture: MoeArchitecture, wrapper: Wrapper | None) -> MoeArchitecture:
    """The form that a MoE architecture has in a wrapper: often its own."""
    if wrapper is None:
        return architecture
    return find_moe_architecture({"model_type": wrapper.text_type}) or architecture


def wrap_tensors(tensors: Sequence[OutputTensor], wrapper: Wrapper, base: ModelFacts) -> list[OutputTensor]:
    """A mixture's tensors under the names of an image-text model, and all that its base has beside the text model."""
    wrapped = [_renamed(tensor, wrapper) for tensor in tensors]
    for name, entry in base.rest.items():
        copy = Copy(source=entry)
        wrapped.append(OutputTensor(name=name, dtype=entry.dtype, shape=entry.shape, owner=BASE, what=copy))
    return wrapped


def _renamed(tensor: OutputTensor, wrapper: Wrapper) -> OutputTensor:
    if not isinstance(tensor.what, tuple):
        return replace(tensor, name=wrapper.wrapped_name(tensor.name))
    pieces = tuple(replace(piece, name=wrapper.wrapped_name(piece.name)) for piece in tensor.what)
    return replace(tensor, name=wrapper.wrapped_name(tensor.name), what=pieces)
