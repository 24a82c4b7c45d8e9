"""The models of a soak, made when first asked for: `pico-N` (some 300 KB), `wide-N` (some 30 MB), `deep-N` (some 15 MB,
with 16 layers, so that a gate pass takes a while), and the examples': `example-NAME`, written out in full, and
`adapter-NAME`, as they are, for merges from local folders.

The examples' are written again in files of some 60 MB: moto reads a whole object for each range of it, which would take
minutes with files of 270 MB.

A wide model has matrices and layers large enough for real multipart uploads: parts of 5 MiB and more, and ranges that a
store can copy by itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["Models"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE_BASE = ROOT / "models/SmolLM2-135M-Instruct"
ADAPTERS = ROOT / "examples/adapters"
EXAMPLE_EXPERTS = ROOT / "out/compare/experts"
_SHARD_BYTES = 60_000_000
_DEEP = {"hidden_size": 512, "head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 16}
_WIDE = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 2, "num_attention_heads": 8}


class Models:
    """Folders of models, by name. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        kind, _, rest = name.partition("-")
        with self._lock:
            if kind == "adapter":
                base = self._whole_example("base")
                return base if rest == "base" else Path(f"{base}+{ADAPTERS / rest}")
            return self._example(rest) if kind == "example" else self._random(name, kind, int(rest))

    def _random(self, name: str, kind: str, seed: int) -> Path:
        path = self._folder / name
        if not path.exists():
            from tests.pico import save_model

            sizes: dict[str, dict[str, Any]] = {"wide": _WIDE, "deep": _DEEP}
            save_model(path, "llama", seed=seed, dtype="bfloat16", **sizes.get(kind, {}))
        return path

    def _example(self, name: str) -> Path:
        path = self._folder / f"example-{name}"
        if not path.exists():
            _write_in_shards(self._whole_example(name), path)
        return path

    def _whole_example(self, name: str) -> Path:
        if name == "base":
            if not EXAMPLE_BASE.exists():
                subprocess.run([sys.executable, "scripts/fetch_example_base.py"], cwd=ROOT, check=True)
            return EXAMPLE_BASE
        made = EXAMPLE_EXPERTS if (EXAMPLE_EXPERTS / name / "model.safetensors").exists() else self._made_experts()
        return made / name

    def _made_experts(self) -> Path:
        """The example adapters merged into full checkpoints, as scripts/compare_mergekit.py does it."""
        folder = self._folder / "experts"
        if not folder.exists():
            unfinished = self._folder / "experts.unfinished"
            code = (
                "import sys, yaml; sys.path.insert(0, 'scripts'); from pathlib import Path\n"
                "from compare_mergekit import full_experts\n"
                "full_experts(yaml.safe_load(open('configs/example.yaml')), Path(sys.argv[1]))"
            )
            shutil.rmtree(unfinished, ignore_errors=True)
            subprocess.run([sys.executable, "-c", code, str(unfinished)], cwd=ROOT, check=True)
            unfinished.rename(folder)
        return folder


def _write_in_shards(source: Path, target: Path) -> None:
    """A copy of a model with its weights in several files, tensors in the same order."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, target)
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in load_file(source / "model.safetensors").items():
        if sum(t.nbytes for t in shards[-1].values()) >= _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, target / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
