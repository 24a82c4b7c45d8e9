"""Trains a tiny model, upcycles it in several ways, and trains each start for as many steps: the table of
docs/upcycling.md.

    dense       a Qwen3 of 0.4 million parameters, trained byte by byte on examples/prompts: Go code, formal
                mathematics, Spanish prose and dictionary entries
    copies      4 copies of its FFN in each layer, 2 for each byte (sparse upcycling)
    odd         the same in odd layers only (moe_layers: odd)
    fine        each copy is cut into 4 experts (granularity: 4)
    reinit      half of each copy's channels are drawn anew (reinit: 0.5)

Losses are those of examples/heldout.jsonl. Every start sees the same batches in the same order, with the same learning
rates, by plain transformers and PyTorch. All that is random has a seed. `--only` trains one start. A model that is in
the folder already is not made again.

    python scripts/train_upcycled.py out/upcycling [--only dense] [--table]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
WINDOW, BATCH = 128, 16
BASE_STEPS, STEPS, WARMUP, EVERY = 300, 150, 20, 50
BASE_RATE, RATE = 3e-3, 1e-3
# The weight of the loss that spreads tokens over experts (Switch Transformer's, as transformers computes it).
BALANCE = 0.01
SIZES = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
STARTS: dict[str, dict[str, Any]] = {
    "copies": {},
    "odd": {"moe_layers": "odd"},
    "fine": {"granularity": 4},
    "reinit": {"reinit": 0.5},
}
COPIES, PER_TOKEN = 4, 2


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """(windows to train on, windows of held-out texts), as bytes."""
    prompts = sorted((REPOSITORY / "examples" / "prompts").glob("*.jsonl"))
    return windows_of(prompts), windows_of([REPOSITORY / "examples" / "heldout.jsonl"])[::6]


def windows_of(files: list[Path]) -> torch.Tensor:
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    data = "\n\n".join(json.loads(line)["text"] for line in lines).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()[: len(data) // WINDOW * WINDOW].view(-1, WINDOW)


def batches(windows: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (BATCH,), generator=generator)]


@torch.inference_mode()
def held_out_loss(model: Any, windows: torch.Tensor) -> float:
    """Cross-entropy in nats per byte, without the loss that spreads tokens."""
    model.eval()
    losses = []
    for batch in windows.split(32):
        logits = model(batch).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    model.train()
    return sum(losses) / len(losses)


def train(model: Any, steps: int, rate: float, seed: int, name: str) -> dict[str, Any]:
    """AdamW with a warm-up and a cosine to a tenth of `rate`. Returns the held-out losses by step."""
    windows, held_out = texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses, used = {0: held_out_loss(model, held_out)}, 0.0
    print(f"{name:8} step {0:4}  held-out loss {losses[0]:.3f}", flush=True)
    for step, batch in enumerate(batches(windows, steps, seed), 1):
        progress = min(1.0, step / steps)
        scale = min(1.0, step / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        began = time.perf_counter()
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        used += time.perf_counter() - began
        if step % EVERY == 0 or step == steps:
            losses[step] = held_out_loss(model, held_out)
            print(f"{name:8} step {step:4}  held-out loss {losses[step]:.3f}", flush=True)
    return {"losses": losses, "seconds_per_step": used / steps}


def make_base(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    train(model, BASE_STEPS, BASE_RATE, 1, "base")
    model.save_pretrained(folder)


def make_start(base: Path, folder: Path, keys: dict[str, Any]) -> None:
    import raymoe

    raymoe.merge(
        out=folder,
        base_model=str(base),
        experts=[{"source_model": str(base)}] * COPIES,
        gate_mode="uniform_random",
        experts_per_token=PER_TOKEN,
        **keys,
    )


def run(name: str, out: Path) -> None:
    """Make a start, unless it is there, train it, and write its losses to a file."""
    from transformers import AutoModelForCausalLM

    base, folder = out / "base", out / name
    if not (base / "config.json").is_file():
        make_base(base)
    if name != "dense" and not (folder / "raymoe.json").is_file():
        make_start(base, folder, STARTS[name])
    options = {} if name == "dense" else {"output_router_logits": True, "router_aux_loss_coef": BALANCE}
    model = AutoModelForCausalLM.from_pretrained(base if name == "dense" else folder, **options)
    torch.manual_seed(0)
    found = train(model, STEPS, RATE, 2, name)
    total = sum(parameter.numel() for parameter in model.parameters())
    (out / f"{name}.json").write_text(json.dumps({**found, "parameters": total}))


def table(out: Path) -> Iterator[str]:
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("dense", *STARTS)}
    steps = list(found["dense"]["losses"])
    yield "| start | parameters | " + " | ".join(f"step {step}" for step in steps) + " | seconds per step |"
    yield "|---|---:|" + "---:|" * len(steps) + "---:|"
    for name, each in found.items():
        losses = " | ".join(f"{each['losses'][step]:.3f}" for step in steps)
        yield f"| `{name}` | {each['parameters'] / 1e6:.2f} M | {losses} | {each['seconds_per_step']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=["base", "dense", *STARTS])
    parser.add_argument("--table", action="store_true", help="print the table of what was trained, and train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table(arguments.out)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only == "base":
        make_base(arguments.out / "base")
        return
    for name in [arguments.only] if arguments.only else ["dense", *STARTS]:
        run(name, arguments.out)
    if not arguments.only:
        print("\n".join(table(arguments.out)))


if __name__ == "__main__":
    main()
