"""Draws prompts from files: each file is read once, and the drawn prompts replace it in the config.

    MergeConfig with {file: ...} --read_prompts--> the same MergeConfig with lists of texts

The seed and the position of a prompt among the file's prompts decide alone which prompts are drawn. So the result is
the same on every machine and for every file format, and a smaller limit draws a subset of a larger one's.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from raymoe.config.cross_checks import check_config
from raymoe.config.prompt_sources import PromptFile
from raymoe.config.schema import MergeConfig
from raymoe.config.source_positions import format_loc
from raymoe.errors import CheckpointError, Problem, ProblemReport
from raymoe.object_store.errors import StorageError
from raymoe.object_store.options import StorageOptions
from raymoe.sources.facts import ModelFacts, SourceFile
from raymoe.sources.hub import HubOptions
from raymoe.sources.prompt_reader import Faults, prompt_values
from raymoe.sources.resolve import RemoteFolderResolver, fetch_file
from raymoe.untrusted_files import read_json

NO_CHAT_TEMPLATE = Problem(
    where="base_model",
    what="chat_template is true, but the base model's tokenizer has no chat template",
    remedy="use a base model with one (an instruct or chat model), or leave chat_template out",
)


def read_prompts(config: MergeConfig, *, local_only: bool = False) -> MergeConfig:
    """`config` with texts instead of its files of prompts; with `local_only`, instead of files on this machine only.

    Raises ProblemReport with all problems of the files, and of the drawn prompts together.
    """
    problems: list[Problem] = []
    drawn: dict[PromptFile, tuple[str, ...]] = {}
    files = dict(config.prompt_files)
    if local_only:
        files = {loc: file for loc, file in files.items() if file.location.kind.is_local}
    for loc, file in files.items():
        if file not in drawn:
            drawn[file], found = _read(file, config.storage, format_loc(loc))
            problems += found
    if problems:
        raise ProblemReport(problems)
    concrete = config.with_prompts({loc: drawn[file] for loc, file in files.items()})
    if drawn and (unsound := check_config(concrete, allow_all_same=True)):
        raise ProblemReport(unsound)
    return concrete


def _read(file: PromptFile, storage: StorageOptions, owner: str) -> tuple[tuple[str, ...], list[Problem]]:
    faults = Faults(file.file, owner)
    try:
        drawn = sample_prompts(prompt_values(file, storage, faults), file.limit, file.seed)
        if not drawn and not faults.problems:
            faults.end("there are no prompts in it, or only blank ones", "write one prompt per line")
    except StorageError as error:
        return (), [replace(problem, where=f"{problem.where}: {owner}") for problem in error.problems]
    except ProblemReport as report:
        return (), list(report.problems)
    return drawn, faults.problems


def sample_prompts(texts: Iterable[str], limit: int | None, seed: int) -> tuple[str, ...]:
    """`limit` of the texts, or all if there are fewer, in their order. Holds no more than that many."""
    if limit is None:
        return tuple(texts)
    # A text's rank is a hash of the seed and its number. The lowest ranks are kept, with the highest of them on top of
    # the heap.
    kept: list[tuple[int, int, str]] = []
    for number, text in enumerate(texts):
        rank = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
        entry = (-int.from_bytes(rank, "big"), number, text)
        if len(kept) < limit:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
    return tuple(text for _, _, text in sorted(kept, key=lambda entry: entry[1]))


def chat_template_problems(
    config: MergeConfig,
    base: ModelFacts,
    hub: HubOptions | None = None,
    remote_folders: RemoteFolderResolver | None = None,
) -> list[Problem]:
    """The problem that the config requests a chat template and the base has none, or an invalid Jinja template.

    The template is parsed but not run: planning runs no code that comes with a model.
    """
    if not config.reads_prompts or not any(map(config.uses_chat_template, config.all_experts)):
        return []
    files = {side.name: side.file for side in base.side_files}

    def read(file: SourceFile) -> bytes:
        return remote_folders.read(file) if remote_folders else fetch_file(file, hub, config.storage).read_bytes()

    try:
        template = read_chat_template(files, read)
    except CheckpointError as error:
        return list(error.problems)
    except (OSError, ValueError):
        return []  # loading the tokenizer reports what is wrong with this file
    return list(_template_faults(template)) if template else [NO_CHAT_TEMPLATE]


def read_chat_template(files: Mapping[str, SourceFile], read: Callable[[SourceFile], bytes]) -> Any:
    """The chat template of a tokenizer's files: its text, several of them in a list, or None.

    Raises the exceptions of `read`, and ValueError for invalid JSON.
    """
    if (template := files.get("chat_template.jinja")) is not None:
        return read(template).decode()
    if (settings_file := files.get("tokenizer_config.json")) is not None:
        settings = read_json(read(settings_file))
        return settings.get("chat_template") if isinstance(settings, Mapping) else None
    return None


def _template_faults(template: Any) -> Iterator[Problem]:
    """A template's syntax error. If there are several templates, only transformers knows which one it uses."""
    if not isinstance(template, str):
        return
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        """transformers' own tag."""

        tags = {"generation"}  # noqa: RUF012  # as the base class declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        what = f"its chat template can't be used: {error.message} (line {error.lineno})"
        yield Problem(where="base_model", what=what, remedy="correct the template, or leave chat_template out")
    except RecursionError:  # deeply nested: transformers decides whether it can be used
        pass
