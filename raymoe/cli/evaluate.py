"""`raymoe eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raymoe.cli.application import app, stoppable
from raymoe.cli.shared_options import Quiet, TransformersCache, TrustRecord, TrustRemoteCode, parse_device


@app.command(name="eval", short_help="Measure loss and routing on labeled texts.")
@stoppable()
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder or URL of a merge made by raymoe, or a dense model as a config names it."
        ),
    ],
    data: Annotated[Path | None, typer.Option("--data", help="Labeled texts: one JSON object per line.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="NAMES",
            help="What to compare a merge with: base,experts,average,oracle,hidden, or none. Default: all. "
            "NAME=MODEL adds a model; can be repeated.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="LABEL=EXPERT", help="For a label that is not an expert's name; can be repeated."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", help="Use only the first texts of each label, or examples of each task; 0: all.")
    ] = 0,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Texts are cut to this many tokens. Default: 512.")
    ] = None,
    experts_per_token: Annotated[
        str | None,
        typer.Option(
            "--experts-per-token",
            metavar="NUMBERS",
            help="Loss and active parameters of a merge with these numbers of experts for a token too: 1,2,4.",
        ),
    ] = None,
    text_field: Annotated[str | None, typer.Option("--text-field", help="The text's key. Default: text.")] = None,
    label_field: Annotated[str | None, typer.Option("--label-field", help="The label's key. Default: label.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", help="Instead of --data: tasks of lm-evaluation-harness, or task files, separated by commas."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="With --tasks: a folder with task files of your own.")
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option("--fewshot", help="With --tasks: examples before each question. Default: the task's own."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="With --tasks: questions per batch. Default: 1.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page of pictures to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. Default: a GPU, if there is one.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    trust_record: TrustRecord = False,
    transformers_cache: TransformersCache = None,
    quiet: Quiet = False,
) -> None:
    """Measure how well a model predicts labeled texts, and for a merge, to which experts its routers send them. Needs
    no Ray and little memory.

    With --tasks, lm-evaluation-harness evaluates the model instead. It loads the whole model.
    """
    from raymoe import api
    from raymoe.console import say
    from raymoe.evaluation.lm_eval import HarnessOptions, check_data_or_tasks, run_harness
    from raymoe.evaluation.options import EvaluationOptions, parse_against, parse_experts_per_token
    from raymoe.evaluation.output_files import check_writable, evaluation_input_paths, write_evaluation
    from raymoe.report.eval_table import print_evaluation, print_tasks
    from raymoe.sources.hub import HubOptions

    texts = check_data_or_tasks(
        data,
        tasks,
        {
            "--against": against or None,
            "--label": label or None,
            "--max-tokens": max_tokens,
            "--experts-per-token": experts_per_token,
            "--text-field": text_field,
            "--label-field": label_field,
            "--html": html,
            "--trust-record": trust_record or None,
        },
        {"--include-path": include_path, "--fewshot": fewshot, "--batch-size": batch_size},
    )
    options = EvaluationOptions(
        against=parse_against(against or None),
        labels=tuple(label or ()),
        limit=limit,
        max_tokens=512 if max_tokens is None else max_tokens,
        experts_per_token=parse_experts_per_token(experts_per_token),
        text_field=text_field or "text",
        label_field=label_field or "label",
        device=parse_device(device),
        trust_remote_code=trust_remote_code,
        trust_record=trust_record,
        quiet=quiet,
        hub=HubOptions(cache_dir=transformers_cache),
    )
    inputs = evaluation_input_paths(checkpoint, data, tasks, options.models.values())
    check_writable({"--json": json_file, "--html": html}, inputs)
    if texts is None:
        questions = HarnessOptions(
            tasks=tasks or "",
            include_path=include_path,
            limit=limit,
            fewshot=fewshot,
            batch_size=1 if batch_size is None else batch_size,
            device=parse_device(device),
            trust_remote_code=trust_remote_code,
        )
        scores = run_harness(checkpoint, questions)
        try:
            write_evaluation(scores, json_file, None)
        finally:
            if not quiet:
                print_tasks(scores)
        return
    result = api.evaluate(checkpoint, texts, options)
    try:
        write_evaluation(result, json_file, html)
    finally:  # print the numbers also if the files can't be written, as on a full disk
        if not quiet:
            print_evaluation(result)
        else:
            for warning in result["warnings"]:
                say(f"warning: {warning}")
