"""The application that commands register with, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer

from raymoe import signals
from raymoe.cli.standard_streams import OutputLost, make_streams_safe
from raymoe.console import say
from raymoe.errors import RaymoeError
from raymoe.safe_text import ScrubbedStream, remember_secrets

app = typer.Typer(
    name="raymoe",
    help="Make Mixture-of-Experts checkpoints out of dense language models, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Stopped(RaymoeError):
    """Ctrl-C, or a stopped job."""


def stoppable(what_now: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn Ctrl-C and SIGTERM into a message and exit status 1; typer's own answer to them differs between versions.

    `what_now` tells the user what happens to the unfinished work.
    """

    last_words = f"stopped; {what_now}" if what_now else "stopped"

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                with signals.stoppable(last_words):
                    command(*args, **kwargs)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
                raise Stopped(last_words) from None

        return wrapped

    return decorated


def _version(wanted: bool) -> None:
    if wanted:
        from raymoe import __version__

        typer.echo(f"raymoe {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Entry point of the console script: 0 done, 1 failed, 2 wrong usage or config."""
    try:
        run_command()
    except SystemExit as exit:
        _ignore_signals()
        if isinstance(exit.code, int):
            _end_process(exit.code)
        raise
    finally:  # the command is done: a late signal does not change the exit status
        _ignore_signals()


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_process(status: int) -> None:
    """End the process without taking the interpreter apart, which takes a third of a second once Ray was imported.

    Functions that were registered for the exit are called. If there is a thread that Python would wait for, this
    returns.
    """
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def run_command() -> NoReturn:
    """Run the command that `sys.argv` holds, and raise SystemExit. The process may go on afterwards."""
    make_streams_safe()
    with _scrubbed_streams():
        _run()
        sys.exit(0)


@functools.cache
def _command() -> Callable[[], None]:
    """All commands as click has them. typer makes them again for each call of an app: 30 ms each time."""
    return cast(Callable[[], None], typer.main.get_command(app))


def _run() -> None:
    try:
        _command()()
    except Stopped as stopped:
        say(str(stopped))
        sys.exit(stopped.exit_code)
    except RaymoeError as error:
        _exit_with_error(error)
    except SystemExit as exit:
        if exit.code:
            raise
    try:
        sys.stdout.flush()
    except OutputLost as lost:
        _exit_with_error(lost)


def _exit_with_error(error: RaymoeError) -> NoReturn:
    if not isinstance(error, OutputLost) or error.is_reported:
        say(f"error: {error}")
    sys.exit(error.exit_code)


@contextmanager
def _scrubbed_streams() -> Iterator[None]:
    """Remove secrets from everything that is printed, also by libraries and for unexpected exceptions."""
    remember_secrets(sys.argv[1:])
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, ScrubbedStream(streams[0])), cast(TextIO, ScrubbedStream(streams[1]))
    try:
        yield
    except SystemExit:
        sys.stdout, sys.stderr = streams
        raise
    # For any other exception the scrubbed streams stay, since Python prints the traceback later.
