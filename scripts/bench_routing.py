"""How well each gate mode routes, and what each backbone adds: loss on held-out text, by mode and number of prompts.

    python scripts/bench_routing.py routers --out routing.json          # the example experts
    python scripts/bench_routing.py routers --second-split --out b.json # other prompts, other held-out texts
    python scripts/bench_routing.py routers --base org/base --expert law=org/law --expert code=org/code \\
        --prompts law=law.jsonl --prompts code=code.jsonl --heldout heldout.jsonl --out mine.json
    python scripts/bench_routing.py backbones --out backbones.json      # backbones against the experts themselves
    python scripts/bench_routing.py backbones --backbones base '{method: linear, include: [attention]}' \\
        --modes hidden ridge --counts 16 --tops 2 --limit 10 --out mine.json
    python scripts/bench_routing.py solve --out solve.json              # time to fit the routers of a 7B shape
    python scripts/bench_routing.py table routing.json b.json solve.json  # markdown, into the docs

    python scripts/train_example_experts.py train --full --jobs 4       # other experts for the same kinds of text
    python scripts/bench_routing.py backbones --models 'Full fine-tunes' \\
        --experts .cache/example-experts/full --out full.json

`routers` merges once, and puts each mode's rows into the same weights: `raymoe eval`'s engine, so that one pass over
the layers serves all of them. A loss is the mean over labels of the mean over their held-out tokens, in nats. `closed`
is the share of the way from `hidden` with the same prompts to the oracle, which always takes the text's own expert.

`backbones` merges once per backbone. There the way starts at `hidden` on the base's backbone, and ends at the experts
themselves: each reads the text of its own label as the dense model that it is, with its own attention. A run that is
stopped leaves the backbones that it has measured; the same command goes on with the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pages import put_between

import raymoe
from raymoe.checkpoints.weight_table import dense_model, mixture_model
from raymoe.config.model_refs import parse_model_ref
from raymoe.evaluation.scoring import Variant, log_likelihoods
from raymoe.planning.plan import MergePlan, Router
from raymoe.routers.backbone_in_process import merged_locally
from raymoe.routers.in_process import compute_routers_locally
from raymoe.routers.router_matrices import router_bytes, router_rows
from raymoe.sources.hub import HubOptions
from raymoe.sources.resolve import resolve_model
from raymoe.storage.file_names import INDEX_NAME
from raymoe.storage.shard_stream import shard_chunks
from raymoe.storage.source_reader import SourceReader

ROOT = Path(__file__).resolve().parent.parent
BASE, KINDS = "models/SmolLM2-135M-Instruct", ("go", "metamath", "spanish", "dictionary")
ADAPTERS = f"{BASE}+examples/adapters"
MODES = ("random", "uniform_random", "cheap_embed", "hidden", "hidden_avg", "ridge")
COUNTS = ("keywords", "16", "64", "256")
# As configs write them.
BACKBONES = ("base", "linear", "{method: linear, scale: 1.5}", "{method: ties, density: 0.2}")
PAGE, MARK = ROOT / "docs/research/routing.md", "<!-- tables: scripts/bench_routing.py -->"
BACKBONE_PAGE, BACKBONE_MARK = ROOT / "docs/research/backbone.md", "<!-- backbones: scripts/bench_routing.py -->"
SUMMARY_PAGE, SUMMARY_MARK = ROOT / "docs/routing.md", "<!-- backbones in short: scripts/bench_routing.py -->"
# Mistral-7B: what four experts with a base of their own have to be read for a merge.
SHAPE_7B = {"layers": 32, "hidden": 4096, "experts": 4, "tokens": 16_000, "ffn": 3 * 4096 * 14336, "rest": 41_943_040}


# --- the texts


def pairs(values: Sequence[str], what: str) -> dict[str, str]:
    found = dict(value.partition("=")[::2] for value in values)
    if not all(found.values()):
        sys.exit(f"error: {what} is written label=value")
    return found


def jsonl(path: Path, field: str = "text") -> list[str]:
    return [json.loads(line)[field] for line in path.read_text().splitlines() if line.strip()]


def read_texts(arguments: argparse.Namespace, labels: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Prompts by number of prompts and label, and held-out texts by label."""
    files = pairs(arguments.prompts, "--prompts") or {kind: f"examples/prompts/{kind}.jsonl" for kind in labels}
    prompts = {label: jsonl(Path(files[label])) for label in labels}
    held_out: dict[str, list[str]] = {label: [] for label in labels}
    for line in Path(arguments.heldout).read_text().splitlines():
        row = json.loads(line)
        if row["label"] in held_out:
            held_out[row["label"]].append(row["text"])
    if arguments.second_split:
        held_out = {label: texts[:40] for label, texts in prompts.items()}
        prompts = {label: texts[:39:-1] for label, texts in prompts.items()}
    if arguments.limit:
        held_out = {label: texts[: arguments.limit] for label, texts in held_out.items()}
    counts: dict[str, Any] = {}
    for count in arguments.counts:
        if count == "keywords":
            counts[count] = json.loads(Path(arguments.keywords).read_text())
        elif min(map(len, prompts.values())) >= int(count):
            counts[count] = {label: texts[: int(count)] for label, texts in prompts.items()}
    return counts, held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What is merged and read: `texts` are (number of the label, token ids), `counts` is as `read_texts` gives it."""

    base: str
    experts: Mapping[str, str]
    counts: Mapping[str, Any]
    texts: Sequence[tuple[int, list[int]]]
    device: str

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Bench:
        experts = pairs(arguments.expert, "--expert") or {kind: f"{arguments.experts}/{kind}" for kind in KINDS}
        counts, held_out = read_texts(arguments, list(experts))
        tokenizer = raymoe_tokenizer(arguments.base)
        texts = [
            (number, tokenizer(text)["input_ids"]) for number, label in enumerate(experts) for text in held_out[label]
        ]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(base=arguments.base, experts=experts, counts=counts, texts=texts, device=device)

    @property
    def oracle(self) -> Variant:
        return Variant(name="oracle", forced=[number for number, _ in self.texts])

    def facts(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """What results say of the texts and the device."""
        return {
            "models": arguments.models,
            "experts": list(self.experts),
            "split": "second" if arguments.second_split else "first",
            "held_out_tokens": sum(len(ids) - 1 for _, ids in self.texts),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "CPU",
        }


# --- routers


def config_of(bench: Bench, mode: str, prompts: Mapping[str, Any], backbone: Any = "base") -> Any:
    entries = [{"source_model": model, "positive_prompts": prompts[label]} for label, model in bench.experts.items()]
    config = {"base_model": bench.base, "gate_mode": mode, "dtype": "bfloat16", "experts": entries}
    return config | {"backbone": backbone}


def write_merge(plan: MergePlan, folder: Path, device: str) -> None:
    """The merge's files that hold weights and config, with routers of zeros."""
    with SourceReader(HubOptions()) as reader, merged_locally(plan.moments, reader, device=device):
        rows = {p.owner: np.zeros((plan.gates.layers, plan.gates.hidden), np.float32) for p in plan.gates.experts}
        for shard in plan.shards:
            with open(folder / shard.file_name, "wb") as file:
                for chunk in shard_chunks(shard, reader, router_bytes(plan.gates, rows)):
                    file.write(chunk)
    (folder / "config.json").write_text(json.dumps(plan.config))
    (folder / INDEX_NAME).write_text(json.dumps(plan.index))


