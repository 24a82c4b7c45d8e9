"""Reads rows of the embedding by offset, and computes routers from them alone. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymoe.gate_modes import MODES
from raymoe.planning.plan import GatePlan, GatePrompts, WeightRef
from raymoe.routers.tokenize import prompt_ids
from raymoe.storage.combine import weight_rows
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES, with_lora
from raymoe.tensor_names import EMBEDDING

Float32 = npt.NDArray[np.float32]


def embedding_rows(reader: SourceReader, ref: WeightRef, ids: Sequence[int]) -> dict[int, Float32]:
    """The embedding row (hidden,) of each token id, read by offset."""
    width = ref.entry.nbytes // ref.entry.shape[0]
    tokens = sorted(set(ids))
    if ref.combined is not None:
        return dict(zip(tokens, weight_rows(reader, ref, np.array(tokens)), strict=True))
    ranges = [(ref.entry.start + token * width, ref.entry.start + (token + 1) * width) for token in tokens]
    rows = {}
    for token, content in zip(tokens, reader.read_ranges(ref.entry.file, ranges), strict=True):
        row = np.frombuffer(content, dtype=NUMPY_DTYPES[ref.entry.dtype]).astype(np.float32)
        if ref.lora is not None:
            row = with_lora(reader, row[None], ref.lora, slice(token, token + 1))[0]
        rows[token] = row
    return rows


def embedding_router_row(
    gates: GatePlan, prompts: GatePrompts, reader: SourceReader, *, trust_remote_code: bool
) -> Float32:
    """The router row (hidden,) of one expert, the same for every layer. Raises ProblemReport for bad prompts."""
    positive, negative, _ = prompt_ids(gates, prompts, reader, trust_remote_code=trust_remote_code)
    ref = prompts.weights[EMBEDDING]
    return MODES[gates.mode].embedding_row(positive, negative, lambda ids: embedding_rows(reader, ref, ids))
