"""Log-probabilities of merges in one engine. scripts/run_engines.py runs this with the Python of the engine.

    ENGINE/bin/python scripts/engine_program.py vllm JOBS.json

JOBS.json is a list of {"name", "folder", "tokens", "dtype", "options"}. For each, FOLDER/ENGINE.npy gets the
log-probabilities of all tokens behind each token, (tokens, vocabulary), or FOLDER/ENGINE.error the first line of what
the engine raised. This file imports neither raymoe nor its tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    engine, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    program = ENGINES[engine]
    for job in jobs:
        folder = Path(job["folder"])
        started = folder / f"{engine}.started"
        started.touch()
        try:
            found = program(job)
            np.save(folder / f"{engine}.npy", found.astype(np.float32))
            print(f"{job['name']}: ran", flush=True)
        except Exception as error:  # whatever the engine has against it is the result
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            (folder / f"{engine}.error").write_text(f"{type(error).__name__}: {lines[0].strip()}")
            print(f"{job['name']}: {lines[0]}", flush=True)


def run_vllm(job: dict[str, Any]) -> np.ndarray:
    """vLLM on a CPU, in this process, without CUDA graphs or compilation."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import gc

    from vllm import LLM, SamplingParams

    tokens = job["tokens"]
    llm = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
        trust_remote_code=True,
        **{"max_model_len": len(tokens) + 8, **job["options"]},
    )
    try:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        (answer,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
        # What is said of a token is how likely it was behind those before it.
        rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        found = np.full((len(rows), len(rows[0])), np.nan)
        for row, entries in enumerate(rows):
            for token, entry in entries.items():
                if token < found.shape[1]:
                    found[row, token] = entry.logprob
        return found
    finally:
        del llm
        gc.collect()


def run_mlx(job: dict[str, Any]) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(job["folder"]))
    logits = model(mx.array([job["tokens"]]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


ENGINES: dict[str, Callable[[dict[str, Any]], np.ndarray]] = {"vllm": run_vllm, "mlx": run_mlx}

if __name__ == "__main__":
    main()
