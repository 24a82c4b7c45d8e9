"""Actors that run no model do without torch, even where a library would import it: transformers does, to tokenize."""

from __future__ import annotations

import os
import sys

__all__ = ["leave_torch_out"]


def leave_torch_out() -> None:
    """Have libraries find no torch in this process, unless it is there already.

    Importing it with transformers costs 2 processor seconds and 270 MB, of which a tokenizer uses nothing.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what Python itself takes for "can't be imported"
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss its models
