"""Serves a merge with vLLM and mlx-lm on this machine's CPU, and compares greedy answers with those of transformers.

    raymoe merge configs/example.yaml out/demo
    python scripts/serve_example.py out/demo                     # vLLM and mlx-lm: some ten minutes
    python scripts/serve_example.py out/demo --engine mlx

The engines' environments are those of `make engines`. Each server is started with the command of docs/engines.md, and
completes the first held-out prompts of each kind; the answer is token ids. This is done in float32 and, for vLLM, with
the weights as they are (bfloat16), where every program rounds in its own order. If an answer leaves that of
transformers, the line says by how much transformers preferred its own token there, in nats: a small number is rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo import held_out

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV") or sys.prefix)
CHAT = "What can you do?"
START_S = 600
DTYPES = ("float32", "bfloat16")
# On a CPU, mlx computes experts in float32 only.
NOT_HERE = {("mlx", "bfloat16")}


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, and by how much each was likelier than the next best one, in nats (none: not known)."""

    tokens: list[int]
    margins: list[float]


# --- transformers


def transformers_answers(folder: Path, prompts: Sequence[str], count: int, dtype: str) -> list[Answer]:
    """Greedy completions of up to `count` tokens, without the token that ends a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                **ids,
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        best = torch.log_softmax(torch.cat(made.logits).float(), -1).topk(2).values
        tokens = made.sequences[0, ids.input_ids.shape[1] :].tolist()
        answers.append(Answer(_without_end(tokens, tokenizer), (best[:, 0] - best[:, 1]).tolist()))
    return answers


def _without_end(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    return [token for token in tokens if token != tokenizer.eos_token_id]


# --- engines


def commands(engine: str, folder: Path, port: int, dtype: str, *, eager: bool) -> list[str | Path]:
    """What starts the server. mlx-lm computes in the type of the weights."""
    programs = VENV / f"engine-{engine}/bin"
    if engine == "vllm":
        options = ["--port", str(port), "--dtype", dtype, *(["--enforce-eager"] if eager else [])]
        return [programs / "vllm", "serve", folder, *options]
    return [programs / "mlx_lm.server", "--model", folder, "--port", str(port)]


@contextmanager
def server(engine: str, folder: Path, dtype: str, log: Path, *, eager: bool) -> Iterator[str]:
    """The address of a server that answers. It ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = VENV / f"engine-{engine}/bin"
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",  # vLLM looks for ninja there
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            commands(engine, folder, port, dtype, eager=eager),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"the server did not start:\n{log.read_text()[-3000:]}")


def served_answers(address: str, engine: str, folder: Path, prompts: Sequence[str], count: int) -> list[list[int]]:
    """Token ids of greedy completions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        options = {"return_token_ids": True} if engine == "vllm" else {"logprobs": True}
        choice = _post(f"{address}/v1/completions", {"prompt": prompt, **_greedy(folder, count), **options})
        ids = choice["token_ids"] if engine == "vllm" else [each["id"] for each in choice["logprobs"]["content"]]
        answers.append(_without_end(ids, tokenizer))
    return answers


def chat_answer(address: str, folder: Path, count: int) -> str:
    """The answer to a user's turn."""
    messages = [{"role": "user", "content": CHAT}]
    choice = _post(f"{address}/v1/chat/completions", {"messages": messages, **_greedy(folder, count)})
    return str(choice["message"]["content"])


def _greedy(folder: Path, count: int) -> dict[str, Any]:
    return {"model": str(folder), "max_tokens": count, "temperature": 0}


def _post(address: str, content: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return dict(json.load(answer)["choices"][0])
    except urllib.error.HTTPError as error:
        sys.exit(f"{address}: {error.read().decode()[:500]}")


# --- the comparison


def in_float32(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint with the same numbers in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    to.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
            save_file(tensors, to / file.name, {"format": "pt"})
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            keys = [key for key in ("dtype", "torch_dtype") if key in config]
            (to / file.name).write_text(json.dumps({**config, **dict.fromkeys(keys, "float32")}))
        else:
            shutil.copy(file, to / file.name)
    return to


def compare(expected: Sequence[Answer], found: Sequence[Sequence[int]]) -> tuple[int, list[str]]:
    """How many answers are equal, and where the others leave: "prompt 3, token 12 of 32 (0.01 nats)"."""
    places = []
    for number, (answer, other) in enumerate(zip(expected, found, strict=True), start=1):
        if answer.tokens == list(other):
            continue
        pairs = zip(answer.tokens, other, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(answer.tokens), len(other)))
        margin = f" ({answer.margins[same]:.1e} nats)" if same < len(answer.margins) else ""
        places.append(f"prompt {number}, token {same + 1} of {len(answer.tokens)}{margin}")
    return len(expected) - len(places), places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the merged model")
    parser.add_argument("--engine", action="append", choices=["vllm", "mlx"], help="repeatable; default: both")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default: both")
    parser.add_argument("--per-kind", type=int, default=2, help="held-out prompts per kind")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer, at most")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation, which takes minutes")
    parser.add_argument("--heldout", type=Path, default=ROOT / "examples/heldout.jsonl")
    arguments = parser.parse_args()
    model, count = arguments.model.resolve(), arguments.tokens
    prompts = [text for _, text in held_out(arguments.heldout, arguments.per_kind)]
    print(f"transformers {version('transformers')}, {len(prompts)} prompts, up to {count} tokens each", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in arguments.dtype or DTYPES:
            folder = in_float32(model, Path(temporary) / model.name) if dtype == "float32" else model
            expected = transformers_answers(folder, prompts, count, dtype)
            for engine in arguments.engine or ["vllm", "mlx"]:
                if (engine, dtype) in NOT_HERE:
                    continue
                log = Path(temporary) / f"{engine}-{dtype}.log"
                with server(engine, folder, dtype, log, eager=arguments.eager) as address:
                    found = served_answers(address, engine, folder, prompts, count)
                    chat = chat_answer(address, folder, count)
                equal, places = compare(expected, found)
                where = "" if not places else f"; they part at {', '.join(places)}"
                print(f"{engine}, {dtype}: {equal} of {len(prompts)} answers are equal token for token{where}")
                print(f"  {CHAT} -> {chat!r}", flush=True)


if __name__ == "__main__":
    main()
