"""Every time that a run waits, with its reason. All are in seconds.

Some depend on each other, as `tests/runtime/test_timeouts.py` checks.
"""

from __future__ import annotations

# Start of Ray and of actors
REACH_TIMEOUT_S = 10  # a cluster's port that does not open in this time is not there, or behind a firewall
ANSWER_TIMEOUT_S = 45  # a node's first task starts a Python process there
START_GRACE_S = 5  # all actors are waited for: on an idle cluster they start together
START_TIMEOUT_S = 60  # one actor is waited for: a cold Python process, and other work that has just ended
GROW_TIMEOUT_S = 1800  # machines with GPUs may be hours away, but then a job is better submitted again
GROW_REPORT_INTERVAL_S = 30  # a person who waits for an autoscaler sees that the merge is not stuck

# The scheduler and its actors
TICK_S = 0.25  # how often progress is shown and lanes are filled while no result comes
PING_INTERVAL_S = 1.0  # how often an actor that is away is asked: Ray takes seconds to restart one
STATUS_INTERVAL_S = 0.5  # how often an actor is asked what it does: what the live line shows is as old
STATUS_TIMEOUT_S = 10.0  # an actor that has not answered for so long is not responsive
FINAL_STATUS_TIMEOUT_S = 10.0  # last statuses at the end: only sums of the report depend on them
STARTUP_GRACE_S = 10.0  # work waits for actors that are not up yet and would be better for it
STUCK_TIMEOUT_S = 50.0  # work that no actor can do waits for those that are away: longer than Ray takes to restart one
STALL_TIMEOUT_S = 1200.0  # a job without progress, unless the user says otherwise: slow filesystems pause for minutes
MAX_BETWEEN_LOOKS_S = 2.0  # of a pause between two looks at jobs no more is counted: the coordinator saw nothing then

# Display
PROGRESS_LINE_INTERVAL_S = 5.0  # a log gets a line so often
