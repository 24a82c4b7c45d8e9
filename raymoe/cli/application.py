"""The application that commands register with, and how it ends."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from raymoe.cli.streams import OutputLost, make_streams_safe
from raymoe.errors import RaymoeError
from raymoe.text import say

__all__ = ["app", "main", "stoppable"]

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

    `what_now` says what has become of the work.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                with _sigterm_as_ctrl_c():
                    command(*args, **kwargs)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
                raise Stopped(f"stopped; {what_now}" if what_now else "stopped") from None

        return wrapped

    return decorated


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Ray puts its own handler in the place of this one while it connects, which exits with the signal's number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as exit:
        if exit.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, previous)


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
    make_streams_safe()
    try:
        app()
    except Stopped as stopped:
        say(str(stopped))
        sys.exit(stopped.exit_code)
    except RaymoeError as error:
        _end(error)
    except SystemExit as exit:
        if exit.code:
            raise
    try:
        sys.stdout.flush()
    except OutputLost as lost:
        _end(lost)
    sys.exit(0)


def _end(error: RaymoeError) -> NoReturn:
    if not isinstance(error, OutputLost) or error.is_told:
        say(f"error: {error}")
    sys.exit(error.exit_code)
