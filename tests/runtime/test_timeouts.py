"""Times that depend on each other."""

from __future__ import annotations

from raymoe.runtime import timeouts


def test_related_timeouts() -> None:
    # A node's first actor starts a Python process, as its first task does.
    assert timeouts.START_TIMEOUT_S > timeouts.ANSWER_TIMEOUT_S
    # Actors that are away are asked many times before work is given up, and later than those that only start late.
    assert timeouts.STUCK_TIMEOUT_S > timeouts.ANSWER_TIMEOUT_S > timeouts.STARTUP_GRACE_S > timeouts.PING_INTERVAL_S
    # An actor that answers is never taken for one that does not, and all answers are old before a job stands still.
    assert timeouts.STATUS_INTERVAL_S < timeouts.STATUS_TIMEOUT_S < timeouts.STALL_TIMEOUT_S / 2
    assert timeouts.TICK_S < timeouts.STATUS_INTERVAL_S < timeouts.MAX_BETWEEN_LOOKS_S
