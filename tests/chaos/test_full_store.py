"""What a merge says when Ray has no room for objects, in its store or on disk. scripts/chaos.py fills both for real."""

from __future__ import annotations

from typing import Any

import pytest

from raymoe.errors import MergeFailed
from raymoe.runtime.gate_work import GateJob
from raymoe.runtime.schedule import _result


@pytest.mark.parametrize("error", ["ObjectStoreFullError", "OutOfDiskError"])
def test_no_room_for_states(local_ray: None, error: str) -> None:
    """Raised where a router's actor takes in the states, as Ray does it."""
    import ray

    @ray.remote
    def full() -> Any:
        raise getattr(ray.exceptions, error)("Local disk is full")

    words = (
        rf"^router of layer 3: no room for the states of prompts: .* \({error}\)\. Start Ray with more .* run the same"
    )
    with pytest.raises(MergeFailed, match=words):
        _result(full.remote(), GateJob(3), sent=False)
