"""Flags of mergekit-moe that have no effect here: they are accepted, and a note says so.

Only flags in the table are accepted: a mistyped flag is refused.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from raymoe.cli.option_groups import Command, option, with_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _IgnoredFlag:
    """`flags` as typer declares them, the type of the value, and why the flag has no effect."""

    flags: tuple[str, ...]
    why: str
    kind: Any = bool

    @property
    def name(self) -> str:
        """The long form of the flag, without its --no- form."""
        return self.flags[-1].partition("/")[0]

    @property
    def parameter(self) -> inspect.Parameter:
        """The option. Its value is None unless the flag is given."""
        return option(self.name.removeprefix("--").replace("-", "_"), self._annotation(self.kind | None), None)

    def _annotation(self, kind: Any) -> Any:
        help_text = f"Accepted, has no effect: {self.why}."
        return Annotated[kind, typer.Option(*self.flags, help=help_text, hidden=True)]

    @property
    def note(self) -> str:
        return f"note: {self.name} is accepted and changes nothing here: {self.why}"


def _switch(name: str, why: str) -> _IgnoredFlag:
    """A flag with a --no- form."""
    return _IgnoredFlag(flags=(f"--{name}/--no-{name}",), why=why)


_GPUS = "every expert gets a GPU of the Ray cluster"
_PARALLEL = "shards are always written in parallel"
_IGNORED_FLAGS = (
    _switch("lazy-unpickle", "pickled checkpoints are always read by byte range"),
    _switch("low-cpu-memory", "memory does not grow with the model"),
    _switch("read-to-gpu", "weights that are only copied never visit a GPU"),
    _switch("multi-gpu", _GPUS),
    _IgnoredFlag(flags=("--gpu-rich",), why=_GPUS),
    _switch("cuda", "GPUs that the Ray cluster has are used"),
    _switch("async-write", _PARALLEL),
    _IgnoredFlag(flags=("--write-threads",), why=_PARALLEL, kind=int),
    _IgnoredFlag(flags=("-j", "--num-threads"), why="work is spread over Ray actors (--actors)", kind=int),
    _switch("clone-tensors", "tensors are copied as bytes"),
    _switch("safe-serialization", "the output is always safetensors"),
    _IgnoredFlag(
        flags=("--lora-merge-cache",), why="LoRA deltas are applied while writing; no merged copy is kept", kind=str
    ),
    _IgnoredFlag(flags=("--lora-merge-dtype",), why="LoRA deltas are applied in float32", kind=str),
    _switch("unsafe-truncate-embeddings", "the base model's embeddings are used whole"),
)


def accept_ignored_flags(command: Command) -> Command:
    """Let a command be called with the flags of the table. It gets one note per given flag, as `ignored_notes`."""
    flags = {flag.parameter.name: flag for flag in _IGNORED_FLAGS}

    @functools.wraps(command)
    def accepting(**given: Any) -> None:
        values = {name: given.pop(name) for name in flags}
        command(**given, ignored_notes=[flags[name].note for name, value in values.items() if value is not None])

    own = inspect.signature(command, eval_str=True).parameters.values()
    kept = [parameter for parameter in own if parameter.name != "ignored_notes"]
    return with_parameters(accepting, [*kept, *(flag.parameter for flag in _IGNORED_FLAGS)])
