"""The engines: their names in a config, their titles, and the commands that serve a merge with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A program that computes merges.

    Attributes:
        name: Its name in the config key `engines`, in `raymoe archs --engine` and in rows.csv.
        title: Its name in messages and docs.
        commands: What to type, in this order. `{model}` stands for the folder or the name of the merge.
        warns: `raymoe plan` warns if the engine computes a merge otherwise, also if the config does not name it.
        reads_checkpoints: It reads what `raymoe merge` writes. Otherwise the first command writes what it reads.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    warns: bool = False
    reads_checkpoints: bool = True


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            title="vLLM",
            commands=('vllm serve "{model}"',),
            warns=True,
        ),
        Engine(
            name="mlx",
            title="mlx-lm",
            commands=('mlx_lm.generate --model "{model}" --prompt "What can you do?"',),
            warns=True,
        ),
        Engine(
            name="sglang",
            title="SGLang",
            commands=('python -m sglang.launch_server --model-path "{model}"',),
            warns=True,
        ),
        Engine(
            name="llama.cpp",
            title="llama.cpp",
            commands=(
                'raymoe gguf "{model}" model.gguf --type q8_0',
                "llama-server -m model.gguf",
            ),
            warns=True,
            reads_checkpoints=False,
        ),
        Engine(name="mistralrs", title="mistral.rs", commands=('mistralrs run -m "{model}"',)),
        Engine(name="exllamav3", title="ExLlamaV3", commands=()),
        Engine(name="tensorrt-llm", title="TensorRT-LLM", commands=('trtllm-serve "{model}"',)),
        Engine(name="transformers", title="transformers", commands=()),
    )
}
"""All engines by name, in the order of docs and messages."""

WARNED_ENGINES: tuple[str, ...] = tuple(engine.name for engine in ENGINES.values() if engine.warns)
"""The engines that `raymoe plan` warns of if a config names none."""
