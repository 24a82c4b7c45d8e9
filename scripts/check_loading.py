"""Do merges load in other versions of transformers, with every weight, and compute the same there?

    python scripts/check_loading.py --python OTHER/bin/python ...      # Pythons with other versions of transformers
    python scripts/check_loading.py --python ... --page                # and write the table of docs/families.md

Here, small random models are made and merged, one merge for each pair of dense family and host. Each Python then loads
them with `from_pretrained`, says which keys were missing, left over or of another shape, and how far the logits are
from those of the dense model, as this Python computes them. Another Python needs torch, transformers and safetensors:

    python -m venv OTHER && OTHER/bin/pip install torch 'transformers<5' safetensors
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pages import put_between

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARK = ROOT / "docs/families.md", "<!-- table: scripts/check_loading.py -->"
TOKENS = list(range(3, 43))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", default=[], help="a Python with another transformers; repeatable")
    parser.add_argument("--page", action="store_true", help="write the table of docs/families.md")
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_all(Path(arguments.load))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_merges(Path(folder))
        found = [ask(python, folder) for python in [sys.executable, *arguments.python]]
    text = table(found)
    print(text)
    if arguments.page:
        put_between(PAGE, MARK, text)
    if any(entry.get("problem") for result in found for entry in result["merges"].values()):
        sys.exit(1)


# --- here


def make_merges(folder: Path) -> None:
    """FOLDER/NAME/merged and FOLDER/NAME/logits.json, what the dense model computes for `TOKENS`."""
    sys.path.insert(0, str(ROOT))
    import torch

    from raymoe.architectures import MOE_ARCHITECTURES
    from tests.architectures.pairs import PAIRS
    from tests.pico import load_dense, logits_of, merge_without_ray, save_model

    for pair in PAIRS:
        place = folder / f"{pair.family} in {pair.host}"
        if place.exists() or MOE_ARCHITECTURES[pair.host].code_repository:  # whose code transformers does not ship
            continue
        dense = save_model(place / "dense", pair.family, **pair.options)
        off = {"shared_options": {"residual_scale": 0.0}} if pair.shared else {}
        plan = merge_without_ray(pair.config(dense, [dense] * 3, dense, mode="random", **off), place / "merged")
        (place / "since").write_text(MOE_ARCHITECTURES[pair.host].min_transformers_for(plan.text_config.get("layer_types")))
        logits = logits_of(load_dense(dense), torch.tensor([TOKENS]))
        (place / "logits.json").write_text(json.dumps(logits.tolist()))


def ask(python: str, folder: str) -> dict[str, Any]:
    """What `load_all` says there."""
    command = [python, str(Path(__file__).resolve()), "--load", folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{python}: {result.stderr.strip().splitlines()[-1]}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def table(found: list[dict[str, Any]]) -> str:
    """One row per merge, one column per Python."""
    heads = [f"transformers {r['transformers']}, torch {r['torch']}" for r in found]
    lines = [f"| merge | {' | '.join(heads)} |", "|---" * (len(found) + 1) + "|"]
    for name in found[0]["merges"]:
        cells = [cell(result["merges"][name]) for result in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(entry: dict[str, Any]) -> str:
    return str(entry.get("absent") or entry.get("problem") or f"loads, {entry['difference']:.1e}")


# --- there


def load_all(folder: Path) -> dict[str, Any]:
    """Versions, and for each merge the difference of its logits, or what was wrong."""
    import torch
    import transformers

    names = sorted(place.name for place in folder.iterdir())
    merges = {name: load(folder / name) for name in names}
    return {"transformers": transformers.__version__, "torch": torch.__version__, "merges": merges}


def load(place: Path) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = json.loads((place / "merged/config.json").read_text())
    if config["model_type"] not in CONFIG_MAPPING:
        return {"absent": "not in this version"}
    if int((place / "since").read_text().split(".")[0]) > int(transformers.__version__.split(".")[0]):
        return {"absent": "not its windows in this version"}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(place / "merged", output_loading_info=True)
    except Exception as error:  # whatever a version has against it is what is asked for
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if wrong := {key: sorted(map(str, names))[:3] for key, names in info.items() if names}:
        return {"problem": f"keys that do not fit: {wrong}"}
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([TOKENS]), use_cache=False).logits
    expected = torch.tensor(json.loads((place / "logits.json").read_text()))
    difference = (logits - expected).abs().max().item()
    return {"difference": difference} if difference < 1e-4 else {"problem": f"logits differ by {difference:.1e}"}


if __name__ == "__main__":
    main()
