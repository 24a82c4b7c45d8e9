"""Merges the example experts with mergekit-moe and with raymoe, and compares the two outputs tensor by tensor.

    python scripts/compare_mergekit.py            # prints the table, and puts it into docs/mergekit.md
    python scripts/compare_mergekit.py --experts-only experts      # only the checkpoints that are merged

mergekit runs as a program in an environment of its own (`.venv-mergekit`, made here). It can't take LoRA experts, so
the example adapters are first merged into full checkpoints with peft, and both programs get those.

Tensors are compared by meaning: mergekit writes transformers 5's fused names (all experts' gate and up projections in
one tensor), raymoe writes the Hub's (one tensor per expert and matrix). Every tensor but the routers must be equal bit
for bit. Router rows can't be: mergekit computes them in bfloat16, raymoe on a CPU in float32 or bfloat16; their cosine
is compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import put_between
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
MERGEKIT = "mergekit==0.1.5"
MODES = ("hidden", "hidden_avg", "cheap_embed")
MIN_COSINE = 0.9995
PROMPT_TOKENS = 32
PAGE, MARK = ROOT / "docs/mergekit.md", "<!-- table: scripts/compare_mergekit.py -->"


def mergekit_program(folder: Path) -> Path:
    """mergekit-moe in an environment of its own."""
    program = folder / "bin/mergekit-moe"
    if not program.exists():
        print(f"installing {MERGEKIT} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip[:-2], MERGEKIT], check=True)
    return program


def full_experts(config: dict[str, Any], folder: Path) -> list[Path]:
    """The LoRA experts of the config as full bfloat16 checkpoints."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = []
    for expert in config["experts"]:
        base, _, adapter = expert["source_model"].partition("+")
        path = folder / Path(adapter).name
        paths.append(path)
        if (path / "tokenizer_config.json").exists():  # saved last
            continue
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(path)
        AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return paths


def equal_length(prompts: list[str], tokenizer: Any, tokens: int) -> list[str]:
    """Prompts cut to exactly that many tokens; those that do not survive the way back through text are left out."""
    cut = [tokenizer.decode(tokenizer(p, add_special_tokens=False)["input_ids"][:tokens]) for p in prompts]
    return [p for p in cut if len(tokenizer(p, add_special_tokens=False)["input_ids"]) == tokens]


def write_config(path: Path, config: dict[str, Any], experts: list[Path], mode: str, tokenizer: Any) -> None:
    """The config of one comparison. For `hidden_avg` prompts have equal lengths: mergekit counts padding in."""
    entries = []
    for expert, model in zip(config["experts"], experts, strict=True):
        prompts = expert["positive_prompts"]
        if mode == "hidden_avg":
            prompts = equal_length(prompts, tokenizer, PROMPT_TOKENS)
            assert len(prompts) >= 4, "too few prompts of equal length"
        entries.append({"source_model": str(model), "positive_prompts": prompts})
    content = {**config, "gate_mode": mode, "experts": entries}
    content.pop("backbone", None)  # mergekit-moe takes the base's, and refuses the key
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Mixtral checkpoint, under the Hub's names."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                found.update(hub_names(name, file.get_tensor(name)))
    return found


def hub_names(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor of either layout as tensors of the Hub's layout."""
    moe = name.replace(".mlp.", ".block_sparse_moe.")
    if moe.endswith("experts.gate_up_proj"):  # (experts, 2 x intermediate, hidden)
        prefix = moe.removesuffix("gate_up_proj")
        half = tensor.shape[1] // 2
        return {
            f"{prefix}{e}.{w}.weight": tensor[e, rows]
            for e in range(tensor.shape[0])
            for w, rows in (("w1", slice(0, half)), ("w3", slice(half, None)))
        }
    if moe.endswith("experts.down_proj"):
        return {f"{moe.removesuffix('down_proj')}{e}.w2.weight": tensor[e] for e in range(tensor.shape[0])}
    return {moe if ".gate." in moe or ".experts." in moe else name: tensor}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tied: bool) -> dict[str, Any]:
    """How many tensors are equal, and the cosines of all router rows."""
    if tied:  # mergekit may write the tied head a second time; a reader ignores it
        theirs.pop("lm_head.weight", None)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    routers = {name for name in ours if name.endswith("block_sparse_moe.gate.weight")}
    plain = ours.keys() - routers
    equal = sum(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16))
        for n in plain
    )
    rows = [(ours[n].double(), theirs[n].double()) for n in routers]
    cosines = torch.cat([torch.cosine_similarity(a, b, dim=-1) for a, b in rows])
    return {
        "tensors": len(plain),
        "equal": equal,
        "rows": len(cosines),
        "min_cosine": float(cosines.min()),
        "median_cosine": float(cosines.median()),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| gate mode | tensors equal bit for bit | router rows | lowest cosine | median cosine |",
        "|---|---|---|---|---|",
    ]
    for mode, r in results.items():
        cosines = f"{r['min_cosine']:.6f} | {r['median_cosine']:.6f}"
        lines.append(f"| {mode} | {r['equal']} of {r['tensors']} | {r['rows']} | {cosines} |")
    return "\n".join(lines)


def update_page(text: str) -> None:
    """Put the table between the page's marks."""
    put_between(PAGE, MARK, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out/compare", help="folder for experts and merges")
    parser.add_argument("--mergekit", type=Path, default=ROOT / ".venv-mergekit", help="mergekit's environment")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/example.yaml")
    parser.add_argument(
        "--experts-only", type=Path, metavar="DIR", help="only make the experts' full checkpoints in DIR"
    )
    parser.add_argument("--no-page", action="store_true", help="print only; leave docs/mergekit.md alone")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text())
    if arguments.experts_only is not None:
        print(*(f"{path} is ready" for path in full_experts(config, arguments.experts_only)), sep="\n")
        return 0
    from transformers import AutoTokenizer

    program = mergekit_program(arguments.mergekit)
    tokenizer = AutoTokenizer.from_pretrained(config["base_model"])
    experts = full_experts(config, arguments.work / "experts")
    results = {}
    for mode in MODES:
        path = arguments.work / f"{mode}.yaml"
        write_config(path, config, experts, mode, tokenizer)
        outputs = {"mergekit": arguments.work / f"{mode}-mergekit", "raymoe": arguments.work / f"{mode}-raymoe"}
        subprocess.run([str(program), str(path), str(outputs["mergekit"]), "--quiet"], check=True)
        raymoe = [sys.executable, "-m", "raymoe", "merge", str(path), str(outputs["raymoe"]), "--overwrite", "--quiet"]
        subprocess.run(raymoe, check=True)
        results[mode] = compare(tensors(outputs["raymoe"]), tensors(outputs["mergekit"]), tied=True)
        print(mode, json.dumps(results[mode]), flush=True)
    print(table(results))
    if not arguments.no_page:
        update_page(table(results))
    good = all(r["equal"] == r["tensors"] and r["min_cosine"] >= MIN_COSINE for r in results.values())
    print("equal" if good else "NOT equal")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
