"""How the process of a command ends: registered functions run, threads are waited for, and no more is done."""

from __future__ import annotations

import subprocess
import sys

import pytest

_COMMAND = """
import atexit, os, sys, threading
from raymoe.cli import main

class Noticed:
    def __del__(self):
        os.write(1, b"taken apart\\n")

noticed = Noticed()
atexit.register(os.write, 1, b"registered\\n")
release = threading.Event()

def work():
    release.wait()
    os.write(1, b"worked\\n")

if sys.argv.pop() == "thread":
    threading.Thread(target=work).start()
    threading.Timer(0.2, release.set).start()
main()
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "status", "others", "expected"),
    [
        (["--version"], 0, "none", ["registered"]),
        (["--unknown"], 2, "none", ["registered"]),
        (["--version"], 0, "thread", ["worked", "registered", "taken apart"]),
    ],
)
def test_end(arguments: list[str], status: int, others: str, expected: list[str]) -> None:
    command = [sys.executable, "-c", _COMMAND, *arguments, others]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    said = done.stdout.splitlines()
    assert [line for line in said if not line.startswith("raymoe ")] == expected
    assert (said[0].startswith("raymoe ")) is (status == 0)
