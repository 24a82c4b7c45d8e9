"""Checks weights while their bytes pass: NaN, infinity, rows that DoRA can't scale.

Bytes that are only copied are checked in strict merges only: this costs a check of every number, and a download of
objects that a store would otherwise copy server-side. Computed values are always checked, since they are in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from raymoe.errors import MergeFailed

_MAX_NOTES = 100  # per process

# The exponent bits of a number, by dtype: in IEEE formats all of them are set for infinity and NaN only. E4M3 has no
# infinity; in its NaN all bits but the sign are set.
_MASKS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}


def has_non_finite(content: memoryview, dtype: str) -> bool:
    """Whether the bytes contain NaN or infinity; False for a dtype that has neither."""
    if dtype not in _MASKS or not len(content):
        return False
    kind, mask = _MASKS[dtype]
    bits = np.frombuffer(content, dtype=kind)
    return bool(((bits & kind(mask)) == kind(mask)).any())


class WeightFindings:
    """Collects findings, one line per tensor. With `strict` the first is an error instead. Thread-safe."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._lock = threading.Lock()
        self._notes: dict[str, str] = {}
        self._left_out: set[str] = set()

    def note(self, tensor: str, what: str) -> None:
        """Note a finding. Raises MergeFailed if the merge is strict."""
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
        """One line per tensor, for the first tensors only."""
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
    """The same chunks. `found` is called for chunks with NaN or infinity, before they are passed on.

    `before`: how many bytes of a number precede the first chunk. Chunks may end within a number.
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
    """Bytes per number; 0 for a dtype that has neither NaN nor infinity."""
    return np.dtype(_MASKS[dtype][0]).itemsize if dtype in _MASKS else 0
