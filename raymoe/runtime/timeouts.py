"""All waiting times of a run, with their reasons. All are in seconds.

Some depend on each other, as `tests/runtime/test_timeouts.py` checks.
"""

from __future__ import annotations

# Start of Ray and of actors
REACH_TIMEOUT_S = 10  # a cluster's port that does not open in this time does not exist, or is behind a firewall
ANSWER_TIMEOUT_S = 45  # a node's first task starts a Python process there
START_GRACE_S = 5  # wait this long for all actors: on an idle cluster they start together
START_TIMEOUT_S = 60  # wait this long for the first actor: a cold Python process, and other work that has just ended
GROW_TIMEOUT_S = 1800  # machines with GPUs may be hours away, but then a job is better submitted again
GROW_REPORT_INTERVAL_S = 30  # shows users that wait for an autoscaler that the merge is not stuck

# The scheduler and its actors
TICK_S = 0.25  # how often progress is shown and lanes are filled while no result arrives
PING_INTERVAL_S = 1.0  # how often an unavailable actor is pinged: Ray takes seconds to restart one
STATUS_INTERVAL_S = 0.5  # how often an actor's status is requested: the live line is as old as this
STATUS_TIMEOUT_S = 10.0  # an actor that has not answered for so long is not responsive
FINAL_STATUS_TIMEOUT_S = 10.0  # last statuses at the end: only totals of the report depend on them
STARTUP_GRACE_S = 10.0  # work waits this long for actors that are not up yet and suit it better
# work that no available actor can do waits this long for the others: longer than Ray takes to restart one
STUCK_TIMEOUT_S = 50.0
STALL_TIMEOUT_S = 1200.0  # a job without progress, unless the user sets it: slow filesystems pause for minutes
MAX_BETWEEN_LOOKS_S = 2.0  # a longer pause between two checks counts as this: the coordinator saw nothing meanwhile

# Display
PROGRESS_LINE_INTERVAL_S = 5.0  # time between two lines in a log
