"""Prompts in a config: a list of texts, or a file to draw them from.

    positive_prompts: ["func main() {", "package main"]
    positive_prompts: {file: prompts/go.jsonl, field: text, limit: 256, seed: 0}

Only the config itself is checked here; `raymoe.sources.prompt_sampling` reads the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, PlainValidator, TypeAdapter

from raymoe.config.coerce import optional, parse_integer, parse_text, value_error
from raymoe.config.source_positions import short_repr, short_text, yaml_kind
from raymoe.object_store.location import Location, LocationKind
from raymoe.object_store.urls import check_no_secrets, check_spelling, is_url, normalize_url

_SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_KNOWN = ".txt, .jsonl, .ndjson (these also with .gz) or .parquet"
_ONE_A_LINE = "make it a list: one prompt per line, each after '- '"
_MAX_NUMBER = 2**63


def file_format(file: str) -> str | None:
    """`txt`, `jsonl` or `parquet`, by the name's ending; None for a file that can't be read."""
    name = file.lower()
    plain = name.removesuffix(".gz")
    found = next((kind for suffix, kind in _SUFFIXES.items() if plain.endswith(suffix)), None)
    return None if found == "parquet" and plain != name else found


def is_compressed(file: str) -> bool:
    return file.lower().endswith(".gz")


def _parse_file(value: Any) -> str:
    file = parse_text(value).strip()
    if not file:
        raise value_error("is blank", f"name a file: {_KNOWN}")
    if LocationKind.of(file) is LocationKind.HUB:
        raise value_error("files on the Hub can't be named here", "download the file and name it by its path")
    try:
        check_spelling(file)
        file = normalize_url(file) if is_url(file) else file
    except ValueError as error:
        raise value_error(short_text(str(error), 400), "name the file as s3://bucket/folder/prompts.jsonl") from None
    if "\0" in file or file_format(file) is None:
        what = f"can't tell the format of {short_repr(file.rstrip('/').rpartition('/')[2])} by its ending"
        near = "; JSON has to have one object per line" if ".json" in file.lower() else ""
        raise value_error(what, f"name a file that ends with {_KNOWN}{near}")
    return file


def _parse_field(value: Any) -> str:
    if value is None:
        return "text"
    if not parse_text(value):
        raise value_error("is empty", "name the key or column that holds the prompt, for example text")
    try:
        check_no_secrets(parse_text(value))
    except ValueError as error:
        raise value_error(str(error), "name the key or column that holds the prompt, for example text") from None
    return parse_text(value)


def _parse_limit(value: Any) -> int:
    number = parse_integer(value, example=256)
    if not 1 <= number < _MAX_NUMBER:
        raise value_error(f"{short_repr(number)} is not a number from 1 up", "write how many to draw, or null for all")
    return number


def _parse_seed(value: Any) -> int:
    number = parse_integer(value, example=0)
    if not 0 <= number < _MAX_NUMBER:
        raise value_error(f"{short_repr(number)} is not a number from 0 up", "write a seed such as 0")
    return number


class PromptFile(BaseModel):
    """Prompts that are drawn from a file: `limit` of them (`None`: all), chosen by `seed`, in the file's order.

    `file` is a path or a URL in normal form; `field` the key of each line's object, or the column.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, PlainValidator(_parse_file)]
    field: Annotated[str, PlainValidator(_parse_field)] = "text"
    limit: Annotated[int | None, PlainValidator(optional(_parse_limit))] = 256
    seed: Annotated[int, PlainValidator(optional(_parse_seed, 0))] = 0

    @property
    def absolute_name(self) -> str:
        """`file`, whatever the working directory; a URL as it is, also a file:// URL."""
        return self.file if is_url(self.file) else os.path.abspath(os.path.expanduser(self.file))

    @property
    def location(self) -> Location:
        """Where the file is."""
        return Location.of(self.absolute_name)


def _parse_prompt(value: Any) -> str:
    if isinstance(value, (Mapping, list)):
        # "- Note: this" is a mapping and "- [INST] ..." a list: the prompt as a whole has to be quoted.
        raise value_error(
            f"expected text, got {yaml_kind(value)}",
            "quote the whole prompt: ': ' inside it, or '[' or '{' at its start, has a meaning in YAML",
        )
    return parse_text(value)


def _parse_list(value: Any) -> Any:
    if isinstance(value, str):
        in_file = "; a file is named as {file: ...}" if file_format(value) else ""
        raise value_error(f"expected a list of prompts, got the text {short_repr(value)}", _ONE_A_LINE + in_file)
    if not isinstance(value, (list, tuple)):
        raise value_error(f"expected a list of prompts, got {yaml_kind(value)}", _ONE_A_LINE)
    return value


_LIST = TypeAdapter(Annotated[tuple[Annotated[str, PlainValidator(_parse_prompt)], ...], BeforeValidator(_parse_list)])


def _parse_prompts(value: Any) -> tuple[str, ...] | PromptFile:
    # Not a union: pydantic would try both forms, and name both in the location of every error.
    if value is None:
        return ()
    if isinstance(value, (Mapping, PromptFile)):
        return PromptFile.model_validate(value)
    return _LIST.validate_python(value)


def _to_plain(prompts: tuple[str, ...] | PromptFile) -> list[str] | dict[str, Any]:
    return prompts.model_dump() if isinstance(prompts, PromptFile) else list(prompts)


Prompts = Annotated[tuple[str, ...] | PromptFile, PlainValidator(_parse_prompts), PlainSerializer(_to_plain)]


def expand_prompts(prompts: tuple[str, ...] | PromptFile) -> tuple[str, ...]:
    """The texts of prompts whose files have been read."""
    assert not isinstance(prompts, PromptFile), f"{prompts.file} has not been read"
    return prompts
