"""`raymoe submit`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymoe.cli.application import app


@app.command(short_help="Run a merge as a job of a Ray cluster.", context_settings={"ignore_unknown_options": True})
def submit(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG OUT [OPTIONS OF merge]", help="Arguments of `raymoe merge`."),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Job server: http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine.",
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="The cluster's token. Better: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log, and exit with the merge's status.")
    ] = True,
    install: Annotated[
        bool,
        typer.Option(
            "--install/--no-install", help="Send this raymoe's code; otherwise the cluster's own raymoe runs."
        ),
    ] = True,
) -> None:
    """Run a merge as a job of a Ray cluster, follow its log, and exit with its status.

    Models are not sent: they are Hub ids, URLs or folders that the cluster's nodes have.
    """
    from raymoe.config import load_config
    from raymoe.console import say
    from raymoe.submit.job_server import job_server
    from raymoe.submit.job_spec import make_job
    from raymoe.submit.submit import follow_job, send_job

    params, options = _parse_merge_arguments(context, arguments)
    job = make_job(
        load_config(params["config"], allow_all_same=params["all_same"]),
        params["output"],
        options,
        result=params["result"],
    )
    client = job_server(address, token)
    name = send_job(client, job, install=install)
    say(f"job {name}: {job.entrypoint}")
    for model in job.models:
        say(f"note: {model} is not sent; the nodes of the cluster need that folder")
    if not wait:
        say(f"follow it with: ray job logs --follow {name}")
        return
    raise typer.Exit(follow_job(client, name, job))


def _parse_merge_arguments(context: typer.Context, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse arguments as `raymoe merge` does: its parameters by name, and the options as text again.

    Arguments that `raymoe merge` refuses end this command with the same error.
    """
    group: Any = context.parent and context.parent.command
    merging = group.get_command(context.parent, "merge").make_context("merge", list(arguments), parent=context.parent)
    typed = [
        option
        for parameter in merging.command.params
        if parameter.param_type_name == "option" and _is_typed(merging, parameter.name)
        for option in _as_typed(parameter, merging.params[parameter.name])
    ]
    # A stopped job is usually submitted again, and then resumes from its uploads.
    if not {"--keep-uploads", "--no-keep-uploads"}.intersection(typed):
        typed.append("--keep-uploads")
    return merging.params, typed


def _is_typed(context: Any, name: str) -> bool:
    # By name: newer versions of typer bring their own copy of click's enumeration.
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _as_typed(parameter: Any, value: Any) -> list[str]:
    """An option with its value, as on a command line: `--actors=2`, `--strict`, `--no-cuda`, `--verbose`."""
    flag = max(parameter.opts, key=len)
    if parameter.is_flag:
        return [flag if value else parameter.secondary_opts[0]]
    return [flag] * value if parameter.count else [f"{flag}={value}"]
