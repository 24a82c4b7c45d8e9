"""Router rows as plain transformers code gives them: one prompt at a time, no padding, the whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import raymoe
from raymoe.planning import MergePlan
from raymoe.routers.in_process import compute_routers_locally
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader

Array = npt.NDArray[Any]


def computed_rows(config: Mapping[str, Any]) -> list[Array]:
    """What raymoe makes of a config: (layers, hidden) for each expert."""
    return rows_of_plan(raymoe.plan(config, allow_all_same=True))


def rows_of_plan(plan: MergePlan) -> list[Array]:
    with SourceReader(HubOptions()) as reader:
        rows, _ = compute_routers_locally(plan.gates, reader, device="cpu")
    return [rows[prompts.owner] for prompts in plan.gates.experts]


def direct_rows(
    model: Any, tokenizer_folder: Path, mode: str, positive: Sequence[str], negative: Sequence[str] = ()
) -> Array:
    """(layers, hidden) of unit length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    mean = _mean_state(model, tokenizer, mode, positive)
    if negative:
        mean = mean - _mean_state(model, tokenizer, mode, negative)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@torch.inference_mode()
def _mean_state(model: Any, tokenizer: Any, mode: str, prompts: Sequence[str]) -> Array:
    layers = model.config.num_hidden_layers
    states = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if tokenizer.bos_token_id is not None and ids[0, 0] != tokenizer.bos_token_id:
            ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
        # Dynamic RoPE remembers the longest sequence it has seen; each prompt is to be read as if it were the first.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        inputs_LTH = torch.stack(model(ids, output_hidden_states=True).hidden_states[:layers])[:, 0].double()
        states.append(inputs_LTH[:, -1] if mode == "hidden" else inputs_LTH.mean(dim=1))
    mean: Array = torch.stack(states).mean(dim=0).numpy()
    return mean
