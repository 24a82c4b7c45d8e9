"""Prevents optional libraries (torch, scikit-learn) from being imported indirectly in actors that do not use them."""

from __future__ import annotations

import os
import sys


def block_torch_import() -> None:
    """Hide torch from libraries in this process, unless it is imported already: for actors that run no model.

    If transformers imports it to tokenize, that costs 2 processor seconds and 270 MB.
    """
    _block_import("torch")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # otherwise it warns that models are not available


def block_sklearn_import() -> None:
    """Hide scikit-learn, which imports SciPy and pandas: 2.5 s of an actor's start on a GPU host.

    transformers 4 and early 5 import it if it is installed, for one method of text generation.
    """
    _block_import("sklearn")


def _block_import(name: str) -> None:
    if name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]  # Python raises ImportError for such an entry
