"""Every time that `raymoe submit` waits, with its reason. All are in seconds."""

from __future__ import annotations

REACH_TIMEOUT_S = 10  # a job server that does not answer in this time is not there, or behind a firewall
JOB_AGENT_PAUSES_S = (2.0, 5.0, 10.0, 20.0)  # between tries: a head that has just started has no job agent yet
LOG_PAUSE_S = 1.0  # between looks at a job's log: a person reads it
LOG_RECONNECT_TIMEOUT_S = 60.0  # a head that is restarted, or a forwarded port, is back in this time
