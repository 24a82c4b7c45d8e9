"""One run of a command among those that a case needs: `Running` while it goes on, `Try` when it is over."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.processes import send

__all__ = ["Running", "Try"]


@dataclass(kw_only=True)
class Try:
    """A run of the command: its exit status (None: killed by us; 'hung' is a timeout) and what it said."""

    status: int | None
    said: str
    hung: bool = False

    @property
    def is_clean_error(self) -> bool:
        """One message and no traceback."""
        messages = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return self.status in (1, 2) and "Traceback" not in self.said and len(messages) == 1


class Running:
    """A command in the background, in a process group of its own."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str]) -> None:
        self.began = time.monotonic()
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ends(self, within_s: float) -> bool:
        """Whether it ends within that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, within_s))
        return self._process.returncode is not None

    def finish(self, timeout_s: float) -> Try:
        """Wait for its end. A command that has not ended by then is killed, and hung."""
        hung = not self.ends(timeout_s)
        if hung:
            send(self.pid, signal.SIGKILL)
            self._process.wait()
        self._output.seek(0)
        said = self._output.read()
        self._output.close()
        status = self._process.returncode
        return Try(status=None if status < 0 else status, said=said, hung=hung)
