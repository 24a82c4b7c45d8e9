"""What an actor does without though it is installed: libraries that others import in passing and that nobody uses."""

from __future__ import annotations

import os
import sys


def block_torch_import() -> None:
    """Have libraries find no torch in this process, unless it is there already: for actors that run no model.

    Importing it with transformers, to tokenize, costs 2 processor seconds and 270 MB.
    """
    _block_import("torch")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss its models


def block_sklearn_import() -> None:
    """The same with scikit-learn, which brings SciPy and pandas: 2.5 s of an actor's start on a GPU host.

    transformers 4 and early 5 import it, where it is installed, for one way of generating text.
    """
    _block_import("sklearn")


def _block_import(name: str) -> None:
    if name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python itself takes for "can't be imported"
