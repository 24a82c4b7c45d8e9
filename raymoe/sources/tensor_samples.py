"""Finds tensors that differ between two models, by samples. For reports only: no bytes depend on it."""

from __future__ import annotations

import os

from raymoe.errors import CheckpointError
from raymoe.sources.facts import CheckpointIndex, TensorEntry
from raymoe.sources.local_folder import open_file
from raymoe.tensor_names import layer_of

_SAMPLE_BYTES = 4096


def sampled_differences(one: CheckpointIndex, other: CheckpointIndex) -> frozenset[str]:
    """The names of tensors that differ in the middle.

    Only local files are sampled, and only tensors outside of layers and of the first layer: a few short reads. A tensor
    without a name in the result may still differ.
    """
    names = [name for name in one.tensors if not layer_of(name) and name in other.tensors]
    return frozenset(name for name in names if _differ(one.tensors[name], other.tensors[name]))


def _differ(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or (one.file, one.start) == (other.file, other.start):
        return False
    samples = [_sample(entry) for entry in (one, other)]
    return None not in samples and samples[0] != samples[1]


def middle_of(entry: TensorEntry) -> tuple[int, int]:
    """The range of a tensor's file that a sample is: up to 4 KiB from its middle."""
    start = entry.start + max(0, entry.nbytes // 2 - _SAMPLE_BYTES // 2)
    return start, min(start + _SAMPLE_BYTES, entry.end)


def _sample(entry: TensorEntry) -> bytes | None:
    """Bytes from the middle of a tensor; None if its file can't be read here."""
    if not entry.file.kind.is_local:
        return None
    start, end = middle_of(entry)
    try:
        descriptor = open_file(entry.file)
    except (CheckpointError, OSError):  # reported when the weights are read
        return None
    try:
        return os.pread(descriptor, end - start, start)
    except OSError:
        return None
    finally:
        os.close(descriptor)