def rows_of(plan: MergePlan, device: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(layers, experts, hidden), rounded to bfloat16 as in a checkpoint."""
    with SourceReader(HubOptions()) as reader, merged_locally(plan.moments, reader, device=device):
        rows, _ = compute_routers_locally(plan.gates, reader, device=device)
    stacked = np.stack([router_rows(plan.gates, rows, Router(layer=layer)) for layer in range(plan.gates.layers)])
    return torch.from_numpy(stacked).bfloat16().float().numpy()


def bench_routers(arguments: argparse.Namespace) -> dict[str, Any]:
    bench = Bench.read(arguments)
    return bench.facts(arguments) | {"results": losses_of_merge(bench, arguments, "base", (1, 2))}


def losses_of_merge(
    bench: Bench, arguments: argparse.Namespace, backbone: Any, tops: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
    """By number of experts per token and variant (`oracle`, `16/ridge`, ...): the merge with this backbone."""
    variants = [bench.oracle]
    for count, prompts in bench.counts.items():
        for mode in arguments.modes:
            began = time.monotonic()
            plan = raymoe.plan(config_of(bench, mode, prompts, backbone), allow_all_same=True)
            variants.append(Variant(name=f"{count}/{mode}", rows=rows_of(plan, bench.device)))
            print(f"rows of {mode}, {count}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder, SourceReader(HubOptions()) as reader:
        prompts = next(iter(bench.counts.values()))
        plan = raymoe.plan(config_of(bench, "random", prompts, backbone), allow_all_same=True)
        write_merge(plan, Path(folder), bench.device)
        model = mixture_model(resolve_model(parse_model_ref(folder)))
        results = {}
        for top in tops:
            assert model.rule is not None
            changed = dataclasses.replace(model, rule=dataclasses.replace(model.rule, per_token=top))
            results[f"top-{top}"] = measured(changed, bench, variants, reader)
    return results


def raymoe_tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def measured(
    model: Any, bench: Bench, variants: Sequence[Variant], reader: SourceReader
) -> dict[str, dict[str, float]]:
    """Loss and first-choice accuracy of each variant."""
    right = {variant.name: np.zeros((len(bench.experts), 2)) for variant in variants}

    def seeing(variant: Variant) -> Variant:
        def see(layer: int, text: int, experts_TK: Any, weights_TK: Any) -> None:
            label = bench.texts[text][0]
            right[variant.name][label] += (int((experts_TK[:, 0] == label).sum()), len(experts_TK))

        return dataclasses.replace(variant, on_routing=see)

    ids = [ids for _, ids in bench.texts]
    values = log_likelihoods(model, ids, [seeing(variant) for variant in variants], reader, bench.device)
    results = {}
    for variant in variants:
        by_label: dict[int, list[Any]] = {}
        for (label, _), likely in zip(bench.texts, values[variant.name], strict=True):
            by_label.setdefault(label, []).append(likely)
        loss = float(np.mean([mean_loss(each) for each in by_label.values()]))
        share = right[variant.name]
        results[variant.name] = {"loss": loss, "accuracy": float((share[:, 0] / share[:, 1]).mean())}
    return results


def mean_loss(values: Sequence[Any]) -> float:
    """The mean over the tokens of several texts."""
    return float(-np.concatenate(values).mean())


# --- backbones


def bench_backbones(arguments: argparse.Namespace) -> dict[str, Any]:
    if "base" not in arguments.backbones or "hidden" not in arguments.modes:
        sys.exit("error: shares start at hidden on the base's backbone: name base and hidden as well")
    bench = Bench.read(arguments)
    facts, path = bench.facts(arguments), Path(arguments.out)
    stopped = json.loads(path.read_text()) if path.exists() else {}
    is_same = {**stopped, **facts} == stopped
    result = stopped if is_same else facts | {"own_loss": own_loss(bench), "backbones": {}}
    for backbone in arguments.backbones:
        if backbone in result["backbones"]:
            continue
        began = time.monotonic()
        losses = losses_of_merge(bench, arguments, yaml.safe_load(backbone), arguments.tops)
        result["backbones"][backbone] = losses
        path.write_text(json.dumps(result, indent=1))
        print(f"backbone {backbone}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return result


def own_loss(bench: Bench) -> float:
    """Each expert alone, as a dense model, on the texts of its own label."""
    losses = []
    for number, (label, model) in enumerate(bench.experts.items()):
        own = [ids for text_label, ids in bench.texts if text_label == number]
        dense = dense_model(resolve_model(parse_model_ref(model)), label)
        with SourceReader(HubOptions()) as reader:
            values = log_likelihoods(dense, own, [Variant(name=label)], reader, bench.device)
        losses.append(mean_loss(values[label]))
    return float(np.mean(losses))


# --- time to solve


def bench_solve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds for a layer's router of a 7B shape on each device, and for reading the experts' weights."""
    from raymoe.gate_modes import MODES as GATE_MODES
    from raymoe.gate_modes.least_squares import Examples, fit_rows

    shape = SHAPE_7B
    generator = torch.Generator().manual_seed(0)
    each = min(
        shape["tokens"] // shape["experts"], GATE_MODES["ridge"].token_limit(shape["experts"])
    )  # as capturing leaves them
    # Token states as those of a model: a common mean, a decaying spectrum, a little that tells the experts apart.
    spectrum = torch.arange(1, shape["hidden"] + 1).float() ** -0.5
    examples = [
        Examples(
            states=(
                torch.randn((each, shape["hidden"]), generator=generator) * spectrum
                + torch.randn(shape["hidden"], generator=generator) * spectrum * 0.3
            ).bfloat16(),
            prompts=torch.arange(each) * 16 // each,
            negative=torch.zeros(each, dtype=torch.bool),
        )
        for _ in range(shape["experts"])
    ]
    threads = os.cpu_count() or 1
    result: dict[str, Any] = {"shape": shape, "cores": threads, "layer_seconds": {}}
    torch.set_num_threads(1)  # as actors do: layers side by side, one thread each
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        given = [
            Examples(states=e.states.to(device), prompts=e.prompts.to(device), negative=e.negative.to(device))
            for e in examples
        ]
        times = list(timed_fits(fit_rows, given, arguments.layers, 1 if device == "cuda" else threads))
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        result["layer_seconds"][name] = float(np.median(times))
    result["read_bytes"] = shape["layers"] * (shape["experts"] * shape["ffn"] + shape["rest"]) * 2
    result["read_rate"] = read_rate(Path(arguments.work), arguments.read_bytes)
    return result


def timed_fits(fit: Any, given: Any, layers: int, at_once: int) -> Iterator[float]:
    """Seconds per layer, with `at_once` layers at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    def one(_: int) -> None:
        torch.set_num_threads(1)
        fit(given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(at_once)))
        for _ in range(layers):
            began = time.monotonic()
            list(pool.map(one, range(at_once)))
            yield (time.monotonic() - began) / at_once


def read_rate(folder: Path, count: int) -> float:
    """Bytes per second from the disk of `folder`, the page cache dropped; one reader, 8 MiB at a time."""
    path = folder / "read-rate.bin"
    block = os.urandom(8 << 20)
    with open(path, "wb") as file:
        for _ in range(count // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    buffer = bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    seconds = time.monotonic() - began
    path.unlink()
    return count / seconds


# --- tables


def write_tables(paths: Sequence[str]) -> None:
    """Put the tables of these results into their pages. Tables stay if none of the results is theirs."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    for page, mark, of_backbones in ((PAGE, MARK, False), (BACKBONE_PAGE, BACKBONE_MARK, True)):
        if found := [table_of(result) for result in results if ("backbones" in result) == of_backbones]:
            put_between(page, mark, "\n" + "\n\n".join(found) + "\n")
    if backbones := [result for result in results if "backbones" in result]:
        put_between(SUMMARY_PAGE, SUMMARY_MARK, "\n" + summary_table(backbones) + "\n")


def table_of(result: Mapping[str, Any]) -> str:
    if "backbones" in result:
        return backbone_table(result)
    return solve_table(result) if "layer_seconds" in result else routing_table(result)


def solve_table(result: Mapping[str, Any]) -> str:
    shape, read = result["shape"], result["read_bytes"] / result["read_rate"]
    lines = [
        f"{shape['layers']} layers, width {shape['hidden']}, {shape['experts']} experts, {shape['tokens']:,} tokens; "
        f"{result['cores']} cores:",
        "",
        "| fitted on | seconds for all layers |",
        "|---|---:|",
    ]
    lines += [f"| {name} | {seconds * shape['layers']:.1f} |" for name, seconds in result["layer_seconds"].items()]
    rate = f"at the measured {result['read_rate'] / 1e9:.2f} GB/s"
    what = f"reading {result['read_bytes'] / 1e9:.0f} GB of weights from disk {rate}"
    return "\n".join([*lines, f"| ({what}) | {read:.1f} |"])


def routing_table(result: Mapping[str, Any]) -> str:
    tops = result["results"]
    counts = list(dict.fromkeys(name.partition("/")[0] for name in tops["top-1"] if "/" in name))
    modes = list(dict.fromkeys(name.partition("/")[2] for name in tops["top-1"] if "/" in name))
    losses = ", ".join(f"{top} {values['oracle']['loss']:.3f}" for top, values in tops.items())
    lines = [
        f"{measured_on(result)}; loss of the oracle: {losses}.",
        "",
        "| prompts per expert | mode | top-1 loss | first choice right | gap closed | top-2 loss | gap closed |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        for mode in modes:
            cells = [count if mode == modes[0] else "", f"`{mode}`"]
            for top, values in tops.items():
                own, hidden = values[f"{count}/{mode}"], values[f"{count}/hidden"]["loss"]
                closed = (hidden - own["loss"]) / (hidden - values["oracle"]["loss"])
                cells += [f"{own['loss']:.3f}"] + ([f"{own['accuracy']:.0%}"] if top == "top-1" else [])
                cells += ["-" if mode == "hidden" else f"{closed:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def backbone_table(result: Mapping[str, Any]) -> str:
    """A row for each way of routing and backbone, a column for each number of prompts and of experts per token."""
    own, backbones = result["own_loss"], result["backbones"]
    tops = list(next(iter(backbones.values())))
    names = [name for name in next(iter(backbones.values()))[tops[0]] if name != "oracle"]
    modes = list(dict.fromkeys(name.partition("/")[2] for name in names))
    columns = [(count, top) for count in dict.fromkeys(name.partition("/")[0] for name in names) for top in tops]
    lines = [
        f"{measured_on(result)}; loss of the experts themselves: {own:.3f}.",
        "",
        "| routing | backbone |" + "".join(f" {count} prompts, {top} |" for count, top in columns),
        "|---|---|" + "---:|" * len(columns),
    ]
    for route in (*modes, "oracle"):
        for backbone, values in backbones.items():
            cells = [f"`{route}`" if route != "oracle" else "oracle", f"`{backbone}`"]
            for count, top in columns:
                start = backbones["base"][top][f"{count}/hidden"]["loss"]
                loss = values[top][route if route == "oracle" else f"{count}/{route}"]["loss"]
                share = "" if (backbone, route) == ("base", "hidden") else f" ({(start - loss) / (start - own):.0%})"
                cells.append(f"{loss:.3f}{share}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary_table(results: Sequence[Mapping[str, Any]]) -> str:
    """`ridge` on the backbones that all results have, with the fewest prompts: a row for each result and number of
    experts per token."""
    common = [name for name in results[0]["backbones"] if all(name in result["backbones"] for result in results)]
    lines = [
        "| experts, texts | experts per token | `hidden`, `base` |"
        + "".join(f" `ridge`, `{name}` |" for name in common)
        + " experts themselves |",
        "|---|---|" + "---:|" * (len(common) + 2),
    ]
    for result in results:
        own, backbones = result["own_loss"], result["backbones"]
        for top, values in backbones["base"].items():
            count = min((name.partition("/")[0] for name in values if name.endswith("/ridge")), key=int)
            start = values[f"{count}/hidden"]["loss"]
            losses = [backbones[name][top][f"{count}/ridge"]["loss"] for name in common]
            cells = [f"{result['models']}, {result['split']} split", top.removeprefix("top-"), f"{start:.3f}"]
            cells += [f"{loss:.3f} ({(start - loss) / (start - own):.0%})" for loss in losses] + [f"{own:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_on(result: Mapping[str, Any]) -> str:
    split = {"first": "", "second": ", second split"}[result["split"]]
    models = f"{result['models']}: " if result.get("models") else ""
    return f"{models}{result['held_out_tokens']:,} held-out tokens{split}, computed on {result['device']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    routers = commands.add_parser("routers", help="losses of all modes")
    backbones = commands.add_parser("backbones", help="losses of all backbones, against the experts themselves")
    few = ("16", "64"), ("cheap_embed", "hidden", "ridge")
    for command, counts, modes in ((routers, COUNTS, MODES), (backbones, *few)):
        command.add_argument("--base", default=BASE)
        command.add_argument("--experts", default=ADAPTERS, help="folder with an expert for each kind of example text")
        command.add_argument("--expert", action="append", default=[], metavar="LABEL=MODEL")
        command.add_argument("--models", default="", help="what the experts are, for the table's first line")
        command.add_argument("--prompts", action="append", default=[], metavar="LABEL=FILE", help="JSONL with 'text'")
        command.add_argument("--heldout", default="examples/heldout.jsonl", help="JSONL with 'label' and 'text'")
        command.add_argument("--keywords", default="examples/keywords.json", help="JSON: label -> words")
        command.add_argument("--counts", nargs="+", default=counts)
        command.add_argument("--modes", nargs="+", default=modes)
        command.add_argument("--limit", type=int, default=0, help="held-out texts per label (0: all)")
        command.add_argument(
            "--second-split", action="store_true", help="hold out the first 40 prompts, use the others"
        )
    backbones.add_argument("--backbones", nargs="+", default=BACKBONES, metavar="YAML", help="as configs write them")
    backbones.add_argument("--tops", nargs="+", type=int, default=(1, 2), help="numbers of experts per token")
    solve = commands.add_parser("solve", help="seconds to fit the routers of a 7B shape")
    solve.add_argument("--layers", type=int, default=3, help="how often a layer is timed")
    solve.add_argument("--work", default=".", help="a folder on the disk that weights would be read from")
    solve.add_argument("--read-bytes", type=int, default=4_000_000_000)
    for command in (routers, backbones, solve):
        command.add_argument("--out", required=True, help="JSON of the results")
    table = commands.add_parser("table", help="results as markdown, into docs/research/routing.md and docs/routing.md")
    table.add_argument("results", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "table":
        write_tables(arguments.results)
        return
    bench = {"routers": bench_routers, "backbones": bench_backbones, "solve": bench_solve}[arguments.command]
    result = bench(arguments)
    Path(arguments.out).write_text(json.dumps(result, indent=1))
    print(table_of(result))


if __name__ == "__main__":
    main()
