"""All waiting times of `raymoe submit`, with their reasons. All are in seconds."""

from __future__ import annotations

REACH_TIMEOUT_S = 10  # a job server that does not answer in this time does not exist, or is behind a firewall
JOB_AGENT_PAUSES_S = (2.0, 5.0, 10.0, 20.0)  # between tries: a head that has just started has no job agent yet
LOG_PAUSE_S = 1.0  # between reads of a job's log, which users watch
LOG_RECONNECT_TIMEOUT_S = 60.0  # a restarted head, or a forwarded port, is back in this time
