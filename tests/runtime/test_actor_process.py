"""How an actor's process is set up."""

from __future__ import annotations

import inspect
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator

import pytest

from raymoe.errors import CheckpointError, Problem
from raymoe.runtime.actor_process import without_secrets

SECRET = "https://user:C4N4RY@host/x?X-Amz-Signature=C4N4RY"


@pytest.mark.processes
def test_open_files_up_to_the_hard_limit() -> None:
    """A node that was started from a shell with a limit of 1024 gives it to its actors."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); "
        "from raymoe.runtime.actor_process import set_up_process; set_up_process(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "(128, 128)\n"


@pytest.mark.processes
def test_standard_streams_tell_no_secrets() -> None:
    script = (
        "import sys; from raymoe.runtime.actor_process import set_up_process; set_up_process(); set_up_process(); "
        f"print({SECRET!r}); print({SECRET!r}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == "https://host/x?X-Amz-Signature=<removed>\n"


class _OfALibrary(Exception):
    def __str__(self) -> str:
        return f"at {SECRET}"


def _refused() -> None:
    try:
        raise OSError(f"at {SECRET}")
    except OSError as error:
        raise CheckpointError([Problem(where="file", what="refused")]) from error


def _failed_on_the_way() -> None:
    try:
        raise OSError(f"at {SECRET}")
    except OSError:
        raise KeyError("name")  # noqa: B904


def _fails(error: Exception) -> Callable[[], None]:
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("fails", "kind", "said"),
    [
        (_refused, CheckpointError, "file: refused"),
        (_failed_on_the_way, KeyError, "'name'"),
        (_fails(OSError(5, f"at {SECRET}")), OSError, "https://host/x"),
        (_fails(_OfALibrary()), RuntimeError, "_OfALibrary: at https://host/x"),
        (_fails(ValueError("no secret")), ValueError, "no secret"),
    ],
)
def test_errors_of_actors_tell_no_secrets(fails: Callable[[], None], kind: type[Exception], said: str) -> None:
    """Neither do those that they were made from: Ray stores the text of all."""

    def streams() -> Iterator[int]:
        yield 1
        fails()

    assert inspect.isgeneratorfunction(without_secrets(streams))
    for call in (without_secrets(fails), lambda: list(without_secrets(streams)())):
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind and said in str(caught.value)
        assert "C4N4RY" not in "".join(traceback.format_exception(caught.value))


def test_wrapped_methods_keep_the_options_that_ray_reads() -> None:
    """Ray looks for them behind `__wrapped__`: without its groups an actor answers nothing while it works."""

    class Worker:
        def answer(self, number: int, more: int = 0) -> int:
            return number + more

    wrapped = without_secrets(Worker.answer)
    assert inspect.unwrap(wrapped) is wrapped
    assert inspect.signature(wrapped) == inspect.signature(Worker.answer)
    assert wrapped(Worker(), 1, more=2) == 3
