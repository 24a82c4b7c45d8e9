"""What each gate mode takes from an expert's prompts: one vector a layer, (layers, hidden) float32.

`hidden`      mean over prompts of a layer's input at the prompt's last token
`hidden_avg`  mean over prompts of the mean over the prompt's tokens of a layer's input; padding does not count
`cheap_embed` direction of the sum of the prompts' token embeddings, the same for every layer
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raymoe.config.modes import EMBEDDING, MODES
from raymoe.gates.embeddings import mean_embedding
from raymoe.gates.prompts import TOKEN_BUDGET, Batch, batches, load_tokenizer, tokenize
from raymoe.gates.router import gate_rows
from raymoe.planning.types import GatePlan, GatePrompts
from raymoe.storage.reader import SourceReader

__all__ = ["expert_rows"]

Float32 = npt.NDArray[np.float32]
LayerDone = Callable[[int], None]


def expert_rows(
    gates: GatePlan,
    prompts: GatePrompts,
    reader: SourceReader,
    *,
    device: str,
    trust_remote_code: bool = False,
    layer_done: LayerDone | None = None,
) -> Float32:
    """Router rows of one expert, (layers, hidden), from its prompts.

    `layer_done` is called with the number of prompt tokens that have passed a layer. Raises ProblemReport for prompts
    that can't be read (no tokens, tokens beyond the vocabulary).
    """
    with tempfile.TemporaryDirectory(prefix="raymoe-tokenizer-") as folder:
        for file in gates.tokenizer_files:
            target = Path(folder) / Path(file.location).name
            target.symlink_to(reader.path(file))
        tokenizer = load_tokenizer(Path(folder), trust_remote_code=trust_remote_code)
    vocab = prompts.weights[EMBEDDING].entry.shape[0]

    def vectors(texts: Sequence[str]) -> Float32:
        ids = tokenize(tokenizer, texts, vocab=vocab, owner=prompts.owner)
        if not MODES[gates.mode].reads_layers:
            row = mean_embedding(reader, prompts.weights[EMBEDDING], ids)
            return np.repeat(row[None], gates.layers, axis=0)
        return _hidden(gates, prompts, ids, reader, device, layer_done)

    negative = vectors(prompts.negative) if prompts.negative else None
    return gate_rows(vectors(prompts.positive), negative)


def _hidden(
    gates: GatePlan,
    prompts: GatePrompts,
    ids: Sequence[Sequence[int]],
    reader: SourceReader,
    device: str,
    layer_done: LayerDone | None,
) -> Float32:
    import torch

    from raymoe.gates.decoder import StreamedDecoder

    decoder = StreamedDecoder(prompts, reader, device, quantise=gates.quantise)
    groups = [Batch(group) for group in batches(ids, 1 if decoder.rope_depends_on_length else TOKEN_BUDGET)]
    sums = np.zeros((gates.layers, gates.hidden), dtype=np.float64)

    def visit(layer: int, number: int, hidden_BTH: torch.Tensor) -> None:
        lengths = groups[number].lengths.to(hidden_BTH.device)
        if gates.mode == "hidden":
            taken = hidden_BTH[torch.arange(len(lengths), device=hidden_BTH.device), lengths - 1].float()
        else:
            real = torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device)[None] < lengths[:, None]
            taken = (hidden_BTH.float() * real[..., None]).sum(dim=1) / lengths[:, None]
        sums[layer] += taken.cpu().numpy().astype(np.float64).sum(axis=0)
        if layer_done is not None and layer:
            layer_done(int(groups[number].lengths.sum()))

    decoder.layer_inputs(groups, gates.layers, visit)
    return (sums / len(ids)).astype(np.float32)
