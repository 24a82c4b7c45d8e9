"""The command line: arguments in, calls to the package, messages out. No logic of its own.

One file per command. Imports are inside the commands, so that `--help` does not wait for them.
"""

# Commands register with the app as they are imported, and are listed by `--help` in this order.
from raymoe.cli import merge, edit, prune, submit, plan, inspect, verify, generate, evaluate, extract, gguf, push, archs  # noqa: F401  # isort: skip
from raymoe.cli.application import app, main, run_command

__all__ = ["app", "main", "run_command"]
