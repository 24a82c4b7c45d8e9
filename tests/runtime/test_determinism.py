"""The same bytes in every file, whatever the number of actors, nodes, runs and threads, and if a node is lost."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raymoe.planning import MergeOptions
from tests.cli.commands import finished_shards, hashes, wait_until
from tests.processes import below, kill
from tests.runtime.conftest import Merge, expert_actors

Zoo = Callable[..., Path]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mode", "dtype", "actors"),
    [
        ("ridge", "bfloat16", (3,)),
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
    """Gates from a model, a merged backbone, cut experts with noise, new channels and a LoRA, a shared base; three
    actors are spread over two nodes. What they write is compared with a merge in this process."""
    import torch

    from raymoe.compute import COMPUTE_THREADS
    from tests.pico import merge_config, merge_here, save_lora

    second_node()
    base = zoo("llama", dtype=dtype)
    lora = save_lora(tmp_path / "lora", base, ["gate_proj", "down_proj"])
    experts = [zoo("llama", seed=1, dtype=dtype), f"{base}+{lora}", zoo("llama", seed=3, dtype=dtype)]
    expert_options = {"noise_scale": 0.02, "residual_scale": 0.5, "reinit": 0.25}
    config = merge_config(base, experts, mode=mode, expert_options=expert_options, granularity=2)
    config["backbone"] = {"method": "ties", "density": 0.4}
    options = MergeOptions(max_shard_bytes=100_000)
    torch.set_num_threads(COMPUTE_THREADS)  # as actors do
    merge_here(config, tmp_path / "here", options)
    expected = hashes(tmp_path / "here")
    assert len(expected) > 10
    for run, count in enumerate(actors):
        out = tmp_path / f"out-{run}"
        result = ray_merge(config, out, options, actors=count)
        assert len(result.peak_actor_bytes) == count
        assert max(result.peak_actor_bytes) > 350_000_000  # with torch; test_import_blocker.py has an actor without it
        assert hashes(out) == expected


def test_a_lost_node(
    many_shards: Merge,
    ray_env: dict[str, str],
    second_node: Callable[[], subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    """Three actors, two CPUs on each of two nodes. One node goes with all its processes, and its actors with it; one of
    them may find no room any more, and its work is done by the others all the same."""
    node = second_node()
    for number in range(5):  # on a busy machine, a merge may be over before it is looked at with an actor there
        out = tmp_path / f"out-{number}"
        process = many_shards.start(out, ray_env, "--actors", "3")
        is_midway = wait_until(
            lambda out=out, process=process: (
                (len(finished_shards(out)) > 3 and expert_actors(node.pid)) or process.poll() is not None
            ),
            "the fourth shard and an actor on the second node",
        )
        if is_midway is not True:
            break
        assert process.wait() == 0
    else:
        pytest.fail("no merge was found midway")
    for each in (node, *below(node.pid)):
        kill(each)
    node.wait()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert hashes(out) == many_shards.files


def routers_digest(config: str) -> str:
    """A checksum of the routers, computed in a thread with as many threads as an actor computes with."""
    import torch

    import raymoe
    from raymoe.compute import COMPUTE_THREADS, limit_threads
    from raymoe.routers.in_process import compute_routers_locally
    from raymoe.sources.hub import HubOptions
    from raymoe.storage.source_reader import SourceReader

    def compute() -> str:
        limit_threads()
        assert torch.get_num_threads() == COMPUTE_THREADS
        plan = raymoe.plan(config)
        with SourceReader(HubOptions()) as reader:
            rows, _ = compute_routers_locally(plan.gates, reader, device="cpu")
        return hashlib.sha256(b"".join(rows[owner].tobytes() for owner in sorted(rows, key=str))).hexdigest()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()


@pytest.mark.processes
def test_threads_of_the_gate_pass(zoo: Zoo, tmp_path: Path) -> None:
    """What the environment says about threads is overruled: an actor computes with a number that is always the same."""
    from tests.cli.commands import write_config
    from tests.pico import merge_config

    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="hidden_avg")
    path = write_config(tmp_path / "config.yaml", config)
    threads = "4" if os.environ.get("OMP_NUM_THREADS") == "1" else "1"
    script = "import sys; from tests.runtime.test_determinism import routers_digest; print(routers_digest(sys.argv[1]))"
    other = subprocess.run(
        [sys.executable, "-c", script, path],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other.stdout == f"{routers_digest(str(path))}\n"


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
        for threads in ("1", "4")
    ]
    assert len(set(found)) == 1, found
