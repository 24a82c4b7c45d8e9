"""`raymoe try`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import Quiet, TransformersCache, TrustRecord, TrustRemoteCode, parse_device

if TYPE_CHECKING:
    from raymoe.evaluation.generation import Generator


@app.command(name="try", short_help="Generate from a merge, and show which experts worked.")
@stoppable()
def generate(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL of a merge made by raymoe.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Default: each line of standard input is a prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the chat template as one user turn.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Longest answer in tokens; 0 only reads the prompt.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the most likely token; above 0, tokens are sampled.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    per_token: Annotated[bool, typer.Option("--per-token", help="Show the experts of each token too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers and all shares as JSON.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. Default: a GPU, if there is one.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    trust_record: TrustRecord = False,
    transformers_cache: TransformersCache = None,
    quiet: Quiet = False,
) -> None:
    """Generate from a merge, and show which experts each prompt was routed to. Needs no Ray.

    Weights that do not fit in memory are read again for each token.
    """
    from raymoe.console import print_json, typed_lines
    from raymoe.evaluation.generation import open_generator
    from raymoe.evaluation.options import GenerationOptions
    from raymoe.report.generation_text import print_answer, print_description
    from raymoe.sources.hub import HubOptions

    options = GenerationOptions(
        device=parse_device(device),
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        quiet=quiet or as_json,
        hub=HubOptions(cache_dir=transformers_cache),
        max_new_tokens=max_new_tokens,
        chat=chat,
        temperature=temperature,
        seed=seed,
        per_token=per_token,
    )
    with open_generator(checkpoint, options) as generator:
        if as_json:
            print_json(generator.result(prompts or list(typed_lines())))
            return
        is_typed = not prompts and sys.stdin.isatty()
        answers = _conversation(generator) if is_typed else generator.answers(prompts or list(typed_lines()))
        if not quiet:
            print_description(generator.description())
        for answer in answers:
            print_answer(answer)


def _conversation(generator: Generator) -> Iterator[Mapping[str, Any]]:
    """Answers to lines as they are typed. A line with an error is reported, and the next one is read."""
    from raymoe.console import say, typed_lines
    from raymoe.errors import ProblemReport

    for line in typed_lines("> "):
        try:
            yield next(generator.answers([line]))
        except ProblemReport as report:
            say(f"error: {report}")
