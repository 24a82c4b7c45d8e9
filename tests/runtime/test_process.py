"""How an actor's process is set up."""

from __future__ import annotations

import subprocess
import sys


def test_open_files_up_to_the_hard_limit() -> None:
    """A node that was started from a shell with a limit of 1024 gives it to its actors."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); "
        "from raymoe.runtime.process import set_up_process; set_up_process(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "(128, 128)\n"
