"""What an actor does without though it is installed: libraries that others import in passing and that nobody uses."""

from __future__ import annotations

import os
import sys

__all__ = ["leave_sklearn_out", "leave_torch_out"]


def leave_torch_out() -> None:
    """Have libraries find no torch in this process, unless it is there already: for actors that run no model.

    Importing it with transformers, to tokenize, costs 2 processor seconds and 270 MB.
    """
    _leave_out("torch")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss its models


def leave_sklearn_out() -> None:
    """The same with scikit-learn, which brings SciPy and pandas: 2.5 s of an actor's start on a GPU host.

    transformers 4 and early 5 import it, where it is installed, for one way of generating text.
    """
    _leave_out("sklearn")


def _leave_out(name: str) -> None:
    if name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python itself takes for "can't be imported"
