"""Decides whether a checkpoint has a separate output head, even if its config.json ties the head to the embedding.

transformers 5 compares the two tensors when it loads such a checkpoint, and ties them only if they are equal
(`PreTrainedModel.tie_weights`); transformers 4 always ties them. The header does not show it, so this is the only place
where planning reads weights: first a few blocks, since a trained head differs nearly everywhere, then all of both
tensors, since a head may differ in the rows of a few tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raymoe.sources.facts import CheckpointIndex, TensorEntry
from raymoe.sources.folder_protocol import Folder
from raymoe.tensor_names import EMBEDDING, HEAD

_SAMPLES = 8
_SAMPLE_BYTES = 64 * 1024
_BLOCK_BYTES = 4 * 1024 * 1024
_BLOCKS_AT_ONCE = 4  # two reads each: 32 MiB of memory


def has_own_head(folder: Folder, config: Mapping[str, Any], index: CheckpointIndex) -> bool:
    """True if the checkpoint holds a head and an embedding that differ. False, without reading the weights, if
    config.json says that they are not tied. Raises CheckpointError if they can't be read."""
    head, embedding = index.tensors.get(HEAD), index.tensors.get(EMBEDDING)
    # `tie_embedding` is LFM2's older name of the key, and has priority over the usual one.
    if head is None or embedding is None or config.get("tie_embedding", config.get("tie_word_embeddings")) is False:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    if (head.file, head.start) == (embedding.file, embedding.start):
        return False  # a .bin file may list one storage under two names
    return _differ(folder, head, embedding)


def _differ(folder: Folder, left: TensorEntry, right: TensorEntry) -> bool:
    def differs(block: tuple[int, int]) -> bool:
        a, b = (
            folder.read_range(entry.file, entry.start + block[0], entry.start + block[1]) for entry in (left, right)
        )
        return a != b

    with ThreadPoolExecutor(max_workers=_BLOCKS_AT_ONCE) as pool:
        for blocks in (_sampled(left.nbytes), _all_blocks(left.nbytes)):
            if any(pool.map(differs, blocks)):
                pool.shutdown(wait=False, cancel_futures=True)
                return True
    return False


def _sampled(size: int) -> Iterator[tuple[int, int]]:
    """Short blocks from the first bytes to the last."""
    last = max(0, size - _SAMPLE_BYTES)
    for start in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
        yield start, min(size, start + _SAMPLE_BYTES)


def _all_blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _BLOCK_BYTES):
        yield start, min(size, start + _BLOCK_BYTES)
