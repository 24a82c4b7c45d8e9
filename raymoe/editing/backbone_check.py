"""Whether the dense base model of an edit has the attention, norms and embeddings of the mixture that is edited."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.architectures import DenseSpec, read_spec
from raymoe.errors import Problem
from raymoe.formatting import short_list
from raymoe.object_store.location import LocationKind
from raymoe.sources.facts import ModelFacts, TensorEntry
from raymoe.sources.tensor_samples import middle_of
from raymoe.storage.source_reader import SourceReader


def backbone_problems(view: ModelFacts, base: ModelFacts, reader: SourceReader) -> Iterator[Problem]:
    """A problem if an edit would give the mixture another backbone than it has.

    Samples from the middle of tensors are compared: of those outside of layers, and of the first and the last layer.
    Tensors of another dtype or shape are not compared, since a merge may have cast or padded them; and none of a Hub
    repository, whose files would be downloaded whole.

    Args:
        view: An expert of the mixture, as a dense model.
        base: The dense base model of the edit.
        reader: Reads both.
    """
    spec = read_spec(view.config, view.label)
    if not isinstance(spec, DenseSpec):
        return
    are_permuted = view.mixture is not None and view.mixture.has_permuted_heads
    differing = []
    for row, layer, name in spec.tensors():
        own, other = view.index.tensors.get(name), base.index.tensors.get(name)
        if row.is_ffn or layer not in (None, 0, spec.layers - 1) or own is None or other is None:
            continue
        if are_permuted and row.role.startswith("attn."):
            continue
        if LocationKind.HUB in (own.file.kind, other.file.kind) or (own.dtype, own.shape) != (other.dtype, other.shape):
            continue
        if _sample(own, reader) != _sample(other, reader):
            differing.append(name)
    if differing:
        yield Problem(
            where=f"base_model ({base.label})",
            what=f"it has another backbone than {view.label}: {short_list(differing, most=2)}",
            remedy="give --keep-backbone, or --base-model PATH with the dense model that the mixture was made from",
        )


def _sample(entry: TensorEntry, reader: SourceReader) -> bytes:
    (content,) = reader.read_ranges(entry.file, [middle_of(entry)])
    return bytes(content)
