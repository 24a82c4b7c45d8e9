"""Shows what a merged model does with held-out prompts: which expert its routers choose, and what it writes.

    python scripts/demo.py out/demo

Loads the checkpoint with plain transformers, as any user would. An expert is counted as chosen for a token in a layer
where its router score is the highest; a prompt goes to the expert that is chosen most often over its tokens and layers.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from raymoe.checkpoints.merge_record import read_record
from raymoe.checkpoints.open_checkpoint import open_checkpoint
from raymoe.object_store.options import StorageOptions

ROOT = Path(__file__).resolve().parent.parent
ROUTER_NAMES = ("block_sparse_moe.gate", "mlp.gate")


def expert_names(folder: Path) -> list[str]:
    """Short names of the experts, from the record of the merge."""
    record = read_record(open_checkpoint(folder, StorageOptions()))
    return [Path(source.model).name for source in record.sources if source.is_expert]


def held_out(path: Path, per_label: int) -> list[tuple[str, str]]:
    """(label, text) pairs, the first `per_label` texts of each label."""
    seen: Counter[str] = Counter()
    chosen = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        seen[row["label"]] += 1
        if seen[row["label"]] <= per_label:
            chosen.append((row["label"], row["text"]))
    return chosen


def first_choices(model: Any, tokenizer: Any, text: str) -> Counter[int]:
    """How often each expert has the highest router score, over all tokens (without BOS) and layers."""
    counts: Counter[int] = Counter()

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        scores = torch.nn.functional.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight)
        counts.update(scores[1:].argmax(dim=-1).tolist())

    routers = [module for name, module in model.named_modules() if name.endswith(ROUTER_NAMES)]
    hooks = [router.register_forward_hook(count) for router in routers]
    try:
        ids = tokenizer((tokenizer.bos_token or "") + text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            model(**ids)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def show_routing(console: Console, model: Any, tokenizer: Any, names: list[str], texts: list[tuple[str, str]]) -> int:
    """Print a row a prompt; the number of prompts that went to the expert of their kind."""
    table = Table("kind", "held-out prompt", "routed to", "share of first choices", box=None, pad_edge=False)
    right = 0
    for label, text in texts:
        counts = first_choices(model, tokenizer, text)
        winner = max(range(len(names)), key=lambda expert: counts[expert])
        if names[winner] == label:
            right += 1
        shares = "  ".join(f"{name} {counts[n] / counts.total():.0%}" for n, name in enumerate(names))
        mark = "[green]" if names[winner] == label else "[red]"
        excerpt = " ".join(text.split())[:44].replace("[", "\\[")
        table.add_row(label, excerpt, f"{mark}{names[winner]}[/]", shares)
    console.print(table)
    console.print(f"{right} of {len(texts)} held-out prompts went to the expert of their kind.\n")
    return right


def generate(console: Console, model: Any, tokenizer: Any, question: str) -> None:
    """A short greedy answer to a chat question."""
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    console.print(f"[bold]{question}[/bold]\n{answer.strip()}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the merged model")
    parser.add_argument("--heldout", type=Path, default=ROOT / "examples/heldout.jsonl")
    parser.add_argument("--per-kind", type=int, default=4, help="held-out prompts a kind")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    console = Console(width=150)
    texts = held_out(arguments.heldout, arguments.per_kind)
    show_routing(console, model, tokenizer, expert_names(arguments.model), texts)
    generate(console, model, tokenizer, "What does a dictionary tell you about a word?")


if __name__ == "__main__":
    main()
