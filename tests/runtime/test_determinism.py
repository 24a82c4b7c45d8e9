"""The same bytes in every file, whatever the number of actors, nodes, runs and threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raymoe.planning import MergeOptions
from tests.cli.commands import hashes

Zoo = Callable[..., Path]


@pytest.mark.parametrize(
    ("mode", "dtype", "actors"),
    [
        ("ridge", "bfloat16", (1, 3)),
        pytest.param("hidden", "bfloat16", (1, 3), marks=pytest.mark.soak),
        pytest.param("hidden", "float32", (1, 2), marks=pytest.mark.soak),
        pytest.param("ridge", "bfloat16", (1, 2, 3, 3), marks=pytest.mark.soak),
    ],
)
def test_actors_and_nodes(
    zoo: Zoo,
    ray_merge: Callable[..., Any],
    second_node: Callable[[], Any],
    tmp_path: Path,
    mode: str,
    dtype: str,
    actors: Sequence[int],
) -> None:
    """Gates from a model, experts with noise and a LoRA, a shared base; three actors are spread over two nodes."""
    from tests.pico import merge_config, save_lora

    second_node()
    base = zoo("llama", dtype=dtype)
    lora = save_lora(tmp_path / "lora", base, ["gate_proj", "down_proj"])
    experts = [zoo("llama", seed=1, dtype=dtype), f"{base}+{lora}", zoo("llama", seed=3, dtype=dtype)]
    config = merge_config(base, experts, mode=mode, expert_options={"noise_scale": 0.02, "residual_scale": 0.5})
    found = []
    for run, count in enumerate(actors):
        out = tmp_path / f"out-{run}"
        result = ray_merge(config, out, MergeOptions(max_shard_bytes=100_000), actors=count)
        assert len(result.peak_actor_bytes) == count
        found.append(hashes(out))
    assert len(found[0]) > 10
    for other in found[1:]:
        assert other == found[0]


_ROWS = """
import hashlib, sys, threading
import raymoe
from raymoe.routers.in_process import compute_routers_locally
from raymoe.compute import COMPUTE_THREADS, limit_threads
from raymoe.sources.hub import HubOptions
from raymoe.storage.source_reader import SourceReader
import torch

def compute():  # in a thread, as an actor does
    limit_threads()
    assert torch.get_num_threads() == COMPUTE_THREADS
    plan = raymoe.plan(sys.argv[1])
    with SourceReader(HubOptions()) as reader:
        rows, _ = compute_routers_locally(plan.gates, reader, device="cpu")
    print(hashlib.sha256(b"".join(rows[owner].tobytes() for owner in sorted(rows, key=str))).hexdigest())

thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


@pytest.mark.processes
def test_threads_of_the_gate_pass(zoo: Zoo, tmp_path: Path) -> None:
    """What the environment says about threads is overruled: an actor computes with a number that is always the same."""
    import os

    from tests.cli.commands import write_config
    from tests.pico import merge_config

    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="hidden_avg")
    path = write_config(tmp_path / "config.yaml", config)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ROWS, path],
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "4")
    ]
    found = [process.communicate(timeout=120)[0] for process in processes]
    assert len(found[0]) == 65
    assert found[0] == found[1]


_LORA = """
import hashlib, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from raymoe.sources.hub import HubOptions
from raymoe.sources.safetensors_header import parse_header
from raymoe.sources.facts import LoraPair, SourceFile
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import with_lora

path = Path(sys.argv[1])
file = SourceFile(location=str(path), size=path.stat().st_size)
content = path.read_bytes()
entries = {e.name: e for e in parse_header(lambda start, end: content[start:end], file, "here")}
with SourceReader(HubOptions()) as reader:
    pair = LoraPair(a=entries["a"], b=entries["b"], scaling=0.5)
    block = with_lora(reader, np.ones((1024, 2048), np.float32), pair, slice(None))
print(hashlib.sha256(block.tobytes()).hexdigest())
"""


@pytest.mark.processes
def test_threads_of_a_lora_delta(tmp_path: Path) -> None:
    """The number of BLAS threads changes the order of sums, which must not be seen in the result."""
    import os

    import numpy as np
    from safetensors.numpy import save_file

    numbers = np.random.default_rng(0)
    shapes = {"a": (16, 2048), "b": (1024, 16)}
    factors = {name: numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(factors, tmp_path / "lora.safetensors")
    found = [
        subprocess.run(
            [sys.executable, "-c", _LORA, tmp_path / "lora.safetensors"],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for threads in ("1", "2", "4")
    ]
    assert len(set(found)) == 1, found
