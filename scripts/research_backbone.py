"""Which merged backbone is best: held-out loss if every token takes its own text's expert, for many ways of merging.

    python scripts/research_backbone.py measure --out a.json                     # the example experts
    python scripts/research_backbone.py measure --second-split --out b.json      # other prompts, other held-out texts
    python scripts/research_backbone.py measure --models 'Full fine-tunes' \\
        --experts .cache/example-experts/full --out c.json                       # train_example_experts.py train --full
    python scripts/research_backbone.py page a.json b.json c.json                # tables of docs/research/backbone.md

A model is the merged backbone with the FFNs of one expert, as a dense transformers model; it reads the held-out texts
of the expert's label. So no router is involved, and a way of merging takes seconds. The loss is the mean over labels of
the mean over tokens; the share in brackets is that of the way from the base's backbone to the experts themselves.
Merged tensors are rounded to bfloat16, as in an output.

With `b` a tensor of the base and `d_i = x_i - b` the experts' differences, a way gives the merged difference. The ways
that need data read the first 64 prompts of each expert with the expert itself:

- RegMean (Jin et al. 2023, https://arxiv.org/abs/2212.09849) takes the matrix whose outputs are closest to all experts'
  on their own inputs: `(sum_i x_i G_i) (sum_i G_i)^-1`, with G_i the inputs' second moments. Off-diagonal elements of
  G_i are multiplied by 0.9, as there. Its diagonal form weights each input dimension by its mean square.
- Fisher merging (Matena and Raffel 2022, https://arxiv.org/abs/2111.09832) weights each element by the mean square of
  the gradient of a prompt's loss.
- DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099) keeps a random share of the differences, divided by the share.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_routing import ADAPTERS, BASE, KINDS, ROOT, measured_on, raymoe_tokenizer, read_texts
from pages import put_between

PAGE, MARK = ROOT / "docs/research/backbone.md", "<!-- table: scripts/research_backbone.py -->"
GROUPS = ("attention", "norms", "embeddings")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
PROMPTS = 64
BATCH_TEXTS = 20

Weights = Mapping[str, torch.Tensor]
Statistics = Sequence[Weights]  # of each expert


# --- models


@dataclass(frozen=True, kw_only=True)
class Models:
    """The base's weights and the experts' differences to it, in float32; `net` is the module that computes them."""

    net: Any
    base: Weights
    changes: Sequence[Weights]

    @classmethod
    def load(cls, base: str, experts: Sequence[str], device: str) -> Models:
        net = dense_model(base).to(device).eval()
        weights = {name: value.detach().clone() for name, value in net.named_parameters()}
        changes = []
        for expert in experts:
            own = dict(dense_model(expert).to(device).named_parameters())
            changes.append({name: own[name].detach() - value for name, value in weights.items()})
        return cls(net=net, base=weights, changes=changes)

    @property
    def backbone(self) -> list[str]:
        return [name for name in self.base if ".mlp." not in name]

    def with_expert(self, merged: Weights, number: int, ffn_scale: float = 1.0) -> dict[str, torch.Tensor]:
        """All weights of a model: the merged backbone, and one expert's FFNs."""
        ffn = {
            name: rounded(value + ffn_scale * self.changes[number][name])
            for name, value in self.base.items()
            if ".mlp." in name
        }
        return {**merged, **ffn}

    def expert(self, number: int) -> dict[str, torch.Tensor]:
        return {name: rounded(value + self.changes[number][name]) for name, value in self.base.items()}

    def logits(self, weights: Weights, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        arguments = {"input_ids": ids, "attention_mask": mask}
        logits: torch.Tensor = torch.func.functional_call(self.net, dict(weights), (), arguments).logits
        return logits


def dense_model(model: str) -> Any:
    """A dense model, or `base+adapter` with the adapter added to the weights; values as they are saved, in float32."""
    from transformers import AutoModelForCausalLM

    base, _, adapter = model.partition("+")
    found: Any = AutoModelForCausalLM.from_pretrained(base).float()
    if adapter:
        from peft import PeftModel

        found = PeftModel.from_pretrained(found, adapter).float().merge_and_unload()
    return found


def rounded(value: torch.Tensor) -> torch.Tensor:
    return value.bfloat16().float()


def group_of(name: str) -> str:
    if "embed_tokens" in name or "lm_head" in name:
        return "embeddings"
    return "norms" if "norm" in name else "attention"


def layer_of(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


# --- losses


@dataclass(frozen=True, kw_only=True)
class Bench:
    """`texts` and `prompts` are token ids by expert."""

    models: Models
    texts: Sequence[Sequence[list[int]]]
    prompts: Sequence[Sequence[list[int]]]
    device: str

    def own_loss(self) -> float:
        return self._mean(self.models.expert)

    def loss(self, merged: Weights, ffn_scale: float = 1.0) -> float:
        """The loss with this backbone."""
        rounded_backbone = {name: rounded(value) for name, value in merged.items()}
        return self._mean(lambda number: self.models.with_expert(rounded_backbone, number, ffn_scale))

    def _mean(self, weights_of: Callable[[int], Weights]) -> float:
        losses = []
        for number, texts in enumerate(self.texts):
            weights = weights_of(number)
            parts = [self._token_losses(weights, batch) for batch in batches(texts, self.device)]
            losses.append(float(torch.cat(parts).double().mean()))
        return float(np.mean(losses))

    @torch.inference_mode()
    def _token_losses(self, weights: Weights, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, mask = batch
        logits = self.models.logits(weights, ids, mask)[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses[mask[:, 1:].flatten() > 0]


def batches(texts: Sequence[list[int]], device: str, size: int = BATCH_TEXTS) -> Iterator[tuple[torch.Tensor, ...]]:
    """(ids, mask) of a few texts at a time, padded on the right."""
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        ids = torch.zeros((len(part), max(map(len, part))), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(part):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        yield ids.to(device), mask.to(device)


# --- what prompts tell


class MomentSums:
    """Sums of `x x^T` over the inputs of the attention's matrices, at all tokens but the first of each text: that one
    is a sink of attention, with a huge norm. `mask` is that of the batch that is read."""

    def __init__(self, net: Any) -> None:
        self.sums: dict[str, Any] = {}
        self.mask = torch.zeros(0)
        modules = {name: module for name, module in net.named_modules() if name.endswith(MATRICES)}
        self._handles = [
            module.register_forward_pre_hook(partial(self._see, f"{name}.weight")) for name, module in modules.items()
        ]

    def _see(self, name: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0][:, 1:][self.mask[:, 1:] > 0]
        self.sums[name] = self.sums.get(name, 0) + (x.T @ x).double()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def second_moments(bench: Bench) -> Statistics:
    """For each matrix of attention, the mean of `x x^T` over its inputs."""
    found = []
    for number, prompts in enumerate(bench.prompts):
        watch = MomentSums(bench.models.net)
        weights, tokens = bench.models.expert(number), sum(len(ids) - 1 for ids in prompts)
        for ids, watch.mask in batches(prompts, bench.device):
            bench.models.logits(weights, ids, watch.mask)
        watch.remove()
        found.append({name: total / tokens for name, total in watch.sums.items()})
    return found


def fishers(bench: Bench) -> Statistics:
    """The mean square of the gradient of a prompt's loss, by element of the backbone."""
    found = []
    for number, prompts in enumerate(bench.prompts):
        weights = bench.models.expert(number)
        for name in bench.models.backbone:
            weights[name].requires_grad_()
        sums = {name: torch.zeros_like(weights[name]) for name in bench.models.backbone}
        for ids, mask in batches(prompts, bench.device, 1):
            logits = bench.models.logits(weights, ids, mask)[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            for name, gradient in zip(sums, torch.autograd.grad(loss, [weights[n] for n in sums]), strict=True):
                sums[name] += gradient**2
        found.append({name: total / len(prompts) for name, total in sums.items()})
    return found


# --- ways: merged differences of one tensor, from its name and the experts' differences


Way = Callable[[str, Sequence[torch.Tensor]], torch.Tensor]


def mean(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(changes)).mean(0)


def weighted(weights: torch.Tensor, changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean with weights (experts, ...) that may differ by element; equal ones where all are zero."""
    weights = weights + 1e-30
    return (weights * torch.stack(list(changes))).sum(0) / weights.sum(0)


def scaled(scale: float, way: Way = mean) -> Way:
    return lambda name, changes: scale * way(name, changes)


def including(*groups: str) -> Way:
    return lambda name, changes: mean(name, changes) * (group_of(name) in groups)


def ties(density: float, scale: float = 1.0) -> Way:
    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        trimmed = []
        for change in changes:
            kept = max(1, int(density * change.numel()))
            least = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
            trimmed.append(change * (change.abs() >= least))
        stacked = torch.stack(trimmed)
        agreeing = stacked * (torch.sign(stacked) == torch.where(stacked.sum(0) < 0, -1.0, 1.0))
        return scale * agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)

    return merge


def dare(density: float) -> Way:
    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        generator = torch.Generator(changes[0].device).manual_seed(sum(map(ord, name)))
        drawn = [torch.rand(c.shape, generator=generator, device=c.device) < density for c in changes]
        return mean(name, [change * kept / density for change, kept in zip(changes, drawn, strict=True)])

    return merge


def scale_by_layer(first: float, last: float, layers: int) -> Way:
    """The factor goes from `first` to `last` over the layers; tensors outside layers have factor 1."""

    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        layer = layer_of(name)
        factor = 1.0 if layer is None else first + (last - first) * layer / (layers - 1)
        return factor * mean(name, changes)

    return merge


def half_of_layers(layers: int, is_upper: bool) -> Way:
    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        layer = layer_of(name)
        return mean(name, changes) * (layer is None or (layer >= layers // 2) == is_upper)

    return merge


def by_norm(power: float) -> Way:
    """Weights per tensor, from how much each expert changed it."""

    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        norms = torch.stack([change.norm() for change in changes]) ** power if any(map(torch.any, changes)) else None
        return mean(name, changes) if norms is None else weighted(norms.view(-1, *[1] * changes[0].dim()), changes)

    return merge


def by_head(power: float, head_dim: int) -> Way:
    """Weights per head, from how much each expert changed it. A large `power` takes the most changed head."""

    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        if group_of(name) != "attention":
            return mean(name, changes)
        is_output = "o_proj" in name  # its columns are heads
        heads = torch.stack([(c.T if is_output else c).reshape(-1, head_dim, c.shape[not is_output]) for c in changes])
        norms = heads.norm(dim=(2, 3), keepdim=True)
        merged = weighted((norms / norms.amax(0)) ** power, heads).flatten(0, 1)
        return merged.T if is_output else merged

    return merge


def regmean(moments: Statistics, off_diagonal: float, others: Way = mean) -> Way:
    """`others` is the way of tensors that are no matrices of attention."""

    def merge(name: str, changes: Sequence[torch.Tensor]) -> torch.Tensor:
        if name not in moments[0]:
            return others(name, changes)
        grams = [off_diagonal * each[name] + (1 - off_diagonal) * torch.diag(each[name].diag()) for each in moments]
        summed = sum(c.double() @ gram for c, gram in zip(changes, grams, strict=True))
        return torch.linalg.solve(sum(grams), summed, left=False).float()

    return merge


def by_fisher(fisher: Statistics, power: float = 1.0) -> Way:
    return lambda name, changes: weighted(torch.stack([each[name] for each in fisher]) ** power, changes)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`title` is the table's; the FFNs' differences to the base are multiplied by `ffn_scale`."""

    title: str
    way: Way
    ffn_scale: float = 1.0


def trials(layers: int, head_dim: int, moments: Statistics, fisher: Statistics) -> Iterator[Trial]:
    yield Trial(title="`linear`", way=mean)
    yield Trial(title="`linear`, attention only", way=including("attention"))
    yield Trial(title="`linear`, attention and norms", way=including("attention", "norms"))
    yield Trial(title="`linear`, norms and embeddings", way=including("norms", "embeddings"))
    for scale in (0.5, 1.25, 1.5, 2.0, 4.0):
        yield Trial(title=f"`linear`, scale {scale:g}", way=scaled(scale))
    for density in (0.1, 0.2, 0.5, 1.0):
        yield Trial(title=f"`ties`, density {density:g}", way=ties(density))
    yield Trial(title="`ties`, density 0.2, scale 0.5", way=ties(0.2, 0.5))
    yield Trial(title="`ties`, density 0.2, scale 1.5", way=ties(0.2, 1.5))
    for density in (0.5, 0.2):
        yield Trial(title=f"DARE, density {density:g}", way=dare(density))
    yield Trial(title="scale by layer, 0.5 to 1.5", way=scale_by_layer(0.5, 1.5, layers))
    yield Trial(title="scale by layer, 1.5 to 0.5", way=scale_by_layer(1.5, 0.5, layers))
    yield Trial(title="lower half of the layers only", way=half_of_layers(layers, False))
    yield Trial(title="upper half of the layers only", way=half_of_layers(layers, True))
    yield Trial(title="weights per tensor: norm of the difference", way=by_norm(1.0))
    yield Trial(title="weights per tensor: 1 / norm", way=by_norm(-1.0))
    yield Trial(title="weights per head: norm of the difference", way=by_head(1.0, head_dim))
    yield Trial(title="weights per head: the most changed head", way=by_head(64.0, head_dim))
    yield Trial(title="Fisher", way=by_fisher(fisher))
    yield Trial(title="Fisher, square root", way=by_fisher(fisher, 0.5))
    yield Trial(title="RegMean", way=regmean(moments, 0.9))
    yield Trial(title="RegMean, diagonal", way=regmean(moments, 0.0))
    yield Trial(title="RegMean, scale 1.25", way=scaled(1.25, regmean(moments, 0.9)))
    yield Trial(title="RegMean, off-diagonals as they are", way=regmean(moments, 1.0))
    yield Trial(title="RegMean, Fisher for norms and embeddings", way=regmean(moments, 0.9, by_fisher(fisher)))
    yield Trial(title="RegMean, FFN differences times 1.1", way=regmean(moments, 0.9), ffn_scale=1.1)
    for scale in (0.8, 0.9, 1.1, 1.25):
        yield Trial(title=f"`linear`, FFN differences times {scale:g}", way=mean, ffn_scale=scale)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.counts = [str(arguments.prompts_per_expert)]
    counts, held_out = read_texts(arguments, KINDS)
    tokenizer = raymoe_tokenizer(BASE)
    encoded = [
        [[tokenizer(text)["input_ids"] for text in texts[kind]] for kind in KINDS]
        for texts in (held_out, next(iter(counts.values())))
    ]
    models = Models.load(BASE, [f"{arguments.experts}/{kind}" for kind in KINDS], device)
    bench = Bench(models=models, texts=encoded[0], prompts=encoded[1], device=device)
    config = models.net.config
    head_dim = config.hidden_size // config.num_attention_heads
    result: dict[str, Any] = {
        "models": arguments.models,
        "split": "second" if arguments.second_split else "first",
        "held_out_tokens": sum(len(ids) - 1 for texts in bench.texts for ids in texts),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "own": bench.own_loss(),
        "base": bench.loss({name: models.base[name] for name in models.backbone}),
        "trials": {},
    }
    for trial in trials(config.num_hidden_layers, head_dim, second_moments(bench), fishers(bench)):
        if not re.search(arguments.only, trial.title):
            continue
        began = time.monotonic()
        merged = {n: models.base[n] + trial.way(n, [c[n] for c in models.changes]) for n in models.backbone}
        result["trials"][trial.title] = bench.loss(merged, trial.ffn_scale)
        Path(arguments.out).write_text(json.dumps(result, indent=1))
        seconds = time.monotonic() - began
        print(f"{trial.title}: {result['trials'][trial.title]:.4f} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    return result


# --- the page


def table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{number}. {measured_on(result)}." for number, result in enumerate(results, 1)]
    lines += ["", "| backbone |" + "".join(f" {number} |" for number in range(1, len(results) + 1))]
    lines += ["|---|" + "---:|" * len(results)]
    lines.append("| the base's |" + "".join(f" {result['base']:.3f} |" for result in results))
    for title in results[0]["trials"]:
        cells = []
        for result in results:
            loss = result["trials"][title]
            cells.append(f"{loss:.3f} ({(result['base'] - loss) / (result['base'] - result['own']):.0%})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append("| each expert's own |" + "".join(f" {result['own']:.3f} |" for result in results))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure", help="losses of all ways")
    run.add_argument("--models", default="", help="what the experts are, for the table")
    run.add_argument("--experts", default=ADAPTERS, help="folder with an expert for each kind of example text")
    run.add_argument("--second-split", action="store_true", help="hold out the first 40 prompts, use the others")
    run.add_argument("--prompts-per-expert", type=int, default=PROMPTS, help="for RegMean and Fisher")
    run.add_argument("--only", default="", metavar="REGEX", help="only the ways with such a title")
    run.add_argument("--limit", type=int, default=0, help="held-out texts per label (0: all)")
    run.add_argument("--out", required=True, help="JSON of the results")
    run.set_defaults(prompts=[], heldout="examples/heldout.jsonl", keywords="")
    page = commands.add_parser("page", help="results as markdown, into docs/research/backbone.md")
    page.add_argument("results", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "page":
        put_between(PAGE, MARK, "\n" + table([json.loads(Path(p).read_text()) for p in arguments.results]) + "\n")
        return
    print(table([measure(arguments)]))


if __name__ == "__main__":
    main()
