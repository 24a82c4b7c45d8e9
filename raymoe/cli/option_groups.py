"""Options as dataclasses: a command takes the value, the command line has one option per field.

    @app.command()
    @expand_groups
    def plan(config: ConfigPath, *, args: PlanArgs) -> None: ...

typer reads a command's signature. Here each parameter that is a dataclass is replaced by its fields, at its place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

Command = Callable[..., None]


def expand_groups(command: Command) -> Command:
    """Let a command be called with the fields of its dataclass parameters: each field is an option."""
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: each.annotation for name, each in parameters.items() if is_dataclass(each.annotation)
    }

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options = [
        option
        for name, parameter in parameters.items()
        for option in (_options(groups[name]) if name in groups else (parameter,))
    ]
    return with_parameters(expanded, options)


def option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter that typer makes an option of; `annotation` is `Annotated[kind, typer.Option(...)]`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_parameters(command: Command, parameters: Iterable[inspect.Parameter]) -> Command:
    """Set what typer reads: the signature, and the annotations by name."""
    signature = inspect.Signature(list(parameters))
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    return command


def _options(group: Any) -> Iterator[inspect.Parameter]:
    kinds = get_type_hints(group, include_extras=True)
    return (option(field.name, kinds[field.name], field.default) for field in fields(group))
