"""What is found in weights while their bytes pass: NaN, infinity, rows that DoRA can't scale.

Bytes that are only copied are not looked at, unless the merge is strict: that costs a look at every number, and of
objects that a store would copy itself a download. What is computed is looked at always, since it is in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from raymoe.errors import MergeFailed

_MAX_NOTES = 100  # of one process

# The bits of a number's exponent, by dtype: in IEEE's formats all of them are set for infinity and NaN alone. E4M3 has
# no infinity, and NaN where all bits but the sign are set.
_MASKS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}


def has_non_finite(content: memoryview, dtype: str) -> bool:
    """Whether NaN or infinity is among the numbers of some bytes; of a dtype that has neither, False."""
    if dtype not in _MASKS or not len(content):
        return False
    kind, mask = _MASKS[dtype]
    bits = np.frombuffer(content, dtype=kind)
    return bool(((bits & kind(mask)) == kind(mask)).any())


class WeightFindings:
    """Collects what is found, one line a tensor. With `strict` the first is an error instead. Thread-safe."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._lock = threading.Lock()
        self._notes: dict[str, str] = {}
        self._left_out: set[str] = set()

    def note(self, tensor: str, what: str) -> None:
        """Raises MergeFailed where the merge is strict."""
        if self.strict:
            raise MergeFailed(
                f"{tensor}: {what}, which --strict refuses. Correct that model, or merge without --strict, which warns"
            )
        with self._lock:
            if tensor not in self._notes and len(self._notes) == _MAX_NOTES:
                self._left_out.add(tensor)
            else:
                self._notes.setdefault(tensor, what)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line per tensor, for the first tensors alone."""
        with self._lock:
            return tuple(f"{tensor}: {what}" for tensor, what in self._notes.items())

    @property
    def omitted(self) -> int:
        """The number of tensors with findings that `lines` does not name."""
        with self._lock:
            return len(self._left_out)


def scan_non_finite(
    chunks: Iterator[memoryview], dtype: str, found: Callable[[], None], *, before: bytes = b""
) -> Iterator[memoryview]:
    """The same chunks; `found` is called for those with NaN or infinity, before they are handed on.

    `before`: what a number has of bytes before the first chunk. Chunks may end within a number.
    """
    size = number_bytes(dtype)
    rest = before
    for chunk in chunks:
        if size:
            content = memoryview(rest + bytes(chunk)) if rest else chunk
            whole = len(content) // size * size
            if has_non_finite(content[:whole], dtype):
                found()
            rest = bytes(content[whole:])
        yield chunk


def number_bytes(dtype: str) -> int:
    """Bytes of one number; 0 for a dtype that has neither NaN nor infinity."""
    return np.dtype(_MASKS[dtype][0]).itemsize if dtype in _MASKS else 0
