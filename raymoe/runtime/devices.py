"""Where work in this process computes: on a GPU, if there is one, or where the user says."""

from __future__ import annotations

from collections.abc import Iterator

from raymoe.errors import Problem

__all__ = ["device_of", "device_problems"]


def device_problems(device: str | None) -> Iterator[Problem]:
    """What is wrong with `cpu`, `cuda` or None, which leaves the choice."""
    if device not in (None, "cpu", "cuda"):
        yield Problem(where="--device", what=f"there is no device {device!r}", remedy="give cpu, cuda or auto")
    if device == "cuda" and device_of(None) == "cpu":
        what = "torch sees no GPU here"
        yield Problem(where="--device cuda", what=what, remedy="leave it out to compute on the CPU")


def device_of(device: str | None) -> str:
    """`cpu` or `cuda`."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")
